"""A tensor of which this rank holds some boxes, as an object that torch's checkpoint planners take.

[Note: boxed tensors]
`torch.distributed.checkpoint` asks a value three things: which boxes to write
(`__create_write_items__`), which to fill (`__create_chunk_list__`), and for the tensor behind one
of them (`__get_tensor_shard__`). A `BoxedTensor` answers with views of the average's own storage,
so saving and loading copy nothing here. It has the global shape and no storage itself: arithmetic
on it raises, and staging for an asynchronous save copies the boxes. Read in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dist_ema.layout import Box, Place, Shape

if TYPE_CHECKING:  # it takes a second to import, and is there when it calls the methods here
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A run of an average's values on this rank."""

    place: Place
    values: torch.Tensor  # 1-D, contiguous, in the storage order of the place
    sends: bool  # whether this rank writes it; each element of a tensor is sent by one rank

    @property
    def view(self) -> torch.Tensor:
        """The values as a tensor of the box's sizes."""
        return self.place.unflatten(self.values)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An averaged tensor, as every rank knows it, whether or not it holds a part."""

    fqn: str
    aliases: tuple[str, ...]
    shape: Shape
    dtype: torch.dtype  # of the average


class BoxedTensor(torch.Tensor):
    """A global tensor of which this rank holds the given parts; no storage of its own."""

    parts: tuple[Part, ...] = ()

    @staticmethod
    def __new__(cls, shape: Shape, dtype: torch.dtype, parts: Sequence[Part]) -> BoxedTensor:
        device = parts[0].values.device if parts else torch.device("cpu")
        made: BoxedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made.parts = tuple(parts)
        return made

    def __init__(self, shape: Shape, dtype: torch.dtype, parts: Sequence[Part]) -> None:
        super().__init__()

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, part.place.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(part.place.box), properties, self.size()),
            )
            for part in self.parts
            if part.sends
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(part.place.box) for part in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for part in self.parts:
            if part.place.box.offsets == tuple(index.offset or ()):
                return part.view
        raise ValueError(f"{index.fqn}: this rank holds no box at {index.offset}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = ", ".join(f"{p.place.box.offsets}+{p.place.box.sizes}" for p in self.parts)
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes=[{boxes}])"

    def __deepcopy__(self, memo: dict[int, Any]) -> BoxedTensor:
        made = memo[id(self)] = self._with(torch.clone)
        return made

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return BoxedTensor, (tuple(self.shape), self.dtype, self.parts)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What DCP's stagers do to a value before they save it in the background."""
        if func is _aten.new_empty.default:  # a shell, given copies of its attributes afterwards
            return BoxedTensor(tuple(args[1]), args[0].dtype, ())
        if func is _aten.detach.default:
            return args[0]
        if func is _aten.zeros_like.default:
            return args[0]._with(lambda values: torch.zeros_like(values, device="cpu"))
        if func is _aten.copy_.default and all(isinstance(arg, BoxedTensor) for arg in args[:2]):
            target, source = args[:2]
            fill(target, source)
            return target
        raise NotImplementedError(
            f"{func} on a BoxedTensor: a rank has parts of the average only; gather_state_dict() "
            "gives whole tensors, and an asynchronous save takes "
            "async_stager=torch.distributed.checkpoint.staging.DefaultStager(...)"
        )

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BoxedTensor:
        parts = [Part(p.place, change(p.values), p.sends) for p in self.parts]
        return BoxedTensor(tuple(self.shape), self.dtype, parts)


def boxed(parts: Sequence[Part], tensors: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
    """Each averaged tensor by name, with what this rank holds of it.

    A tensor without elements is a plain one: every rank holds all of it.
    """
    held: dict[str, list[Part]] = {}
    known = {info.fqn: (info.shape, info.dtype) for info in tensors}
    for part in parts:
        if known.get(part.place.fqn) != (part.place.shape, part.values.dtype):
            raise AssertionError(f"{part.place} in {part.values.dtype} is not among the tensors")
        if part.place.numel:
            held.setdefault(part.place.fqn, []).append(part)
    values: dict[str, torch.Tensor] = {}
    for info in tensors:
        if 0 in info.shape:
            values[info.fqn] = torch.empty(info.shape, dtype=info.dtype)
        else:
            values[info.fqn] = BoxedTensor(info.shape, info.dtype, held.pop(info.fqn, []))
    return values


def at_least_1d(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, those without dims as vectors of one element."""
    return {fqn: value if value.dim() else _as_vector(value) for fqn, value in values.items()}


def _as_vector(value: torch.Tensor) -> torch.Tensor:
    assert isinstance(value, BoxedTensor)
    parts = [
        Part(Place(p.place.fqn, (1,), Box((0,), (1,))), p.values, p.sends) for p in value.parts
    ]
    return BoxedTensor((1,), value.dtype, parts)


def fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy the values of `source`, a whole tensor or one with the same boxes, into `target`.

    Raises:
        ValueError: a box of the target is not in the source.
    """
    if not isinstance(target, BoxedTensor):
        return  # without elements
    if not isinstance(source, BoxedTensor):
        origin = Box((0,) * target.dim(), tuple(target.shape))
        for part in target.parts:
            part.view.copy_(source[part.place.box.within(origin)])
        return
    theirs = {part.place.box: part for part in source.parts}
    for part in target.parts:
        if part.place.box not in theirs:
            raise ValueError(f"no box at {part.place.box.offsets} of sizes {part.place.box.sizes}")
        other = theirs[part.place.box]
        if other.values.data_ptr() != part.values.data_ptr():
            part.view.copy_(other.view)


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
