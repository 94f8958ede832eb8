"""Boxes and fragments of tensors, independent of the engine.

[Note: terms]
    fqn           canonical name of a weight, without prefixes of wrappers
    box           offsets and sizes in the global tensor, one number per dim
    flat range    [start, stop) in row-major order
    fragment      a box, with a contiguous 1-D view of the storage that holds it
    view          the storage that the optimizer writes (the fp32 master where there is one)
    forward_view  the storage that the forward pass reads (`view`, or a low-precision copy of it)
    holders       the ranks that hold an equal fragment (replicas); the first of them is the owner
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the command line reads checkpoints without it
    import torch

Shape = tuple[int, ...]


class Box(NamedTuple):
    """An axis-aligned range of a global tensor."""

    offsets: Shape  # one per tensor dim
    sizes: Shape  # one per tensor dim; all of them > 0 in a fragment

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds `outer`."""
        return tuple(
            slice(o - base, o - base + s)
            for o, base, s in zip(self.offsets, outer.offsets, self.sizes, strict=True)
        )


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def overlap(a: Box, b: Box) -> Box | None:
    """The intersection of two boxes of one tensor, or None. 0-d boxes are always equal."""
    offsets, sizes = [], []
    for ao, asz, bo, bsz in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True):
        start, stop = max(ao, bo), min(ao + asz, bo + bsz)
        if start >= stop:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return Box(tuple(offsets), tuple(sizes))


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that a flat range of a row-major tensor consists of, in order.

    Each box is contiguous in the range, so a 1-D buffer that holds the range splits into views of
    the boxes. At most max(1, 2 * ndim - 1) boxes.
    """
    if start >= stop:
        return []
    ndim = len(shape)
    if ndim == 0:
        return [Box((), ())]
    if ndim == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    (first, lead), (last, tail) = divmod(start, row), divmod(stop, row)

    def part_of_row(index: int, begin: int, end: int) -> list[Box]:
        return [
            Box((index, *inner.offsets), (1, *inner.sizes))
            for inner in flat_boxes(shape[1:], begin, end)
        ]

    if first == last:
        return part_of_row(first, lead, tail)
    boxes = []
    if lead:
        boxes += part_of_row(first, lead, row)
        first += 1
    if last > first:
        boxes.append(Box((first,) + (0,) * (ndim - 1), (last - first, *shape[1:])))
    if tail:
        boxes += part_of_row(last, 0, tail)
    return boxes


def flat_ends(inner: Box, outer: Box) -> tuple[int, int]:
    """Row-major indices, within `outer`, of the first and last element of `inner`."""
    first = last = 0
    for offset, size, base, length in zip(
        inner.offsets, inner.sizes, outer.offsets, outer.sizes, strict=True
    ):
        first = first * length + offset - base
        last = last * length + offset - base + size - 1
    return first, last


def uncovered(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """Why boxes, each within the shape, are not a partition of it; None if they are.

    Takes n log n steps for n boxes along one dim, and n ** 1.5 for a square grid.
    """
    nonempty = [box for box in boxes if box.numel]
    pair = _overlapping(nonempty)
    if pair is not None:
        return f"boxes at {pair[0].offsets} and {pair[1].offsets} overlap"
    covered, wanted = sum(box.numel for box in nonempty), math.prod(shape)
    return None if covered == wanted else f"boxes hold {covered} of {wanted} elements"


def _overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that overlap, by a sweep along the dim where the fewest boxes are active."""
    if len(boxes) < 2:
        return None
    if not boxes[0].offsets:
        return boxes[0], boxes[1]  # 0-d
    dim = min(range(len(boxes[0].offsets)), key=lambda d: _most_active(boxes, d))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offsets[dim]):
        start = box.offsets[dim]
        active = [other for other in active if other.offsets[dim] + other.sizes[dim] > start]
        for other in active:
            if overlap(box, other) is not None:
                return other, box
        active.append(box)
    return None


def _most_active(boxes: Sequence[Box], dim: int) -> int:
    """The largest number of boxes at one index along a dim."""
    starts = sorted([box.offsets[dim] for box in boxes])
    ends = sorted([box.offsets[dim] + box.sizes[dim] for box in boxes])
    most = ended = 0
    for begun, start in enumerate(starts, 1):
        while ends[ended] <= start:
            ended += 1
        most = max(most, begun - ended)
    return most


