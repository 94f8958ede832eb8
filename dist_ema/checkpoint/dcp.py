"""An average as values of `torch.distributed.checkpoint`: dcp.save({"model": ..., "ema": ema}).

[Note: boxed tensors]
`torch.distributed.checkpoint` asks a value three things: which boxes to write
(`__create_write_items__`), which to fill (`__create_chunk_list__`), and the tensor of a box
(`__get_tensor_shard__`). A `BoxedTensor` answers with views of the average's storage, so saving and
loading copy nothing here. It has the global shape and no storage of its own: arithmetic on it
raises, and staging for an asynchronous save copies the boxes. Checked in torch 2.8 to 2.15.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_ema.checkpoint.manifest import check_state, refuse_absent
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box, Fragment, FragmentMeta, Shape, TensorMeta, whole

if TYPE_CHECKING:  # slow to import; whoever calls these methods has imported it
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_STATE_BYTES = 16384  # of counters and schedules: a tensor in a checkpoint has a fixed size
_aten = torch.ops.aten


def state_dict(
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    state: Mapping[str, Any],
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Values that `torch.distributed.checkpoint` saves, reshards and fills in place. Local.

    Tensors share the average's storage. The state is JSON in a tensor of bytes, so that nothing has
    to be pickled. A 0-d tensor has shape (1,), since some stagers cannot copy a 0-d tensor that a
    rank does not hold.

    Args:
        alone: whether this process holds all of each tensor: then values are plain tensors.
    """
    text = json.dumps(state, allow_nan=False).encode()
    if len(text) > _STATE_BYTES:
        raise ValueError(f"the state takes {len(text)} bytes, the limit is {_STATE_BYTES}")
    values = {name: _boxed(fragments, tensors, alone) for name, fragments in averages.items()}
    padded = bytearray(text.ljust(_STATE_BYTES))
    return {"averages": values, "state": torch.frombuffer(padded, dtype=torch.uint8)}


def load_state_dict(
    given: Mapping[str, Any],
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
) -> dict[str, Any]:
    """Copy the values of a `state_dict`, filled in place or not, and return its state. Local.

    Raises:
        CheckpointError: it has other averages, tensors or boxes. Nothing has changed.
    """
    pairs = []
    try:
        state: dict[str, Any] = json.loads(bytes(given["state"].cpu().tolist()))
        check_state(state, state["averages"])
        refuse_absent(averages, state["averages"])
        for name, fragments in averages.items():
            for fqn, own in _boxed(fragments, tensors).items():
                other = given["averages"][name].get(fqn)
                if (problem := _mismatch(own, other)) is not None:
                    raise CheckpointError(f"{name}, {fqn}: {problem}")
                pairs.append((own, other))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"is no state dict of this average ({error!r}): pass what ShardedEMA.state_dict() "
            "returned, or read a file of weights by load(path)"
        ) from error
    with torch.no_grad():
        for own, other in pairs:
            _fill(own, other)
    return state


def _boxed(
    fragments: Sequence[Fragment], tensors: Sequence[TensorMeta], plain: bool = False
) -> dict[str, torch.Tensor]:
    """Each averaged tensor by name.

    A tensor without elements is a plain one, and with `plain` so is one that is held whole.
    """
    held: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        if not fragment.meta.shape:
            meta = FragmentMeta(fragment.meta.fqn, (1,), whole((1,)))
            fragment = Fragment(meta, fragment.view, is_owner=fragment.is_owner)
        if fragment.meta.numel:
            held.setdefault(fragment.meta.fqn, []).append(fragment)
    values: dict[str, torch.Tensor] = {}
    for each in tensors:
        shape, own = each.shape or (1,), held.get(each.fqn, ())
        if 0 in shape:
            values[each.fqn] = torch.empty(shape, dtype=each.dtype, device="cpu")
        elif plain and len(own) == 1 and own[0].meta.box == whole(shape):
            values[each.fqn] = own[0].tensor
        else:
            values[each.fqn] = BoxedTensor(shape, each.dtype, own)
    return values


