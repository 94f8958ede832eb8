"""Quantized layers, whose `state_dict()` has tensors that no module holds; and no network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from dist_ema.checkpoint import CheckpointError
from dist_ema.export import offline
from tests.models import tiny_llama
from tests.read_exports import contents, written
from tests.runs import same
from tests.worlds import mesh, rank

ENGINES = ("ddp", "fsdp2")


class Quantized(nn.Linear):
    """A frozen layer that keeps 8 bits, with the names that bitsandbytes gives its 4 bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.absmax = [layer.weight.detach().abs().amax(1)]  # in no module's tensors
        bits = (layer.weight.detach() / self.absmax[0][:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(bits, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.absmax[0] / 127)[:, None]
        return x @ (self.weight.to(x.dtype) * scale).T

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.absmax[0]
        destination[f"{prefix}weight.quant_state.bitsandbytes__nf4"] = torch.tensor([1, 2])


class Head(nn.Module):
    """A model, not of peft, with a quantized layer and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = Quantized(nn.Linear(8, 6, bias=False))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))


def quantized_lora(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.base_layer = Quantized(layer.self_attn.q_proj.base_layer)
        layer.mlp.up_proj = Quantized(layer.mlp.up_proj)
    return model


def wrap(model: nn.Module, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    shards = mesh((dist.get_world_size(),), ("shard",))
    return fully_shard(model, mesh=shards, ignored_params=frozen)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_on_a_quantized_base_is_exported(engine: str, tmp_path: Path):
    model = quantized_lora(modules_to_save=["lm_head"])
    ema = ShardedEMA(wrap(model, engine), 0.5)
    state = ema.gather_state_dict()
    ema.save(tmp_path / "sharded")
    ema.export(tmp_path / "ours")
    if rank() == 0:
        fresh = quantized_lora(modules_to_save=["lm_head"])
        fresh.save_pretrained(tmp_path / "theirs")
        same(written(tmp_path / "ours"), written(tmp_path / "theirs"))
        offline.export(tmp_path / "sharded", tmp_path / "offline")
        assert contents(tmp_path / "ours") == contents(tmp_path / "offline")
        same(state, dict(fresh.state_dict()))


@pytest.mark.ranks(0)
def test_what_a_quantized_layer_adds_to_an_adapter_is_refused_by_name(tmp_path: Path):
    model = quantized_lora(modules_to_save=["lm_head"])
    copy = model.base_model.model.lm_head.modules_to_save
    copy["default"] = Quantized(copy["default"])
    with pytest.raises(ValueError, match=r"lm_head\.weight\.absmax"):
        ShardedEMA(model).export(tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_state_of_a_quantization_is_gathered_or_refused(engine: str, tmp_path: Path):
    ema = ShardedEMA(wrap(Head(), engine), 0.5)
    wanted = Head().state_dict()
    for state in (ema.gather_state_dict(dtype=torch.bfloat16), dict(ema.gather_tensors())):
        if rank() == 0:
            assert state.keys() == wanted.keys()
            of_base = [fqn for fqn in wanted if fqn.startswith("base")]
            same({fqn: state[fqn] for fqn in of_base}, {fqn: wanted[fqn] for fqn in of_base})
    message = r"only in state_dict\(\) \['base\.weight\.absmax'"
    with pytest.raises(ValueError, match=message):
        ema.export(tmp_path / "export")
    ema.save(tmp_path / "sharded")
    with pytest.raises(CheckpointError, match=message):
        offline.export(tmp_path / "sharded", tmp_path / "export")


@pytest.mark.ranks(2)
def test_a_state_that_differs_between_ranks_is_refused():
    model = Head()
    if rank() == 1:
        model.base.absmax[0] = model.base.absmax[0] * 2
    ema = ShardedEMA(DistributedDataParallel(model), 0.5)
    with pytest.raises(RuntimeError, match=r"state_dict\(\)\['base\.weight\.absmax'\] is"):
        ema.gather_state_dict()


@pytest.mark.ranks(2)
def test_a_tensor_that_may_depend_on_averaged_weights_is_not_gathered():
    class Scaled(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}norm"] = self.weight.norm()

    ema = ShardedEMA(DistributedDataParallel(nn.Sequential(Scaled(2, 3))))
    with pytest.raises(ValueError, match=r"state_dict\(\) has 0\.norm"):
        ema.gather_state_dict()


def four_bits() -> nn.Module:
    """A tiny Llama in 4 bits of bitsandbytes, with adapters."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = tiny_llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            old = getattr(layer.self_attn, name)
            new = Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
            new.weight = Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.ranks(0)
def test_an_adapter_on_a_base_of_bitsandbytes_is_exported(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    model = four_bits()
    assert any(key.endswith("absmax") for key in model.state_dict())
    ema = ShardedEMA(model, 0.5)
    ema.export(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    same(written(tmp_path / "ours"), written(tmp_path / "theirs"))
    same(ema.gather_state_dict(), dict(model.state_dict()))
    whole = ShardedEMA(model.base_model.unload(), params="all")
    with pytest.raises(ValueError, match="absmax"):
        whole.export(tmp_path / "whole")


@pytest.mark.ranks(0)
@pytest.mark.parametrize("resized", [False, True])
def test_neither_save_nor_export_asks_the_network(resized: bool, tmp_path: Path, monkeypatch):
    if resized:  # older ones look for the base's configuration in a cache that this test cannot set
        pytest.importorskip("peft", minversion="0.21")
    from peft import LoraConfig, get_peft_model

    asked: list[object] = []

    def refuse(*args: object, **options: object) -> None:
        asked.append(args)
        raise OSError("no network")

    base = tiny_llama()
    cached = tmp_path / "hub" / "models--somebody--base" / "snapshots" / ("0" * 40)
    base.save_pretrained(cached)
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs" / "main").write_text("0" * 40)
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        transformers.utils.hub, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False
    )
    if resized:
        base.resize_token_embeddings(base.config.vocab_size + 3)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "somebody/base"
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    ema = ShardedEMA(model, 0.5)
    ema.save(tmp_path / "sharded")
    ema.export(tmp_path / "export")
    assert not asked
    names = written(tmp_path / "export").keys()
    assert any("embed_tokens" in name for name in names) == resized
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/base"
    assert model.peft_config["default"].base_model_name_or_path == "somebody/base"
