"""The update in one pass on an accelerator, where averages and live values differ in dtype.

torch has no operator that reads bf16 and updates fp32. This Triton kernel reads and writes each
value once, and one launch updates all tensors: a table on the device has their addresses. Triton
comes with torch for CUDA, ROCm and XPU. Checked with Triton 3.4 to 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

_BLOCK = 8192  # elements that one instance of the kernel updates, with this number of warps
_NUM_WARPS = 8
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _lerp(  # type: ignore[no-untyped-def]
    table,
    weight,
    average_dtype: tl.constexpr,
    live_dtype: tl.constexpr,
    block: tl.constexpr,
):
    row = table + 3 * tl.program_id(0)
    offsets = tl.arange(0, block)
    mask = offsets < tl.load(row + 2)
    averages = tl.load(row).to(tl.pointer_type(average_dtype)) + offsets
    lives = tl.load(row + 1).to(tl.pointer_type(live_dtype)) + offsets
    average = tl.load(averages, mask).to(tl.float32)
    live = tl.load(lives, mask).to(tl.float32)
    # As in `torch.lerp`, the first below a weight of 0.5 and the second from there on.
    near_average = average + weight * (live - average)
    near_live = live - (1 - weight) * (live - average)
    value = tl.where(weight < 0.5, near_average, near_live)
    tl.store(averages, value.to(average_dtype), mask)


def fused_lerp(
    averages: Sequence[torch.Tensor], lives: Sequence[torch.Tensor]
) -> Callable[[float], None]:
    """A function of the weight that updates 1-D tensors: one launch, no allocation, no host sync.

    Compiles the kernel for these dtypes if it is not in Triton's cache: about a second.

    Args:
        averages: of one dtype of `DTYPES`, on one device.
        lives: of another one, on the same device.

    Raises:
        RuntimeError: the kernel computes something else than torch does on this device.
        Exception: it cannot be compiled.
    """
    device, kind = lives[0].device, averages[0].dtype
    values = torch.linspace(-3, 5, 2 * _BLOCK + 1, device=device)
    average, live = values.to(kind), values.flip(0).to(lives[0].dtype)
    precision = 4 * torch.finfo(kind).eps
    for weight in (0.3, 0.9):
        wanted = torch.lerp(average.float(), live.float(), weight).to(kind)
        _launcher([average], [live])(weight)
        if not torch.allclose(average, wanted, rtol=precision, atol=precision):
            raise RuntimeError(f"Triton gives wrong values for {kind} and {live.dtype} on {device}")
    return _launcher(averages, lives)


def _launcher(
    averages: Sequence[torch.Tensor], lives: Sequence[torch.Tensor]
) -> Callable[[float], None]:
    rows = []
    for average, live in zip(averages, lives, strict=True):
        starts = torch.arange(0, live.numel(), _BLOCK, device="cpu")
        addresses = [t.data_ptr() + starts * t.itemsize for t in (average, live)]
        rows.append(torch.stack([*addresses, (live.numel() - starts).clamp(max=_BLOCK)], 1))
    device = lives[0].device
    table = torch.cat(rows).to(device)
    dtypes = DTYPES[averages[0].dtype], DTYPES[lives[0].dtype]
    on_device = getattr(torch.get_device_module(device), "device", nullcontext)

    def launch(weight: float) -> None:
        with on_device(device):  # Triton launches on the current one
            _lerp[len(table),](table, weight, *dtypes, _BLOCK, num_warps=_NUM_WARPS)

    return launch
