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
from typing import TYPE_CHECKING, Any

import torch

from dist_ema.core.layout import Box, Fragment, FragmentMeta, Shape, TensorMeta

if TYPE_CHECKING:  # it takes a second to import, and is there when it calls the methods here
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten


class BoxedTensor(torch.Tensor):
    """A global tensor of which this rank holds the given parts; no storage of its own."""

    parts: tuple[Fragment, ...] = ()

    @staticmethod
    def __new__(cls, shape: Shape, dtype: torch.dtype, parts: Sequence[Fragment]) -> BoxedTensor:
        device = parts[0].view.device if parts else torch.device("cpu")
        made: BoxedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        made.parts = tuple(parts)
        return made

    def __init__(self, shape: Shape, dtype: torch.dtype, parts: Sequence[Fragment]) -> None:
        super().__init__()

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, part.meta.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(part.meta.box), properties, self.size()),
            )
            for part in self.parts
            if part.is_owner
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(part.meta.box) for part in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for part in self.parts:
            if part.meta.box.offsets == tuple(index.offset or ()):
                return part.tensor
        raise ValueError(f"{index.fqn}: this rank holds no box at {index.offset}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = ", ".join(f"{p.meta.box.offsets}+{p.meta.box.sizes}" for p in self.parts)
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
        parts = [Fragment(p.meta, change(p.view), is_owner=p.is_owner) for p in self.parts]
        return BoxedTensor(tuple(self.shape), self.dtype, parts)


def boxed(parts: Sequence[Fragment], tensors: Sequence[TensorMeta]) -> dict[str, torch.Tensor]:
    """Each averaged tensor by name, with what this rank holds of it.

    A tensor without elements is a plain one: every rank holds all of it.
    """
    held: dict[str, list[Fragment]] = {}
    known = {info.fqn: (info.shape, info.dtype) for info in tensors}
    for part in parts:
        if known.get(part.meta.fqn) != (part.meta.shape, part.view.dtype):
            raise AssertionError(f"{part.meta} in {part.view.dtype} is not among the tensors")
        if part.meta.numel:
            held.setdefault(part.meta.fqn, []).append(part)
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
        Fragment(FragmentMeta(p.meta.fqn, (1,), Box((0,), (1,))), p.view, is_owner=p.is_owner)
        for p in value.parts
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
            part.tensor.copy_(source[part.meta.box.within(origin)])
        return
    theirs = {part.meta.box: part for part in source.parts}
    for part in target.parts:
        if part.meta.box not in theirs:
            raise ValueError(f"no box at {part.meta.box.offsets} of sizes {part.meta.box.sizes}")
        other = theirs[part.meta.box]
        if other.view.data_ptr() != part.view.data_ptr():
            part.tensor.copy_(other.tensor)


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
