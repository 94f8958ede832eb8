"""README.md as a program: its blocks, and what they take from the reader's own script.

    python tests/readme.py LAUNCH       run the Python blocks of one launch, on each of its ranks

A comment above a block says how it is run:

    <!-- test: LAUNCH [NUM_RANKS][, LABEL][, goes on] -->

Blocks of one launch share a process, in order. Each starts from the names that `_NAMES[LAUNCH]`
gives; one that goes on has those of the blocks before it. A label is for a variant of these names.
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

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NUM_BATCHES = 32

Names = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    code: str
    line: int  # of its first line, from 1
    launch: str | None
    num_ranks: int
    label: str
    goes_on: bool


def blocks() -> list[Block]:
    """The fenced blocks of the README that have a language, from the top to the bottom."""
    fence = re.compile(
        r"(?:^<!-- test: (\w+)(?: (\d+))?((?:, [\w ]+)*) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S
    )
    text = README.read_text()
    found = []
    for match in fence.finditer(text):
        launch, num_ranks, words, language, code = match.groups()
        line = text[: match.start(5)].count("\n") + 1
        labels = [word.strip() for word in (words or "").split(",") if word]
        label = "".join(word for word in labels if word != "goes on")
        found.append(
            Block(language, code, line, launch, int(num_ranks or 1), label, "goes on" in labels)
        )
    return found


def main(launch: str) -> None:
    going: dict[str, Names] = {}
    for block in blocks():
        if block.launch == launch and block.language == "python":
            if not block.goes_on:
                going[block.label] = _NAMES[launch](block.label)
            # As many lines above as in the README, for the traceback.
            code = compile("\n" * (block.line - 1) + block.code, str(README), "exec")
            exec(code, going[block.label])


def _plain(label: str = "") -> Names:
    """A small regression: names that any training script has."""
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import mse_loss

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
    data = torch.utils.data.TensorDataset(xs, xs.sum(1, keepdim=True))
    names: Names = {
        "torch": torch,
        "make_model": make_model,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loader": torch.utils.data.DataLoader(data, batch_size=4),
        "inputs": xs[:4],
        "save_every": NUM_BATCHES // 8,
        "loss_of": loss_of,
        "train_step": train_step,
        "evaluate": evaluate,
    }
    return names


def _torchrun(label: str) -> Names:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from dist_ema import ShardedEMA

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    names = _plain(label)
    if label == "batch norm":
        fully_shard(names["model"])
        names["ema"] = ShardedEMA(names["model"])
    return names


def _accelerate(label: str) -> Names:
    from accelerate import Accelerator

    names = _plain()  # the snippets put their model into it, and train_step() takes it from there
    names["accelerator"] = Accelerator()
    names["language_model"] = _language_model
    names["texts"] = [text["input_ids"][None] for text in _texts(4)]
    return names


def _deepspeed(label: str) -> Names:
    import deepspeed

    # It would compile a shared-memory backend, which takes most of a minute.
    with mock.patch.object(sys.modules["deepspeed.comm.torch"], "build_shm_op", return_value=None):
        deepspeed.init_distributed("gloo")
    config = json.loads((ROOT / "launch/deepspeed/zero3.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 4}
    names = _plain()
    names |= {"deepspeed": deepspeed, "config": config}
    return names


def _python(label: str) -> Names:
    from lightning.pytorch import LightningModule
    from transformers import TrainingArguments

    names = _plain()

    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = names["make_model"]()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return names["loss_of"](self.net, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", names["loss_of"](self.net, batch))

        def configure_optimizers(self) -> Any:
            return names["torch"].optim.AdamW(self.parameters(), lr=1e-2)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return names | {
        "model": _language_model(),
        "args": TrainingArguments(
            "run/trainer", max_steps=4, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        "train_set": _texts(32),
        "test_set": _texts(8),
        "module": Regression(),
        "train_loader": names["loader"],
        "test_loader": names["loader"],
        "options": {"accelerator": "cpu", "logger": False, "default_root_dir": "run", **quiet},
    }


def _language_model() -> Any:
    """A Llama of a few thousand parameters, the same on every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=17, num_hidden_layers=1, **sizes))


def _texts(number: int) -> list[dict[str, Any]]:
    import torch

    return [{"input_ids": row, "labels": row} for row in torch.randint(17, (number, 6))]


_NAMES: dict[str, Callable[[str], Names]] = {
    "torchrun": _torchrun,
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
    "python": _python,
    "afterwards": lambda label: {},
}

if __name__ == "__main__":
    main(*sys.argv[1:])
