"""Many small weights are updated together, to the bit as each would be by itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_ema import EqualWeight, ShardedEMA, Warmup, merge
from dist_ema.core import lerp
from dist_ema.schedule import Schedule
from tests.test_cost import Counted
from tests.worlds import mesh

SIZES = [3000, 1, 300, 4097, 17, 256, 5000, 2, 3, 0, 64] + 40 * [2800]
QUIET = pytest.mark.filterwarnings("ignore:the average is kept in", "ignore:the live weights are")


def weights(dtype: torch.dtype, sizes: list[int] = SIZES) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(size, dtype=dtype)) for size in sizes)


@QUIET
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_each_weight_is_averaged_as_by_itself(dtype: torch.dtype, kept: torch.dtype):
    model, decays = weights(dtype), {"fast": 0.5, "slow": 0.99}
    ema = ShardedEMA(model, decays, dtype=kept)
    narrow = torch.complex64 if dtype.is_complex else kept
    oracle = {name: [p.detach().to(narrow, copy=True) for p in model] for name in decays}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model:
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        for name, decay in decays.items():
            for average, parameter in zip(oracle[name], model, strict=True):
                wide = torch.complex64 if dtype.is_complex else torch.float32
                live = parameter.detach().to(wide)
                average.copy_(average.to(wide).lerp_(live, 1.0 - decay))
    for name in decays:
        found = ema.gather_state_dict(name)
        for i, average in enumerate(oracle[name]):
            assert torch.equal(found[str(i)].to(narrow), average), (name, SIZES[i])


def test_a_weight_that_overflows_or_moves_leaves_its_neighbours_alone():
    model = weights(torch.float32, [5, 3, 700, 3])
    ema = ShardedEMA(model, EqualWeight())
    with torch.no_grad():
        model[1].fill_(float("inf"))
        model[3].fill_(float("nan"))
    ema.update()
    found = ema.gather_state_dict()
    assert torch.isinf(found["1"]).all() and torch.isnan(found["3"]).all()
    assert torch.isfinite(found["0"]).all() and torch.isfinite(found["2"]).all()
    model[2].data = torch.ones(700)  # other storage
    ema.reset()
    with torch.no_grad():
        model[2].fill_(2.0)
    ema.update()  # copies
    ema.update()
    assert torch.equal(ema.gather_state_dict()["2"], torch.full((700,), 2.0))


@pytest.mark.parametrize(
    "decay",
    [0.5, Warmup(0.9999), EqualWeight(), lambda t, delta: (0.1 * t) ** delta],
    ids=["constant", "warmup", "equal weight", "function"],
)
def test_a_compiled_training_step_updates_as_an_eager_one(decay: float | Schedule):
    """A compiler would keep the decays, the counters and the addresses of the first steps."""
    model = weights(torch.float32, [*8 * [30], 5000])
    ema, eager = ShardedEMA(model, decay, update_every=2), ShardedEMA(model, decay, update_every=2)

    def step() -> bool:
        with torch.no_grad():
            torch._foreach_mul_(list(model), 1.5)
        return ema.update()

    compiled = torch.compile(step, backend="eager")
    for number in range(8):
        if number == 5:
            model[8].data, model[2].data = torch.ones(5000), torch.ones(30)  # other storage
        assert compiled() == eager.update()
        assert (ema.step, ema.num_updates) == (eager.step, eager.num_updates)
    found, wanted = ema.gather_state_dict(), eager.gather_state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gathered", [False, True])
def test_a_shard_that_moves_is_noticed_whether_or_not_the_weights_are_gathered(gathered: bool):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=mesh((2,), ("shard",)))
    shards = dict(model.named_parameters())
    ema = ShardedEMA(model, 0.5)
    if gathered:
        model.unshard()
    ema.update()
    with torch.no_grad():
        before = {name: shard.to_local().clone() for name, shard in shards.items()}
        shards["0.weight"]._local_tensor.data = torch.full((2, 6), 3.0)  # other storage
        shards["1.bias"].add_(2.0)
        ema.update()
        average = ema._average
        for fragment, value in zip(average.plan.fragments, average.storage.values[0], strict=True):
            name = fragment.meta.fqn
            wanted = before[name].lerp(shards[name]._local_tensor, 0.5).flatten()
            torch.testing.assert_close(value, wanted)


@QUIET
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hundreds_of_weights_take_a_few_operators(dtype: torch.dtype):
    model = weights(dtype, 384 * [80])
    ema = ShardedEMA(model, 0.9)
    ema.update()
    with Counted() as counted:
        ema.update()
    assert len([name for name in counted.operators if name.startswith("aten.")]) <= 4


class LargestOperand(TorchDispatchMode):
    """The most elements of a tensor that an operator was given, to read or to write."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors)])
        return func(*args, **(kwargs or {}))


@QUIET
@pytest.mark.parametrize("decay", [0.9, {"fast": 0.5, "slow": 0.99}])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_wake_no_thread_pool(dtype: torch.dtype, kept: torch.dtype, decay: Any):
    ema = ShardedEMA(weights(dtype, 60 * [3000, 20, 300, 9000, 1]), decay, dtype=kept)
    with LargestOperand() as largest:
        ema.update()
    assert 9000 <= largest.numel < 1 << 15  # torch's GRAIN_SIZE


