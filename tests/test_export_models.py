"""Exports of the libraries' models, trained on each engine: their loaders find the average."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from dist_ema.checkpoint import CheckpointError
from dist_ema.export import offline
from tests import read_exports
from tests.models import BUILDERS, build, loss_of, tiny_llama
from tests.read_exports import contents, written
from tests.runs import same
from tests.worlds import mesh, rank
from tests.worlds_deepspeed import configuration, library

ROOT = Path(__file__).parents[1]
ENGINES = {"ddp": 2, "fsdp2": 2, "hsdp": 4, "z2": 2, "z3": 2}  # number of ranks
DTYPES = (torch.float32, torch.bfloat16)


def wrap(model: nn.Module, engine: str, *, wraps_blocks: bool = True) -> Any:
    if engine == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if engine in ("z2", "z3"):
        config = configuration(int(engine[1]), batch_size=2, bf16={"enabled": True})
        optimizer = torch.optim.Adam(trainable(model), lr=0.01)
        return library().initialize(model=model, optimizer=optimizer, config=config)[0]
    sizes = (2, 2) if engine == "hsdp" else (dist.get_world_size(),)
    shards = mesh(sizes, ("replica", "shard")[-len(sizes) :])
    for block in blocks(model) if wraps_blocks else []:
        fully_shard(block, mesh=shards)
    return fully_shard(model, mesh=shards)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in blocks(child)]


def averaged(name: str, engine: str) -> ShardedEMA:
    """An average over a few steps of training."""
    # A DiT reads the weights of its first block once more, out of turn.
    model = wrap(build(name), engine, wraps_blocks=name != "dit")
    zero = engine in ("z2", "z3")
    ema = ShardedEMA(model, 0.5)
    optimizer = None if zero else torch.optim.Adam(trainable(model), lr=0.01)
    for step in range(2):
        loss = loss_of(model, name, step, torch.bfloat16 if zero else torch.float32)
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
    return ema


@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES.items(), ids=ENGINES)
@pytest.mark.timeout_s(240)
def test_all_three_ways_write_what_the_library_finds(engine: str, tmp_path: Path):
    """In equal bytes. One engine's exports are read in a process that has not written them."""
    direct, rank0, sharded = (tmp_path / name for name in ("direct", "rank0", "sharded"))
    for name in BUILDERS:
        ema = averaged(name, engine)
        assert ema.drift() > 0
        ema.save(sharded)
        for dtype in DTYPES:
            path = direct / f"{name}-{str(dtype).removeprefix('torch.')}"
            options: Any = {"dtype": dtype, "max_shard_size": "2KB"}
            ema.export(path, method="direct", **options)
            ema.export(rank0, method="rank0", **options)
            state = ema.gather_state_dict(dtype=dtype)
            if rank() != 0:
                continue
            assert (len(list(path.glob("*-of-*.safetensors"))) > 1) == (name != "lora")
            if name == "lora":
                state = {k: v for k, v in state.items() if "lora_" in k or "to_save" in k}
            wanted = {fqn: tensor.clone() for fqn, tensor in state.items()}
            save_file(wanted, path.with_suffix(".wanted"))
            assert contents(path) == contents(rank0)
            # These have buffers in some versions.
            base = rank0 if name in ("gpt2", "dit") else None
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                offline.export(sharded, tmp_path / "offline", base=base, **options)
            assert contents(path) == contents(tmp_path / "offline")
            shutil.rmtree(tmp_path / "offline")
            shutil.rmtree(rank0)
    if rank() == 0:
        good = f"{2 * len(BUILDERS)} exports are good"
        if engine != "z3":
            assert read_exports.check_all(direct) == good
            return
        command = [sys.executable, "-m", "tests.read_exports", direct]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.endswith(f"{good}\n")


@pytest.mark.ranks(2)
def test_a_variant_lies_beside_the_raw_weights(tmp_path: Path):
    from diffusers import UNet2DModel

    weights_name, raw = "diffusion_pytorch_model.ema.safetensors", build("unet")
    ema = averaged("unet", "ddp")
    state = ema.gather_state_dict()
    for size in ("5GB", "4KB"):
        path = tmp_path / size
        if rank() == 0:
            raw.save_pretrained(path, max_shard_size=size)
        for _ in range(2):  # the second replaces the first
            ema.export(path, weights_name=weights_name, max_shard_size=size)
        if rank() == 0:
            same(dict(UNet2DModel.from_pretrained(path, variant="ema").state_dict()), state)
            weights = UNet2DModel.from_pretrained(path).state_dict()
            same(dict(weights), dict(raw.state_dict()))


