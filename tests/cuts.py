"""Made-up averages, cut in every way that an engine may cut them, saved and read without one.

The oracle is the full tensor: a part holds the slice of it that its box says, in its storage order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoint.background import Handle
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, Fragment, FragmentMeta, TensorMeta, flat_boxes, whole
from tests.worlds import barrier, rank

Shape = tuple[int, ...]
Cut = Iterator[tuple[str, Box]]

SHAPES: dict[str, Shape] = {
    "emb.weight": (13, 6),
    "conv.weight": (4, 3, 3, 2),
    "scale": (),
    "empty": (0, 3),
    "bias": (1,),
    "norm.weight": (7,),
    "cube": (3, 2, 5),
}
SEVERAL_BLOCKS = {"wide": (1100, 2300), "tall": (2300, 1100), "small": (3,)}
ALIASES = {"emb.weight": ("head.weight",)}
CHANNELS_LAST = (0, 2, 3, 1)


def infos(
    shapes: dict[str, Shape] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[TensorMeta]:
    return [TensorMeta(fqn, ALIASES.get(fqn, ()), shape, dtype) for fqn, shape in shapes.items()]


TENSORS = infos()


def full(tensors: Sequence[TensorMeta], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        t.fqn: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in tensors
    }


def state_of(names: Sequence[str] = ("ema",), step: int = 7) -> dict[str, Any]:
    schedule = {"kind": "Constant", "decay": 0.5}
    return {
        "step": step,
        "num_updates": step,
        "averages": {name: {"schedule": schedule, "decay": 0.5} for name in names},
    }


def chunked(dims: Callable[[int, int, int], list[tuple[int, int, int]]]) -> Callable[..., Cut]:
    """A cut that gives (dim, index, count) for a number of dims, a rank and a number of ranks.

    As torch's `chunk`: the last chunks are smaller or empty. Rank 0 has the scalars.
    """

    def cut(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
        for t in tensors:
            offsets, sizes = [0] * len(t.shape), list(t.shape)
            for dim, index, count in dims(len(t.shape), rank, size) if t.shape else ():
                n = -(-t.shape[dim] // count)
                offsets[dim] = min(index * n, t.shape[dim])
                sizes[dim] = min(n, t.shape[dim] - offsets[dim])
            if t.shape or rank == 0:
                yield t.fqn, Box(tuple(offsets), tuple(sizes))

    return cut


def flat(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """A range of all tensors laid end to end, as ZeRO and FSDP1 cut."""
    total = sum(math.prod(t.shape) for t in tensors)
    start, stop = total * rank // size, total * (rank + 1) // size
    for t in tensors:
        n = math.prod(t.shape)
        yield from ((t.fqn, box) for box in flat_boxes(t.shape, max(0, start), min(n, stop)))
        start, stop = start - n, stop - n


def crumbs(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """Single elements, dealt out like cards."""
    for t in tensors:
        places = itertools.product(*map(range, t.shape))
        for place in itertools.islice(places, rank, None, size):
            yield t.fqn, Box(place, (1,) * len(place))


CUTS: dict[str, Callable[..., Cut]] = {
    "rows": chunked(lambda dims, rank, size: [(0, rank, size)]),
    "columns": chunked(lambda dims, rank, size: [(-1, rank, size)]),
    "grid": chunked(
        lambda dims, rank, size: (
            [(0, rank, size)]
            if dims < 2 or size % 2
            else [(0, rank // 2, size // 2), (-1, rank % 2, 2)]
        )
    ),
    "flat": flat,
    # All on the last rank, nothing on the others; images channels-last.
    "last": lambda tensors, rank, size: (
        (t.fqn, whole(t.shape)) for t in tensors if rank == size - 1
    ),
    "crumbs": crumbs,
}


def parts_of(
    cut: str, tensors: Sequence[TensorMeta], values: dict[str, Tensor], ranks: Group
) -> list[Fragment]:
    """What a rank holds of some full tensors."""
    shapes = {t.fqn: t.shape for t in tensors}
    parts = []
    for fqn, box in CUTS[cut](tensors, ranks.rank, ranks.size):
        if box.numel:
            here = values[fqn][box.within(whole(shapes[fqn]))]
            order = CHANNELS_LAST if cut == "last" and here.dim() == 4 else None
            run = (here if order is None else here.permute(order)).reshape(-1).clone()
            parts.append(Fragment(FragmentMeta(fqn, shapes[fqn], box, order), run))
    return parts


def blank(cut: str, tensors: Sequence[TensorMeta], ranks: Group) -> list[Fragment]:
    """The same, holding numbers that no average has."""
    values = {t.fqn: torch.full(t.shape, -77.0, dtype=t.dtype) for t in tensors}
    return parts_of(cut, tensors, values, ranks)


def differing(parts: Sequence[Fragment], expected: Sequence[Fragment]) -> list[str]:
    """Names of tensors in which two lists of parts are not the same bits."""
    return [
        a.meta.fqn
        for a, b in zip(parts, expected, strict=True)
        if not torch.equal(a.view.view(torch.uint8), b.view.view(torch.uint8))
    ]


@functools.cache
def first_ranks(size: int) -> Group | None:
    """The first ranks of the world as a world of their own; None on the others. Collective."""
    if size == 1:
        return Group.alone() if not dist.is_initialized() or dist.get_rank() == 0 else None
    if size == dist.get_world_size():
        return Group()
    group = dist.new_group(list(range(size)))
    return Group(group) if dist.get_rank() < size else None


def write(
    path: Path,
    ranks: Group | None = None,
    *,
    cut: str = "flat",
    seed: int = 0,
    tensors: Sequence[TensorMeta] = TENSORS,
    names: Sequence[str] = ("ema",),
    **options: Any,
) -> Handle | None:
    """Save averages of made-up tensors, by all ranks if not by some."""
    ranks = ranks or Group()
    averages = {
        name: parts_of(cut, tensors, full(tensors, seed + i), ranks) for i, name in enumerate(names)
    }
    return save(path, averages, tensors, state_of(names, seed), ranks, **options)


def seed_at(
    path: Path,
    ranks: Group | None = None,
    *,
    cut: str = "rows",
    tensors: Sequence[TensorMeta] = TENSORS,
    names: Sequence[str] = ("ema",),
) -> int:
    """Load what `write` wrote, check every bit of it, and tell which it was."""
    ranks = ranks or Group()
    averages = {name: blank(cut, tensors, ranks) for name in names}
    state = load(path, averages, tensors, ranks)
    assert state == state_of(names, state["step"])
    for i, parts in enumerate(averages.values()):
        expected = parts_of(cut, tensors, full(tensors, state["step"] + i), ranks)
        wrong = differing(parts, expected)
        assert not wrong, (path, cut, ranks.size, wrong)
    return state["step"]


def beside(path: Path) -> list[str]:
    """What stands in the directory of a path, hidden or not."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name)


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system in a new directory. Collective; skips where none can be mounted."""
    if rank() == 0:
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        subprocess.run(mount, capture_output=True, check=False)
    barrier()
    if not path.is_mount():
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        barrier()
        if rank() == 0:
            subprocess.run(["umount", "-l", str(path)], check=True)


class PeakMemory:
    """How far the resident memory rose above where it was, within a block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")
        return lambda: self._read("VmHWM") - self._before

    def __exit__(self, *raised: object) -> None:
        pass

    @staticmethod
    def _read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if key in line).split()[1]) * 1024
