"""Models with experts, and with tensors in other tensors: float8 training, quantized bases.

Tests with torchao or bitsandbytes run where these are installed. `Scaled` follows the protocol of
torchao's float8 weights in a few lines, and runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from tests.net import TRAINABLE, Bank
from tests.oracle import Oracle
from tests.read_exports import written
from tests.runs import check_average, same
from tests.worlds import WRAPPERS, World, from_rank_0, mesh, num_ranks, rank, whole, worlds

aten = torch.ops.aten
WRAPPED = (aten.detach, aten.view, aten.slice, aten.split, aten.clone, aten.empty_like)
WRAPPED += (aten.new_zeros, aten.as_strided, aten._to_copy, aten.t)
Build = Callable[[nn.Module], nn.Module]


class Scaled(torch.Tensor):
    """High-precision values; FSDP2 gathers them as 8-bit integers and one scale."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype
        )
        made._tensor, made._precomputed_scale = values, None
        return made

    def __init__(self, values: Tensor) -> None:
        super().__init__()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        scale = ["_precomputed_scale"] if self._precomputed_scale is not None else []
        return ["_tensor", *scale], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, lambda t: t._tensor, (args, kwargs or {}))
        out = func(*args, **kwargs)
        wraps = func.overloadpacket in WRAPPED
        return pytree.tree_map_only(Tensor, cls, out) if wraps else out

    def scale(self) -> Tensor:
        largest = self._tensor.abs().amax() if self.numel() else torch.zeros(())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest / 127

    def fsdp_pre_all_gather(self, mesh):
        scale = self.scale() if self._precomputed_scale is None else self._precomputed_scale
        return ((self._tensor / scale).round().to(torch.int8),), (scale,)

    def fsdp_post_all_gather(self, outputs, scales, dtype, *, out=None):
        values = outputs[0].to(dtype) * scales[0]
        if out is not None:
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(out):
                out.copy_(values)
            return None
        return values, (values,)


def scaled(model: nn.Module) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(Scaled(layer.weight.detach()))
    return model


def float8(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.float8")
    config = torchao.Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    return torchao.convert_to_float8_training(model, config=config)


def precompute(model: nn.Module) -> None:
    for parameter in model.parameters():
        local = getattr(parameter, "_local_tensor", None)
        if isinstance(local, Scaled):
            local._precomputed_scale = local.scale()
        elif local is not None and hasattr(local, "__tensor_flatten__"):
            torchao = pytest.importorskip("torchao.float8")
            return torchao.precompute_float8_dynamic_scale_for_fsdp(model)
    return None


CONVERT = {"scaled": scaled, "float8": float8}


def build(convert: Build, engine: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    torch.manual_seed(0)
    # With biases: gloo has no float8, and FSDP2 gathers tensors of several dtypes as bytes.
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16), nn.LayerNorm(16))
    if state:
        model.load_state_dict(state)
    convert(model)
    if engine == "fsdp2":
        shards = mesh((dist.get_world_size(),), ("shard",))
        fully_shard(model[0], mesh=shards)
        return fully_shard(model, mesh=shards)
    return model


def inner(parameter: Tensor) -> Tensor:
    """The high-precision values of a parameter, whole."""
    if isinstance(parameter, DTensor):
        local = inner(parameter._local_tensor)
        parts = [torch.empty(0)] * dist.get_world_size()
        dist.all_gather_object(parts, local)
        return torch.cat(parts)
    return getattr(parameter, "_tensor", parameter).detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: inner(parameter) for name, parameter in model.named_parameters()}


