"""Many small weights are updated together, to the bit as each would be by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_ema import EqualWeight, ShardedEMA
from tests.test_cost import Counted

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