@QUIET
def test_the_default_device_is_not_asked():
    model = weights(torch.bfloat16)
    with torch.device("meta"):
        ema = ShardedEMA(model, 0.9)
        ema.update()
    assert all(value.device.type == "cpu" for value in ema.gather_state_dict().values())


def test_a_function_is_given_every_element_once():
    model, seen = weights(torch.float32), []

    def multi_avg_fn(averages: list[Tensor], lives: list[Tensor], num_averaged: int) -> None:
        seen.append(sum(tensor.numel() for tensor in lives))
        torch._foreach_copy_(averages, lives)

    ema = ShardedEMA(model, multi_avg_fn=multi_avg_fn)
    ema.update()
    with torch.no_grad():
        for parameter in model:
            parameter.zero_()
    ema.update()
    assert sum(SIZES) <= sum(seen) < sum(SIZES) + 4 * len(SIZES)
    assert all(not value.any() for value in ema.gather_state_dict().values())


ODD = {
    "one element of a row": lambda: torch.randn(1, 5)[:, 0],
    "conjugate": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negative": lambda: torch._neg_view(torch.randn(4)),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_small_weights_that_are_odd_views_are_averaged(make):
    odd = nn.Parameter(make())
    model = nn.ParameterList([odd, nn.Parameter(torch.randn(3).to(odd.dtype))])
    wanted = [p.detach().resolve_conj().resolve_neg().clone() for p in model]
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model:
            parameter.add_(1)
    ema.update()
    for value, tensor in zip(wanted, ema.gather_state_dict().values(), strict=True):
        torch.testing.assert_close(tensor.resolve_conj().resolve_neg(), value + 0.5)


def test_live_storage_can_still_be_resized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = ShardedEMA(model)
    ema.update()
    model[0].weight.untyped_storage().resize_(64)


def test_streams_end_before_the_memory_that_they_use():
    ended = []

    class Ending:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            ended.append(self.name)

    lerp._Track(streams=Ending("streams"), batches=Ending("batches"))
    assert ended == ["streams", "batches"]


def test_a_default_device_changes_nothing(tmp_path: Path):
    with torch.device("meta"):
        model = nn.Linear(3, 2, device="cpu")
        ema = ShardedEMA(model, 0.5)
        ema.update()
        ema.save(tmp_path / "saved")
        ema.load(tmp_path / "saved")
        ema.export(tmp_path / "exported")
        merge([tmp_path / "saved", tmp_path / "exported"], tmp_path / "merged")
        with ema.average_parameters():
            assert ema.model.weight.device.type == "cpu"
        assert ema.drift() == 0 and ema.save(tmp_path / "b", asynchronous=True).result() is None
        assert {t.device.type for t in ema.gather_state_dict().values()} == {"cpu"}
        ema.copy_to(nn.Linear(3, 2, device="cpu"))


FUSED = """
import torch
from dist_ema.core import fused, lerp

KINDS = [torch.float32, torch.bfloat16, torch.float16]
torch.manual_seed(0)
sizes = [1, 7, fused._BLOCK, fused._BLOCK + 1, 3 * fused._BLOCK]
lerp.is_accelerator = lambda device: True
for kept in KINDS:
    for kind in KINDS:
        rows = list(torch.randn(2, sum(sizes) + 2).to(kept))
        lives = list(torch.randn(sum(sizes)).to(kind).split(sizes))
        averages = [list(row[1:-1].split(sizes)) for row in rows]
        update, decays = lerp.Lerp(averages, lives), (0.9, 0.25)
        assert any(isinstance(b, lerp._FusedBatch) for t in update._tracks for b in t.batches) == (
            kept != kind
        )
        edges = [row[[0, -1]] for row in rows]
        for _ in range(3):
            wanted = [
                [(d * a.double() + (1 - d) * x.double()) for a, x in zip(of_one, lives)]
                for d, of_one in zip(decays, averages)
            ]
            update.update(decays)
            precision = 4 * torch.finfo(kept).eps
            for of_one, exact in zip(averages, wanted):
                for a, e in zip(of_one, exact):
                    torch.testing.assert_close(a.double(), e, rtol=precision, atol=precision)
        assert all(torch.equal(row[[0, -1]], edge) for row, edge in zip(rows, edges))
        update.update((0.0, 1.0))
        before = [a.clone() for a in averages[1]]
        assert all(torch.equal(a, x.to(kept)) for a, x in zip(averages[0], lives))
        update.apply(lambda a, x, n: torch._foreach_lerp_(a, x, 0.5), 3)
        for a, b, x in zip(averages[1], before, lives):
            assert torch.equal(a, b.float().lerp(x.float(), 0.5).to(kept))
"""
COMPILED = """
from dist_ema.core import fused
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

names = fused._lerp.arg_names
for kept, kind in [(tl.float32, tl.bfloat16), (tl.bfloat16, tl.float16)]:
    types = dict.fromkeys(names, "constexpr") | {"table": "*i64", "weight": "fp32"}
    values = {(i,): value for i, value in enumerate([kept, kind, fused._BLOCK], 2)}
    source = ASTSource(fn=fused._lerp, signature=types, constexprs=values)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton here")
@pytest.mark.parametrize(("script", "interprets"), [(FUSED, "1"), (COMPILED, "0")])
def test_one_kernel_averages_weights_of_another_dtype(script: str, interprets: str, tmp_path: Path):
    """As Triton's interpreter runs it on the CPU; and its compiler takes it for a GPU."""
    variables = {"TRITON_INTERPRET": interprets, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
