"""Made-up averages, cut in every way that an engine may cut them, saved and read without one.

The oracle is the full tensor: a part holds the slice of it that its box says, in its storage order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoint.background import Handle
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, Fragment, FragmentMeta, TensorMeta, flat_boxes

SHAPES: dict[str, tuple[int, ...]] = {
    "emb.weight": (13, 6),
    "conv.weight": (4, 3, 3, 2),
    "scale": (),
    "empty": (0, 3),
    "bias": (1,),
    "norm.weight": (7,),
    "cube": (3, 2, 5),
}
ALIASES = {"emb.weight": ("head.weight",)}
CHANNELS_LAST = (0, 2, 3, 1)


def infos(
    shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
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


Cut = list[tuple[str, Box, tuple[int, ...] | None]]


def rows(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """As `fully_shard` and torch's `chunk` cut: even but for the last ones, which may be empty."""
    return list(_along(tensors, rank, size, lambda shape: 0))


def columns(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    return list(_along(tensors, rank, size, lambda shape: len(shape) - 1))


def _along(tensors: Sequence[TensorMeta], rank: int, size: int, dim_of: Any) -> Iterator[Any]:
    for t in tensors:
        if not t.shape:
            if rank == 0:
                yield t.fqn, Box((), ()), None
            continue
        dim = dim_of(t.shape)
        n = -(-t.shape[dim] // size)
        start, stop = min(rank * n, t.shape[dim]), min((rank + 1) * n, t.shape[dim])
        offsets, sizes = [0] * len(t.shape), list(t.shape)
        offsets[dim], sizes[dim] = start, stop - start
        yield t.fqn, Box(tuple(offsets), tuple(sizes)), None


def grid(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """Rows by columns where the number of ranks and the tensor's dims allow."""
    across = 2 if size % 2 == 0 else 1
    cut: Cut = []
    for t in tensors:
        if len(t.shape) < 2:
            cut += rows([t], rank, size)
            continue
        [(_, outer, _)] = rows([t], rank // across, size // across)
        [(_, inner, _)] = columns([t], rank % across, across)
        offsets, sizes = list(inner.offsets), list(inner.sizes)
        offsets[0], sizes[0] = outer.offsets[0], outer.sizes[0]
        cut.append((t.fqn, Box(tuple(offsets), tuple(sizes)), None))
    return cut


def flat(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """A range of all tensors laid end to end, as ZeRO and FSDP1 cut."""
    total = sum(math.prod(t.shape) for t in tensors)
    start, stop = total * rank // size, total * (rank + 1) // size
    cut: Cut = []
    at = 0
    for t in tensors:
        n = math.prod(t.shape)
        boxes = flat_boxes(t.shape, max(0, start - at), min(n, stop - at))
        cut += [(t.fqn, box, None) for box in boxes]
        at += n
    return cut


def last(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """All on the last rank, nothing on the others; images channels-last."""
    if rank != size - 1:
        return []
    return [
        (
            t.fqn,
            Box((0,) * len(t.shape), t.shape),
            CHANNELS_LAST if len(t.shape) == 4 else None,
        )
        for t in tensors
    ]


def crumbs(tensors: Sequence[TensorMeta], rank: int, size: int) -> Cut:
    """Single elements, dealt out like cards."""
    cut: Cut = []
    for t in tensors:
        places = itertools.product(*map(range, t.shape))
        cut += [
            (t.fqn, Box(place, (1,) * len(place)), None)
            for place in itertools.islice(places, rank, None, size)
        ]
    return cut


CUTS = {f.__name__: f for f in (rows, columns, grid, flat, last, crumbs)}


def parts_of(
    cut: str, tensors: Sequence[TensorMeta], values: dict[str, Tensor], ranks: Group
) -> list[Fragment]:
    """What a rank holds of some full tensors."""
    shapes = {t.fqn: t.shape for t in tensors}
    parts = []
    for fqn, box, order in CUTS[cut](tensors, ranks.rank, ranks.size):
        if box.numel:
            here = values[fqn][
                tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            ]
            here = here if order is None else here.permute(order)
            run = here.reshape(-1).clone()
            parts.append(Fragment(FragmentMeta(fqn, shapes[fqn], box, order), run))
    return parts


def blank(cut: str, tensors: Sequence[TensorMeta], ranks: Group) -> list[Fragment]:
    """The same, holding numbers that no average has."""
    return parts_of(cut, tensors, {t.fqn: _filled(t) for t in tensors}, ranks)


def _filled(info: TensorMeta) -> Tensor:
    return torch.full(info.shape, -77.0, dtype=info.dtype)


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


SEVERAL_BLOCKS = {"wide": (1100, 2300), "tall": (2300, 1100), "small": (3,)}


def write(
    path: Path, ranks: Group, *, cut: str = "flat", seed: int = 0, **options: Any
) -> Handle | None:
    """Save one average of made-up tensors."""
    parts = parts_of(cut, TENSORS, full(TENSORS, seed), ranks)
    return save(path, {"ema": parts}, TENSORS, state_of(step=seed), ranks, **options)


def seed_at(path: Path, ranks: Group, *, cut: str = "rows") -> int:
    """Load what `write` wrote, check every bit of it, and tell which it was."""
    parts = blank(cut, TENSORS, ranks)
    state = load(path, {"ema": parts}, TENSORS, ranks)
    wrong = differing(parts, parts_of(cut, TENSORS, full(TENSORS, state["step"]), ranks))
    assert not wrong, wrong
    return state["step"]


def beside(path: Path) -> list[str]:
    """What stands in the directory of a path, hidden or not."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name)


def broken_parts(ranks: Group) -> list[Fragment]:
    """Parts with NaN on the first rank that has some, Inf on the last."""
    parts = parts_of("flat", TENSORS, full(TENSORS), ranks)
    for part in parts:
        if part.meta.fqn == "emb.weight" and ranks.rank == 0:
            part.view[-1] = torch.nan
        if part.meta.fqn == "cube" and ranks.rank == ranks.size - 1:
            part.view[0] = -torch.inf
    return parts


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
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if key in line
        )
        return int(line.split()[1]) * 1024