def configs(path: Path) -> dict[str, Any]:
    """The configurations of a model, without what depends on how it was made."""
    by_name = {file.name: json.loads(file.read_text()) for file in path.glob("*config.json")}
    for config in by_name.values():
        config.pop("_name_or_path", None)
        if "target_modules" in config:  # a set, for PEFT
            config["target_modules"].sort()
    return by_name


@pytest.mark.ranks(0)
@pytest.mark.parametrize(
    ("name", "wraps"),
    [*((name, None) for name in BUILDERS), ("lora", "compile"), ("lora", "checkpoint")],
)
def test_an_export_is_what_the_library_itself_writes(name: str, wraps: Any, tmp_path: Path):
    model = build(name)
    blocks = model.base_model.model.model.layers if wraps else []
    if wraps == "compile":
        blocks[0] = torch.compile(blocks[0], backend="eager")
    elif wraps == "checkpoint":
        blocks[0] = checkpoint_wrapper(blocks[0])
    is_transformer = name in ("gpt2", "bert")  # diffusers adds to its configuration
    before = model.config.to_dict() if is_transformer else None
    ShardedEMA(model, 0.5).export(tmp_path / "ours", max_shard_size="4KB")
    assert not is_transformer or model.config.to_dict() == before
    build(name).save_pretrained(tmp_path / "theirs")
    same(written(tmp_path / "ours"), written(tmp_path / "theirs"))
    assert configs(tmp_path / "ours") == configs(tmp_path / "theirs")


@pytest.mark.ranks(0)
def test_an_adapter_that_was_added_to_a_transformers_model_is_exported_as_one(tmp_path: Path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_()
    ShardedEMA(model, 0.5).export(tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "export"))
    parameters = dict(loaded.named_parameters())
    same({name: parameters[name].detach() for name in adapters}, adapters)


def prompt() -> nn.Module:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(
        tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )


def unet_with_adapter() -> nn.Module:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    model = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=2,
    )
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return model


def lora_and_a_norm() -> nn.Module:
    model = build("lora")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


def tied_unet() -> nn.Module:
    model = build("unet")
    model.conv_out.bias = model.time_embedding.linear_1.bias
    return model


@pytest.mark.ranks(0)
@pytest.mark.parametrize(
    ("make", "message", "error"),
    [
        (prompt, "a learned prompt", CheckpointError),
        (unet_with_adapter, "save_lora_adapter", CheckpointError),
        (tied_unet, "diffusers neither writes nor reads tied", CheckpointError),
        (lora_and_a_norm, r"no room for .*model\.norm\.weight", ValueError),
    ],
)
def test_what_no_file_can_hold_is_refused_and_saved(
    make: Any, message: str, error: type[Exception], tmp_path: Path
):
    ema = ShardedEMA(make(), 0.5)
    with pytest.raises(ValueError, match=message):
        ema.export(tmp_path / "export")
    ema.save(tmp_path / "sharded")
    with pytest.raises(error, match=message):
        offline.export(tmp_path / "sharded", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


@pytest.mark.ranks(0)
def test_the_configurations_are_those_of_the_moment(tmp_path: Path):
    model = build("gpt2")
    ema = ShardedEMA(model, 0.5)
    ema.save(tmp_path / "sharded")
    model.config.summary_type = "mean"
    # Would warn when used, without do_sample: transformers itself refuses to save it.
    model.generation_config.temperature = 0.5
    ema.export(tmp_path / "export")
    exported = configs(tmp_path / "export")
    assert exported["config.json"]["summary_type"] == "mean"
    assert exported["generation_config.json"]["temperature"] == 0.5


@pytest.mark.ranks(0)
def test_a_variant_of_another_dtype_is_refused_beside_weights_that_it_would_cast(tmp_path: Path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    ema = ShardedEMA(model, 0.5)
    with pytest.raises(ValueError, match="has dtype float32, to which loaders convert"):
        ema.export(tmp_path, weights_name="model.ema.safetensors", dtype=torch.bfloat16)
    assert contents(tmp_path) == before
    ema.export(tmp_path, weights_name="model.ema.safetensors")


@pytest.mark.ranks(0)
def test_the_configurations_of_parts_say_the_dtype_too(tmp_path: Path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = {**sizes, **heads, "vocab_size": 9, "max_position_embeddings": 8}
    vision = {**sizes, **heads, "image_size": 4, "patch_size": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    model = model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16 without a master
        ema = ShardedEMA(model, 0.5)
    ema.save(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    ema.export(tmp_path / "live")
    offline.export(tmp_path / "sharded", tmp_path / "card", base=base)
    for who in ("live", "card"):
        assert CLIPTextModel.from_pretrained(tmp_path / who).dtype == torch.float32