def _mismatch(own: torch.Tensor, other: object) -> str | None:
    """Why one value of a state dict cannot be filled from another."""
    if not isinstance(other, torch.Tensor):
        return "is missing" if other is None else f"is a {type(other).__name__}, wanted a tensor"
    if own.shape != other.shape:
        return f"has shape {tuple(other.shape)}, the model {tuple(own.shape)}"
    if not torch.can_cast(other.dtype, own.dtype):
        return f"is of {other.dtype}, the average of {own.dtype}"
    if isinstance(own, BoxedTensor) and isinstance(other, BoxedTensor):
        boxes = {fragment.meta.box for fragment in other.fragments}
        missing = [f.meta.box for f in own.fragments if f.meta.box not in boxes]
        if missing:
            return f"lacks the box at {missing[0].offsets} of sizes {missing[0].sizes} on this rank"
    return None


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor, or one with the same boxes, into a boxed one or one without elements."""
    boxes = {f.meta.box: f.tensor for f in getattr(source, "fragments", ())}
    for fragment in getattr(target, "fragments", ()):
        box, out = fragment.meta.box, fragment.tensor
        values = boxes[box] if boxes else source[box.within(whole(tuple(target.shape)))]
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)


class BoxedTensor(torch.Tensor):
    """A global tensor of which this rank holds some fragments; it has no storage of its own."""

    fragments: tuple[Fragment, ...] = ()

    @staticmethod
    def __new__(
        cls, shape: Shape, dtype: torch.dtype, fragments: Sequence[Fragment]
    ) -> BoxedTensor:
        device = fragments[0].view.device if fragments else torch.device("cpu")
        boxed: BoxedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device
        )
        boxed.fragments = tuple(fragments)
        return boxed

    def __init__(self, shape: Shape, dtype: torch.dtype, fragments: Sequence[Fragment]) -> None:
        super().__init__()

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, fragment.meta.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(fragment.meta.box), properties, self.size()),
            )
            for fragment in self.fragments
            if fragment.is_owner
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(fragment.meta.box) for fragment in self.fragments]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for fragment in self.fragments:
            if fragment.meta.box.offsets == tuple(index.offset or ()):
                return fragment.tensor
        raise ValueError(f"{index.fqn}: this rank holds no box at {index.offset}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = ", ".join(f"{f.meta.box.offsets}+{f.meta.box.sizes}" for f in self.fragments)
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, boxes=[{boxes}])"

    def __deepcopy__(self, memo: dict[int, Any]) -> BoxedTensor:
        copy = memo[id(self)] = self._with(torch.clone)
        return copy

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return BoxedTensor, (tuple(self.shape), self.dtype, self.fragments)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operations of the stagers of `torch.distributed.checkpoint`."""
        if func is _aten.new_empty.default:  # the attributes are copied afterwards
            return BoxedTensor(tuple(args[1]), args[0].dtype, ())
        if func is _aten.detach.default:
            return args[0]
        if func is _aten.zeros_like.default:
            return args[0]._with(lambda values: torch.zeros_like(values, device="cpu"))
        if func is _aten.copy_.default and all(isinstance(arg, BoxedTensor) for arg in args[:2]):
            target, source = args[:2]
            if (problem := _mismatch(target, source)) is not None:
                raise ValueError(problem)
            _fill(target, source)
            return target
        raise NotImplementedError(
            f"{func} on a BoxedTensor: a rank holds only a part of the average; use "
            "gather_state_dict() for whole tensors, and for an asynchronous save "
            "async_stager=torch.distributed.checkpoint.staging.DefaultStager(...)"
        )

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BoxedTensor:
        fragments = [Fragment(f.meta, change(f.view), is_owner=f.is_owner) for f in self.fragments]
        return BoxedTensor(tuple(self.shape), self.dtype, fragments)


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