class FragmentMeta(NamedTuple):
    """The tensor and box that contiguous elements belong to, and their order in storage.

    `order` lists the tensor dims from outermost to innermost in storage. `None` means row-major;
    a channels-last weight has (0, 2, 3, 1).
    """

    fqn: str
    shape: Shape  # of the whole tensor
    box: Box
    order: Shape | None = None

    @property
    def numel(self) -> int:
        return self.box.numel

    def slices(self, start: int, stop: int) -> Iterator[tuple[int, FragmentMeta]]:
        """Metas of elements [start, stop), each with the element where it starts."""
        if start <= 0 and stop >= self.numel:
            yield 0, self
            return
        order = self.order or tuple(range(len(self.shape)))
        at = start
        for part in flat_boxes([self.box.sizes[d] for d in order], start, stop):
            offsets, sizes = list(self.box.offsets), list(self.box.sizes)
            for i, dim in enumerate(order):
                offsets[dim] += part.offsets[i]
                sizes[dim] = part.sizes[i]
            yield at, self._replace(box=Box(tuple(offsets), tuple(sizes)))
            at += part.numel

    def unflatten(self, values: torch.Tensor) -> torch.Tensor:
        """View 1-D values as a tensor of the box's sizes."""
        if self.order is None:
            return values.view(self.box.sizes)
        permuted = values.view([self.box.sizes[d] for d in self.order])
        return permuted.permute(sorted(range(len(self.order)), key=self.order.__getitem__))


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A tensor of the model or of an average, the same on every rank."""

    fqn: str
    aliases: tuple[str, ...]  # further names of a tied tensor
    shape: Shape
    dtype: torch.dtype  # of the average, or of the live tensor where nothing is averaged
    averaged: bool = True
    problem: str | None = None  # why its values cannot be read

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def dtype_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype in which the tensor is gathered and exported.

        A floating-point tensor is converted to `wanted`. If that is None, half precision becomes
        fp32, so that the state dict has one floating-point dtype, and others keep their dtype.
        """
        import torch

        if not self.dtype.is_floating_point:
            return self.dtype
        if wanted is not None:
            return wanted
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """A contiguous run of a weight's elements, or of their average, and its storage here."""

    meta: FragmentMeta
    view: torch.Tensor  # 1-D, contiguous: what the optimizer writes, or the averaged values
    forward_view: torch.Tensor = None  # type: ignore[assignment]  # `view` if not given
    is_owner: bool = True  # whether this rank's values are the ones that are gathered and saved

    def __post_init__(self) -> None:
        if self.forward_view is None:
            object.__setattr__(self, "forward_view", self.view)
        for tensor in (self.view, self.forward_view):
            if tensor.dim() != 1 or tensor.numel() != self.meta.numel:
                raise AssertionError(f"{self.meta}: storage has shape {tuple(tensor.shape)}")

    @property
    def tensor(self) -> torch.Tensor:
        """`view` as a tensor of the box's sizes."""
        return self.meta.unflatten(self.view)

    @property
    def in_place(self) -> bool:
        """Whether the forward pass reads the storage that is averaged."""
        return self.forward_view is self.view

    def slices(self, start: int, stop: int) -> Iterator[Fragment]:
        """The fragments of elements [start, stop), as views."""
        forward_view = None if self.in_place else self.forward_view[start:stop]
        return range_fragments(self.meta, start, self.view[start:stop], forward_view)


def range_fragments(
    meta: FragmentMeta, start: int, view: torch.Tensor, forward_view: torch.Tensor | None = None
) -> Iterator[Fragment]:
    """The fragments of a range of the elements of `meta`, in order.

    `view` holds the range, whose first element is number `start` of `meta` in storage order.

    `forward_view` is what the forward pass reads, where that is another tensor.
    """
    for at, part in meta.slices(start, start + view.numel()):
        run = slice(at - start, at - start + part.numel)
        own = view[run]
        yield Fragment(part, own, own if forward_view is None else forward_view[run])


def dense_order(tensor: torch.Tensor) -> Shape | None:
    """The storage order of a tensor without gaps or overlap; None if it is row-major.

    Raises:
        ValueError: elements overlap or leave gaps in storage (an expanded or sliced tensor).
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            f"storage is not dense: shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
            "make it contiguous before the average is built"
        )
    return tuple(order)


def whole_fragment(
    fqn: str, tensor: torch.Tensor, forward_view: torch.Tensor | None = None
) -> Fragment:
    """The fragment of a tensor that this rank holds whole, in any dense memory format."""
    order = dense_order(tensor)

    def flat(t: torch.Tensor) -> torch.Tensor:
        return (t.detach() if order is None else t.detach().permute(order)).view(-1)

    view = flat(tensor)
    shape = tuple(tensor.shape)
    meta = FragmentMeta(fqn, shape, whole(shape), order)
    return Fragment(meta, view, view if forward_view is None else flat(forward_view))


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a 1-D tensor as integers, so that equal means equal bit for bit."""
    import torch

    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().view(width[values.element_size()])


@contextmanager
def collector_paused() -> Iterator[None]:
    """Disable Python's garbage collector, in the main thread; also a decorator.

    The collector scans all objects each time their number has grown by a quarter. For the million
    boxes of a thousand ranks this would take three quarters of the time.
    """
    pauses = threading.current_thread() is threading.main_thread() and gc.isenabled()
    try:
        if pauses:
            gc.disable()
        yield
    finally:
        if pauses:
            gc.enable()
