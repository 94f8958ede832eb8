"""The Markdown pages as programs: their code blocks, and the names that these blocks use.

    python tests/readme.py PAGE LAUNCH      run the Python blocks of one page and one launch

PAGE is relative to the repository, as in `examples/README.md`. A comment above a Python
block, or above the diff of one, says how the block is run:

    <!-- test: LAUNCH[, LABEL][, goes on] -->

LAUNCH is a key of `LAUNCHES`. Blocks of one page and launch share a process, in order. A block
starts from the names that `LAUNCHES[LAUNCH]` returns; with "goes on" it also has the names that
earlier blocks of its label defined. LABEL selects a variant of the names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
NUM_BATCHES = 32
BLOCK = re.compile(r"(?:^<!-- test: ([\w, ]+) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)

Names = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    code: str
    line: int  # first line of the code, from 1
    launch: str  # "" where no comment says how to run the block
    label: str
    goes_on: bool


def pages() -> list[str]:
    """All pages of the repository that people write, relative to its root."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("tests/benchmarks/*.md")]
    return sorted(str(p.relative_to(ROOT)) for p in files if not p.parent.name.startswith("."))


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page that name a language, from top to bottom."""
    text = (ROOT / page).read_text()
    made = []
    for match in BLOCK.finditer(text):
        language, code = match[2], match[3]
        if match[1] and language == "diff":  # what the code is after the change
            language, code = "python", one_side(code, "+")
        launch, *rest = [word.strip() for word in (match[1] or "").split(",")]
        label = "".join(word for word in rest if word != "goes on")
        line = text[: match.start(3)].count("\n") + 1
        made.append(Block(language, code, line, launch, label, "goes on" in rest))
    return made


def one_side(diff: str, sign: str) -> str:
    """The code before ("-") or after ("+") a change, with an empty line for each left out."""
    lines = [line[1:] if line[:1] in (" ", sign) else "" for line in diff.splitlines()]
    return "\n".join(lines) + "\n"


def main(page: str, launch: str) -> None:
    names: dict[str, Names] = {}
    for block in blocks(page):
        if block.launch == launch and block.language == "python":
            if not block.goes_on:
                names[block.label] = LAUNCHES[launch](block.label)
            # The blank lines give tracebacks the line numbers of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            exec(code, names[block.label])


def _training(label: str = "") -> Names:
    """What any training script has: here a small regression."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d if label == "batch norm" else nn.LayerNorm
            self.blocks = nn.ModuleList([nn.Linear(8, 8), norm(8)])
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).tanh()
            return self.head(x)

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return mse_loss(model(x.to(next(model.parameters()).dtype)).float(), y)

    def train_step(batch: list[Tensor]) -> None:
        loss = loss_of(names["model"], batch)
        accelerator = names.get("accelerator")
        loss.backward() if accelerator is None else accelerator.backward(loss)
        names["optimizer"].step()
        names["optimizer"].zero_grad()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return sum(loss_of(model, batch).item() for batch in names["loader"])

    model = make_model()
    xs = torch.randn(NUM_BATCHES * 4, 8)
    names: Names = {
        "torch": torch,
        "make_model": make_model,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loader": DataLoader(TensorDataset(xs, xs.sum(1, keepdim=True)), batch_size=4),
        "inputs": xs[:4],
        "save_every": NUM_BATCHES // 8,
        "loss_of": loss_of,
        "train_step": train_step,
        "evaluate": evaluate,
    }
    return names


def _torchrun(label: str) -> Names:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    names = _training(label)
    names["eval_interval"] = NUM_BATCHES // 4  # as in nanoGPT's train.py
    names["load_weights"] = dict  # in place of an inference engine's
    if label == "batch norm":
        from dist_ema import ShardedEMA

        fully_shard(names["model"])
        names["ema"] = ShardedEMA(names["model"])
    return names


def diffusion() -> Names:
    """What diffusers' training scripts have: here for images of 8 x 8 pixels."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    block = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    size = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(8, in_channels=1, out_channels=1, **block, **size)
    noise_scheduler = DDPMScheduler(10)

    def diffusion_loss(unet: nn.Module, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(1e4 * images.sum().abs()) % 2**31)
        noise = torch.randn(images.shape, generator=generator)
        steps = torch.randint(10, (len(images),), generator=generator)
        noisy = noise_scheduler.add_noise(images, noise, steps)
        return mse_loss(unet(noisy, steps).sample, noise)

    return {
        "accelerator": Accelerator(gradient_accumulation_steps=2),
        "unet": unet,
        "optimizer": torch.optim.AdamW(unet.parameters(), lr=1e-2),
        "train_dataloader": DataLoader(torch.randn(64, 1, 8, 8), batch_size=4),
        "noise_scheduler": noise_scheduler,
        "diffusion_loss": diffusion_loss,
        "log_validation": lambda unet: diffusion_loss(unet, torch.ones(4, 1, 8, 8)).item(),
    }


def _accelerate(label: str) -> Names:
    from accelerate import Accelerator

    if label == "diffusers":
        return diffusion()
    names = _training()  # `train_step` reads this mapping, to which the blocks write
    names["accelerator"] = Accelerator()
    names["language_model"] = _language_model
    names["texts"] = [text["input_ids"][None] for text in _texts(4)]
    return names


def _fsdp2(label: str) -> Names:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    from tests.worlds_accelerate import several_devices_named_cpu

    sharded = {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    with several_devices_named_cpu():
        plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            **sharded,
        )
        names: Names = {"accelerator": Accelerator(fsdp_plugin=plugin), "torch": torch}
    names["texts"] = [text["input_ids"][None] for text in _texts(4)]
    return names | {"language_model": _language_model}


def _deepspeed(label: str) -> Names:
    import deepspeed

    # It would compile a shared-memory backend, which takes most of a minute.
    with mock.patch.object(sys.modules["deepspeed.comm.torch"], "build_shm_op", return_value=None):
        deepspeed.init_distributed("gloo")
    config = json.loads((ROOT / "launch/deepspeed/zero3.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 4}
    return _training() | {"deepspeed": deepspeed, "config": config}


def _python(label: str) -> Names:
    from lightning.pytorch import LightningModule
    from transformers import TrainingArguments

    names = _training()

    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = names["make_model"]()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return names["loss_of"](self.net, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", names["loss_of"](self.net, batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"save_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return names | {
        "model": _language_model(),
        "language_model": _language_model,
        "args": TrainingArguments("run/trainer", max_steps=4, **arguments),
        "train_set": _texts(32),
        "test_set": _texts(8),
        "module": Regression(),
        "train_loader": names["loader"],
        "test_loader": names["loader"],
        "options": {"accelerator": "cpu", "logger": False, "default_root_dir": "run", **quiet},
    }


def _language_model() -> Any:
    """A Llama of a few thousand parameters, the same on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=17, num_hidden_layers=1, **sizes))


def _texts(number: int) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in torch.randint(17, (number, 6))]


LAUNCHES: dict[str, Callable[[str], Names]] = {
    "torchrun": _torchrun,  # 2 ranks
    "accelerate": _accelerate,  # 2 ranks, DDP
    "fsdp2": _fsdp2,  # 2 ranks, accelerate
    "deepspeed": _deepspeed,  # 2 ranks
    "python": _python,  # one process
    "afterwards": lambda label: {},  # one process, in the directory where "torchrun" ran
}

if __name__ == "__main__":
    main(*sys.argv[1:])