def batch(seed: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("precomputes", [False, True])
@pytest.mark.parametrize("kind", CONVERT)
def test_weights_in_wrappers_are_averaged_and_shown(kind: str, precomputes: bool, tmp_path: Path):
    model = build(CONVERT[kind], "fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    ema = ShardedEMA(model, 0.5)
    assert (
        ema.nbytes < 4 * (16 * 48 * 2 + 48 + 3 * 16) * 0.6
    )  # the wrappers' scales are not averaged
    oracle = Oracle(weights_of(model), 0.5)

    def step(i: int) -> None:
        model(batch(2 * i + rank())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if precomputes:
            precompute(model)
        assert ema.update()

    for i in range(3):
        step(i)
        oracle.update(weights_of(model))
    check_average(ema, oracle.average)
    live, logits = weights_of(model), model(batch(9)).detach().clone()
    model[0].reshard()
    before = model[0].weight._local_tensor._precomputed_scale
    assert (before is not None) == precomputes
    with ema.average_parameters():
        shown = model(batch(9)).detach().clone()
    same(weights_of(model), live)
    assert model[0].weight._local_tensor._precomputed_scale is before
    same(model(batch(9)).detach(), logits)
    assert not torch.equal(shown, logits)
    state = from_rank_0(ema.gather_state_dict())
    twin = build(CONVERT[kind], "fsdp2", state)
    if precomputes:
        precompute(twin)
    same(shown, twin(batch(9)).detach())

    ema.save(tmp_path / "saved")
    plain = ShardedEMA(build(lambda model: model, "plain"), 0.5)
    plain.load(tmp_path / "saved")
    same(from_rank_0(plain.gather_state_dict()), state)
    step(3)
    ema.copy_to()
    same(weights_of(model), from_rank_0(ema.gather_state_dict()))
    twin = build(CONVERT[kind], "fsdp2", weights_of(model))
    same(model(batch(9)).detach(), twin(batch(9)).detach())  # with a scale of the new weights
    # The last claim: before torch 2.11, FSDP2 does not recover from a backward pass that fails.
    loss = model(batch(0)).square().mean()
    with ema.average_parameters(), pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.ranks(0, 2)
@pytest.mark.parametrize("kind", CONVERT)
def test_wrappers_that_are_not_sharded_are_averaged_and_followed(kind: str):
    net = build(CONVERT[kind], "plain")
    model = DistributedDataParallel(net) if num_ranks() > 1 and kind == "float8" else net
    ema = ShardedEMA(model, 0.5)
    first = weights_of(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    moved = nn.Parameter(CONVERT[kind](nn.Sequential(nn.Linear(48, 16)))[0].weight.detach())
    with torch.no_grad():
        moved.copy_(net[2].weight)
    net[2].weight = moved  # another wrapper, other storage
    ema.update()
    check_average(ema, {name: 1.5 * weight.double() for name, weight in first.items()})
    live, logits = weights_of(net), model(batch(0)).detach()
    with ema.average_parameters():
        same(weights_of(net)["2.weight"], 1.5 * first["2.weight"])
        assert not torch.equal(model(batch(0)), logits)
    same(weights_of(net), live)
    loss = model(batch(0)).square().mean()
    with ema.average_parameters(), pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


class Lazy(Scaled):
    """Reads as other values than those that it holds: a scale that is no tensor."""

    factor = 2.0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(
            cls, lambda t: t._tensor * cls.factor, (args, kwargs or {})
        )
        return cls(args[0] / cls.factor) if func is aten.detach.default else func(*args, **kwargs)


@pytest.mark.ranks(0, 2)
def test_what_a_wrapper_holds_beside_the_weight_is_refused_by_name():
    model = build(scaled, "plain")
    model[0].weight.codebook = torch.arange(4.0)
    with pytest.raises(ValueError, match=r"0\.weight: is a Scaled.*codebook.*params="):
        ShardedEMA(model)
    ema = ShardedEMA(model, params=lambda fqn, parameter: fqn != "0.weight")
    assert ema.update()
    with pytest.raises(ValueError, match=r"0\.weight.*Scaled"):
        ema.gather_state_dict()
    del model[0].weight.codebook
    ema, live = ShardedEMA(model), weights_of(model)
    model[0].weight.cached = torch.ones(2)  # a cache of values, which would be stale in the swap
    with pytest.raises(RuntimeError, match=r"0\.weight.*cached"), ema.average_parameters():
        raise AssertionError("unreachable")
    same(weights_of(model), live)
    model[0].weight = nn.Parameter(Lazy(torch.randn(48, 16)))
    with pytest.raises(ValueError, match=r"0\.weight: is a Lazy"):
        ShardedEMA(model)


@worlds("fsdp2_ep-2", "fsdp2_ep_columns")
def test_the_biases_of_experts_are_averaged_beside_them(world: World, tmp_path: Path):
    net = world.make_net()
    for block in net.blocks:
        block.register_buffer("expert_bias", torch.zeros(block.num_experts))
    training = world.train(net)
    ema = ShardedEMA(training.model, 0.5, buffers=lambda fqn, _: fqn.endswith("expert_bias"))
    oracle = Oracle({n: w for n, w in training.full_weights().items() if n in TRAINABLE}, 0.5)
    for i in range(2):
        training.train_step(i)
        for block in net.blocks:
            block.expert_bias += 1
        assert ema.update()
        oracle.update(training.full_weights())
    check_average(ema, oracle.average)
    averaged, live = torch.full_like(net.blocks[1].expert_bias, 1.25), net.running.clone()
    with ema.average_parameters():
        same(net.blocks[1].expert_bias, averaged)
        same(net.running, live)
    same(net.blocks[1].expert_bias, averaged / 1.25 * 2)
    state = from_rank_0(ema.gather_state_dict())
    same(state["blocks.1.expert_bias"], averaged)
    ema.save(tmp_path / "saved")
    other = world.make_net(seed=1)
    for block in other.blocks:
        block.register_buffer("expert_bias", torch.zeros(block.num_experts))
    alone = ShardedEMA(other, 0.5, buffers=lambda fqn, _: fqn.endswith("expert_bias"))
    alone.load(tmp_path / "saved")
    again = from_rank_0(alone.gather_state_dict())
    same({n: again[n] for n in oracle.average}, {n: state[n] for n in oracle.average})
    same(again["blocks.1.expert_bias"], averaged)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("equal_at_first", [False, True])
def test_experts_as_plain_tensors_are_refused_by_name(equal_at_first: bool, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": nn.Linear(4, 4), "experts": Bank(2, 4, 4)})
    message = r"differ between them: experts\.bias, experts\.weight\.(.|\n)*DTensor.*process_group="

    def train() -> None:
        with torch.no_grad():
            for parameter in model["experts"].parameters():
                parameter += rank() + 1

    if not equal_at_first:
        train()
        with pytest.raises(RuntimeError, match=message):
            ShardedEMA(model, 0.5)
    else:
        ema = ShardedEMA(model, 0.5)
        train()
        assert ema.update()  # communicates nothing, so it cannot know
        live = {n: p.detach().clone() for n, p in model.named_parameters()}
        for call in (
            lambda: ema.average_parameters().__enter__(),
            ema.gather_state_dict,
            ema.gather_tensors,
            ema.copy_to,
            lambda: ema.copy_to(nn.ModuleDict(model)),
            lambda: ema.save(tmp_path / "saved"),
            lambda: ema.export(tmp_path / "out"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        same({n: p.detach() for n, p in model.named_parameters()}, live)
        assert not list(tmp_path.iterdir())
    groups = [dist.new_group([r]) for r in range(2)]
    ema = ShardedEMA(model, 0.5, process_group=groups[rank()])
    before = model["experts"].weight.detach().clone()
    train()
    ema.update()
    found = ema.gather_state_dict()["experts.weight"]
    torch.testing.assert_close(found, before + (rank() + 1) / 2)


def mixture_of_experts(path: Path, fsdp: int, tp: int) -> nn.Module:
    """A tiny model that transformers lays out, with half of the experts on each rank of a pair."""
    pytest.importorskip(
        "transformers", minversion="5.20", reason="no DistributedConfig with ep_size"
    )
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    if rank() == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        config = Qwen3MoeConfig(vocab_size=17, **sizes, **heads, **experts)
        Qwen3MoeForCausalLM(config).save_pretrained(path)
    dist.barrier()
    layout = DistributedConfig(fsdp_size=fsdp, tp_size=tp, ep_size=2)
    return Qwen3MoeForCausalLM.from_pretrained(path, distributed_config=layout)


@pytest.mark.parametrize(("fsdp", "tp", "num_ranks"), [(2, 1, 2), (1, 2, 2), (4, 1, 4)])
def test_experts_that_transformers_distributes(fsdp: int, tp: int, tmp_path: Path):
    model = mixture_of_experts(tmp_path / "hub", fsdp, tp)
    ema = ShardedEMA(model, 0.5)  # before a forward pass, as a trainer does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    tokens = torch.arange(12).view(2, 6) % 17

    def weights() -> dict[str, Tensor]:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        named = {n: p.detach() for n, p in model.named_parameters()}
        return {n: (whole(p) if isinstance(p, DTensor) else p).clone() for n, p in named.items()}

    @torch.no_grad()
    def logits(model: nn.Module) -> Tensor:
        found = model.eval()(input_ids=tokens).logits
        return (found.full_tensor() if isinstance(found, DTensor) else found).clone()

    oracle = Oracle(weights(), 0.5)
    for _ in range(2):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ema.update()
        oracle.update(weights())
    check_average(ema, oracle.average)
    live, before = weights(), logits(model)
    with ema.average_parameters():
        shown = logits(model)
    same(logits(model), before)
    same(weights(), live)
    ema.export(tmp_path / "out")
    ema.save(tmp_path / "saved")
    state = from_rank_0(ema.gather_state_dict())
    plain = type(model).from_pretrained(tmp_path / "out")
    same(dict(plain.state_dict()), state)
    tolerance = 0 if tp == 1 else 1e-6  # tensor parallelism adds in another order
    torch.testing.assert_close(shown, logits(plain), rtol=0, atol=tolerance)
    assert not torch.equal(shown, before)
    other = ShardedEMA(type(model).from_pretrained(tmp_path / "hub"), 0.5)
    other.load(tmp_path / "saved")
    same(from_rank_0(other.gather_state_dict()), state)


class Quantized(torch.Tensor):
    """As torchao's weights: a floating-point tensor whose values are in other tensors."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Quantized:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)
        made.scale = values.abs().amax() / 127
        made.integers = (values / made.scale).round().to(torch.int8)
        return made

    def __init__(self, values: Tensor) -> None:
        super().__init__()

    def __tensor_flatten__(self):
        return ["integers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:
            return args[0]
        if func is aten.t.default:
            return args[0].integers.to(args[0].dtype).mul(args[0].scale).t()
        raise NotImplementedError(func)


def quantized(kind: str) -> nn.Module:
    """A frozen base, of torchao but for "fake", and a trained head."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 256, bias=False)).to(torch.bfloat16).requires_grad_(False)
    weight = base[0].weight.detach()
    if kind == "fake":
        base[0].weight = nn.Parameter(Quantized(weight), requires_grad=False)
    else:
        pytest.importorskip("torchao")
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        if kind == "nf4":
            base[0].weight = nn.Parameter(to_nf4(weight), requires_grad=False)
        else:
            quantize_(base, {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())
    base.requires_grad_(False)
    return nn.ModuleDict({"base": base, "head": nn.Linear(256, 4, dtype=torch.bfloat16).float()})


@pytest.mark.parametrize("kind", ["fake", "int8", "nf4", "fp8"])
@pytest.mark.parametrize(("wrapper", "num_ranks"), [("plain", 0), ("ddp", 2), ("fsdp2", 2)])
def test_a_frozen_quantized_base_costs_nothing_and_is_refused_where_it_is_read(
    kind: str, wrapper: str, tmp_path: Path
):
    model = quantized(kind)
    head = model["head"]
    model["head"] = WRAPPERS[wrapper](head)
    ema = ShardedEMA(model, 0.5)
    assert ema.nbytes <= 4 * (4 * 256 + 4)
    x = torch.randn(2, 64, dtype=torch.bfloat16)

    def logits() -> Tensor:
        return model["head"](model["base"](x).float())

    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    logits().square().mean().backward()
    optimizer.step()
    assert ema.update()
    before = logits().detach().clone()
    with ema.average_parameters():
        assert not torch.equal(logits(), before)
    same(logits().detach(), before)
    ema.save(tmp_path / "saved")
    ema.load(tmp_path / "saved")
    for call in (ema.gather_state_dict, lambda: ema.export(tmp_path / "out")):
        with pytest.raises(ValueError, match=r"base\.0\.weight"):
            call()
    assert not (tmp_path / "out").exists()
    if kind == "fake":
        with pytest.raises(ValueError, match=r"base\.0\.weight.*Quantized.*params="):
            ShardedEMA(model, 0.5, params="all")


class Packing(nn.Linear):
    """A frozen layer that packs its weight for inference, as bitsandbytes does on a CPU."""

    def __init__(self, storage: torch.dtype = torch.uint8) -> None:
        super().__init__(4, 4, bias=False)
        bits = torch.arange(32, dtype=torch.uint8).view(storage)
        self.weight = nn.Parameter(bits[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.weight.shape[1] == 1:
            self.weight.data = self.weight.data.reshape(4, -1).flip(0)
        return x

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.weight.shape[1] > 1:
            self.weight.data = self.weight.data.flip(0).reshape(-1, 1)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = torch.ones(2)


@pytest.mark.ranks(0, 2)
def test_a_frozen_weight_that_is_packed_for_inference_disturbs_nothing(tmp_path: Path):
    net = nn.Sequential(Packing(), nn.Linear(4, 4))
    model = DistributedDataParallel(net) if num_ranks() > 1 else net
    ema = ShardedEMA(model, 0.5)
    wanted = net[0].weight.detach().clone()
    assert ema.update()
    for _ in range(2):
        with ema.average_parameters():
            model.eval()(torch.ones(1, 4))
        assert net[0].weight.shape == (4, 8)
        model.train()
        assert ema.update()
        ema.save(tmp_path / "saved")
        model.eval()(torch.ones(1, 4))
        state = ema.gather_state_dict()
        if rank() == 0:
            same(state["0.weight"], wanted)
            assert "0.weight.absmax" in state
    net[0].weight.requires_grad_(False).data = torch.zeros(2, 2, dtype=torch.uint8)
    assert ema.update()
    net[1].weight.data = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"1\.weight: was shape"):
        ema.update()


class Counting(nn.Linear):
    """A layer with extra state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


@pytest.mark.ranks(0, 2)
def test_extra_state_is_gathered_as_it_is():
    net = nn.Sequential(Counting(2, 2))
    ema = ShardedEMA(net, 0.5)
    state = ema.gather_state_dict()
    assert set(dict(ema.gather_tensors())) == set(state) - {"0._extra_state"}
    if rank() == 0:
        other = nn.Sequential(Counting(2, 2))
        other.load_state_dict(state)
        assert other[0].seen == 3


@pytest.mark.ranks(0, 2)
def test_a_frozen_sparse_weight_is_refused_by_name_only_where_it_is_read():
    net = nn.Linear(2, 2)
    net.table = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    ema = ShardedEMA(net, 0.5)
    assert ema.update()
    with ema.average_parameters():
        pass
    with pytest.raises(ValueError, match="table"):
        ema.gather_state_dict()
    with pytest.raises(ValueError, match="table"):
        ShardedEMA(net, 0.5, params="all")


@pytest.mark.ranks(0, 2)
def test_bits_kept_in_floats_are_gathered_as_they_are_or_refused():
    net = nn.Sequential(Packing(torch.bfloat16), nn.Linear(4, 4))
    ema = ShardedEMA(net, 0.5)
    for call in (ema.gather_state_dict, lambda: dict(ema.gather_tensors())):
        with pytest.raises(ValueError, match=r"0\.weight holds the bits of a quantization.*dtype="):
            call()
    state = ema.gather_state_dict(dtype=torch.bfloat16)
    if rank() == 0:
        found = state["0.weight"].view(torch.uint8)
        same(found, net[0].weight.detach().view(torch.uint8))


def qlora(engine: str, storage: str) -> nn.Module:
    """A tiny Llama with a base in 4 bits of bitsandbytes, and adapters."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=17, max_position_embeddings=16, **sizes, **heads)
    )
    kept: dict[str, Any] = {"quant_type": "nf4", "quant_storage": getattr(torch, storage)}
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            old = getattr(layer.self_attn, name)
            new = Linear4bit(64, 64, bias=False, **kept)
            new.weight = Params4bit(old.weight.data, requires_grad=False, module=new, **kept)
            setattr(layer.self_attn, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    if engine == "ddp":
        return DistributedDataParallel(model)
    if engine.startswith("fsdp2"):
        options: dict[str, Any] = {"mesh": mesh((dist.get_world_size(),), ("shard",))}
        if engine == "fsdp2_ignored":
            frozen = {p for p in model.parameters() if not p.requires_grad}
            options["ignored_params"] = frozen
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, **options)
        return fully_shard(model, **options)
    return model


QLORA = [("plain", 0), ("ddp", 2), ("fsdp2", 2), ("fsdp2_ignored", 2)]


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize(("engine", "num_ranks"), QLORA)
def test_qlora_trains_swaps_saves_and_exports_its_adapter(
    engine: str, storage: str, tmp_path: Path
):
    model = qlora(engine, storage)
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ema = ShardedEMA(model, 0.5)
    tokens = torch.arange(12).view(2, 6) % 17
    oracle = Oracle(adapters(trained), 0.5)
    for _ in range(2):
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ema.update()
        oracle.update(adapters(trained))
        # bitsandbytes on a CPU packs a weight in eval mode, and finds another after FSDP2's gather.
        model.train(engine == "fsdp2")
        with torch.no_grad():
            before = model(input_ids=tokens).logits.clone()
            live = adapters(trained)
            with ema.average_parameters():
                shown = model(input_ids=tokens).logits.clone()
            same(model(input_ids=tokens).logits, before)
        same(adapters(trained), live)
        assert not torch.equal(shown, before)

    ema.save(tmp_path / "saved")
    ema.export(tmp_path / "out")
    if storage == "uint8":
        check_average(ema, oracle.average)
    else:
        with pytest.raises(ValueError, match=r"q_proj.*holds the bits of a quantization"):
            ema.gather_state_dict()
    state = ema.gather_state_dict(dtype=None if storage == "uint8" else torch.bfloat16)
    other = ShardedEMA(qlora("plain", storage), 0.5)
    base = other.model.state_dict()
    other.load(tmp_path / "saved")
    again = other.gather_state_dict(dtype=None if storage == "uint8" else torch.bfloat16)
    if rank() == 0:
        kept = [n for n in base if n.endswith(("q_proj.base_layer.weight", "k_proj.weight"))]
        same({n: bits(state[n]) for n in kept}, {n: bits(base[n]) for n in kept})
        same({n: again[n] for n in trained}, {n: state[n] for n in trained})
        # Under FSDP2, bitsandbytes leaves the state of the quantization out of `state_dict()`.
        assert (base.keys() - state.keys() == set()) == (engine != "fsdp2")
        file = {
            n: t.to(state[next(iter(trained))].dtype) for n, t in written(tmp_path / "out").items()
        }
        same(file, {n.replace(".default", ""): state[n] for n in trained})


def adapters(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in trained.items()
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
