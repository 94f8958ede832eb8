"""The base of engines, which list a model's weights as fragments.

[Note: engines]
Each way of sharding a model has one engine file. It knows which fragments this rank holds, whether
their views are still valid, how to drop gathered copies before the storage is written, and how to
make the forward pass read what was written. Everything else is written once, against fragments.

[Note: wrappers]
A tensor subclass may hold other tensors in place of storage, and lists their attributes in
`__tensor_flatten__`. If it holds one tensor, which has the shape, the dtype and the values of the
wrapper, the inner tensor is the weight: torchao's float8 training, for example.
Any further tensor that the wrapper holds was computed from the weight or belongs to a quantization:
it would be wrong beside averaged values. So a weight in such a wrapper is refused
(`Weight.problem`), unless the library recomputes the tensor after it was set to None
(`Engine.precomputed_names`).
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.layout import (
    Fragment,
    FragmentMeta,
    Shape,
    range_fragments,
    whole,
    whole_fragment,
)
from dist_ema.core.names import Registration, registrations

FindMaster = Callable[[torch.Tensor], torch.Tensor | None]
Cut = tuple[Shape, Sequence[Fragment]]  # the shape of a whole tensor, what this rank holds of it


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A tensor of the model, whether or not this rank holds a part of it."""

    fqn: str
    aliases: tuple[str, ...]  # further names of a tied tensor
    shape: Shape  # of the whole tensor
    tensor: torch.Tensor  # as registered (a shard or an empty tensor under some engines)
    is_buffer: bool
    persistent: bool
    fragments: tuple[Fragment, ...]  # held by this rank, possibly none
    problem: str | None = None  # why its storage cannot be read as fragments

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def views(self) -> list[torch.Tensor]:
        """This rank's storage, a 1-D tensor for each fragment."""
        return [fragment.view for fragment in self.fragments]


class Engine(ABC):
    """One way of sharding a model. The defaults suit weights that are not gathered or copied."""

    communicates = False  # whether `release` and `publish` do
    is_plain = False  # whether every rank holds all of each weight
    takes_masters = True  # whether `masters=` may replace what the fragments view
    source = "weights"  # or "master": what the fragments view
    # Attributes of wrappers that are computed from the weight, and computed again if None.
    precomputed_names: Set[str] = frozenset()

    def __init__(self, model: nn.Module) -> None:
        """`model` is as the user holds it, wrapped or not. It is not changed."""
        self._model = model
        self._wrapped: list[Registration] = []  # since `weights`

    @property
    def kind(self) -> str:
        """How the model is sharded: for messages, and compared to notice a change."""
        return type(self).__name__

    @staticmethod
    @abstractmethod
    def claims(model: nn.Module) -> bool:
        """Whether a model is sharded in this way. Local."""

    def weights(self) -> list[Weight]:
        """Every parameter and buffer, in the order of `state_dict()`. Local."""
        registered = registrations(self._model)
        self._wrapped = [
            r
            for r in registered
            if not r.is_buffer
            and is_wrapper(local_of(self._tensor(r)))
            and path_to_values(self._tensor(r), self.precomputed_names) is not None
        ]
        return self._list(registered)

    def buffers(self) -> list[Weight]:
        """The buffers that are registered now. They may be added, resized or removed. Local."""
        every = registrations(self._model)
        parameters = {id(self._tensor(r)) for r in every if not r.is_buffer}
        # A tensor that is registered both as a parameter and as a buffer counts as a parameter.
        return self._list(r for r in every if r.is_buffer and id(self._tensor(r)) not in parameters)

    def _list(self, registered: Iterable[Registration]) -> list[Weight]:
        """Each distinct tensor once, under its first name.

        One that cannot be cut has a `problem`, which matters only if it is averaged or read.
        """
        tied: dict[int, tuple[torch.Tensor, list[Registration]]] = {}
        for registration in registered:
            tensor = self._tensor(registration)
            tied.setdefault(id(tensor), (tensor, []))[1].append(registration)
        weights = []
        for tensor, names in tied.values():
            # Names in the state dict, if there are any, and those of a parameter first.
            names = sorted([r for r in names if r.persistent] or names, key=lambda r: r.is_buffer)
            first = names[0]
            shape = () if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
            problem = _problem(tensor, self.precomputed_names)
            fragments: Sequence[Fragment] = ()
            if problem is None:
                try:
                    shape, fragments = self._cut(first, tensor)
                except ValueError as error:
                    problem = str(error)
            weights.append(
                Weight(
                    first.fqn,
                    tuple(dict.fromkeys(r.fqn for r in names if r.fqn != first.fqn)),
                    shape,
                    tensor,
                    first.is_buffer,
                    first.persistent,
                    tuple(f for f in fragments if f.meta.numel),
                    problem,
                )
            )
        return weights

    def _tensor(self, registration: Registration) -> torch.Tensor:
        """The tensor that represents a registration; the same object for tied registrations."""
        return registration.tensor

    def _cut(self, registration: Registration, tensor: torch.Tensor) -> Cut:
        """The shape of the whole tensor, and the fragments that this rank holds.

        Raises:
            ValueError: the tensor cannot be read as fragments.
        """
        return self.cut(registration.fqn, tensor)

    def cut(self, fqn: str, tensor: torch.Tensor) -> Cut:
        """The same for a tensor that need not be registered, such as a master.

        Raises:
            ValueError: the tensor cannot be read as fragments.
        """
        values = values_of(tensor, self.precomputed_names)
        return tuple(tensor.shape), (whole_fragment(fqn, values),)

    @abstractmethod
    def stamp(self) -> list[int]:
        """Data pointers of the parameters, equal as long as the views are valid. Local.

        Called at every update: no allocation beyond the list, no communication, no host sync.
        """

    def applied_steps(self) -> int | None:
        """Optimizer steps that took effect so far, where the engine counts them. Local."""
        return None

    def process_groups(self) -> list[dist.ProcessGroup]:
        """Process groups of the model, which replicas may use. Local."""
        return []

    def versioned(self, weight: Weight) -> Iterator[torch.Tensor]:
        """Tensors whose `_version` autograd increments when the weight is written to. Local."""
        yield weight.tensor
        for fragment in weight.fragments:
            yield fragment.view
            yield fragment.forward_view

    def wrappers(self) -> list[tuple[str, torch.Tensor]]:
        """The wrappers whose inner tensors are averaged or read, by fqn. See [Note: wrappers]."""
        return [(r.fqn, local_of(self._tensor(r))) for r in self._wrapped]

    def precomputed(self) -> list[tuple[dict[str, torch.Tensor | None], str]]:
        """Where tensors are kept that were computed from weights: a dict and a key. Local."""
        attributes = [vars(wrapper) for _, wrapper in self.wrappers()]
        return [(d, n) for d in attributes for n in self.precomputed_names if d.get(n) is not None]

    def release(self) -> None:
        """Drop gathered copies, and what was computed from the weights. May be collective.

        Raises:
            RuntimeError: a weight is held with others that may have been computed from it.
        """
        for attributes, name in self.precomputed():
            attributes[name] = None
        for fqn, wrapper in self.wrappers():
            if len(held := _held(wrapper, self.precomputed_names)) > 1:
                raise RuntimeError(
                    f"{fqn}: its {type(wrapper).__name__} holds {', '.join(sorted(held))} now, and "
                    "what was computed from other values of the weight would be used with these; "
                    "remove it, or leave the weight out by params="
                )

    def refresh(self, weights: Sequence[Weight]) -> None:
        """Let the next forward pass read these weights, whose storage was written. Local."""
        self.release()
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward pass read `forward_view` as it is now. May be collective.

        What torch caches by the identity of a weight is dropped, and autograd refuses a backward
        pass through an earlier forward pass.
        """


def _problem(tensor: torch.Tensor, precomputed: Set[str]) -> str | None:
    """Why a tensor's storage cannot be viewed; None if it can."""
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        return (
            "no storage yet; materialize the model (to_empty, a first forward of lazy modules, "
            "loading) before building the average"
        )
    local = local_of(tensor)
    if is_wrapper(local) and not _reads_inner(tensor, precomputed):
        return (
            f"is a {type(local).__name__}, whose values are in other tensors (quantized or "
            f"scaled: {', '.join(sorted(_held(local, precomputed)))}); leave it out by params=, or "
            "convert it to a plain parameter"
        )
    return None


def without_gaps(buffer: Weight) -> Weight:
    """A buffer to be read: a slice of a larger tensor, or an expanded one, is copied."""
    tensor = buffer.tensor
    strided = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    if buffer.problem is None or tensor.is_meta or not strided:
        return buffer
    fragment = whole_fragment(buffer.fqn, tensor.contiguous())
    return replace(buffer, fragments=(fragment,) if tensor.numel() else (), problem=None)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def is_wrapper(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor holds other tensors in place of storage. A DTensor does not count."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "_local_tensor")


def path_to_values(tensor: torch.Tensor, precomputed: Set[str]) -> str | None:
    """Dotted attributes from a DTensor or wrapper to the plain tensor that holds its values.

    "" for a plain tensor, and None where no single one of its shape and dtype does.
    """
    path = ["_local_tensor"] if hasattr(tensor, "_local_tensor") else []
    tensor = local_of(tensor)
    while is_wrapper(tensor):
        names = [*_held(tensor, precomputed)]
        inner = getattr(tensor, names[0]) if len(names) == 1 else None
        if inner is None or (inner.shape, inner.dtype) != (tensor.shape, tensor.dtype):
            return None
        path += names
        tensor = inner
    return ".".join(path)


def values_of(tensor: torch.Tensor, precomputed: Set[str]) -> torch.Tensor:
    """The plain tensor that holds the values of a DTensor's local part or of a wrapper."""
    path = path_to_values(tensor, precomputed)
    return writable(attrgetter(path)(tensor) if path else tensor)


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or, if it was made in inference mode, a normal one that shares its storage."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]


def _held(wrapper: torch.Tensor, precomputed: Set[str]) -> set[str]:
    """Attributes of a wrapper that are tensors, whether or not it lists them."""
    own = {name for name, value in vars(wrapper).items() if isinstance(value, torch.Tensor)}
    return {*wrapper.__tensor_flatten__()[0], *own} - precomputed  # type: ignore[attr-defined]


@torch.no_grad()
def _reads_inner(tensor: torch.Tensor, precomputed: Set[str]) -> bool:
    """Whether a copy of a wrapper has the values of the one tensor that it holds."""
    if path_to_values(tensor, precomputed) is None:
        return False
    values = values_of(tensor, precomputed)
    try:
        copied = torch.empty_like(values).copy_(local_of(tensor))
        return torch.allclose(copied, values, rtol=0, atol=0, equal_nan=True)
    except (RuntimeError, NotImplementedError, TypeError):
        return False  # it cannot be copied


def cut_range(
    registration: Registration,
    *,
    shape: Shape,
    start: int,
    view: torch.Tensor,
    forward_view: torch.Tensor | None = None,
    order: Shape | None = None,
) -> Cut:
    """The cut of a tensor of which `view`, 1-D, holds a flat range from `start` in storage order.

    `forward_view` is what the forward pass reads, where that is another tensor.
    """
    meta = FragmentMeta(registration.fqn, shape, whole(shape), order)
    return shape, tuple(range_fragments(meta, start, view, forward_view))


class Masters:
    """The fp32 masters that an optimizer outside of the engine keeps of parameters.

    An optimizer may create its masters at its first step, and replace them when its state is
    loaded. Nothing reports that, so `find` is called at every update, once per parameter.
    """

    def __init__(
        self,
        find: FindMaster,
        engine: Engine,
        weights: Sequence[Weight],
        averaged: Collection[str],
    ) -> None:
        """
        Raises:
            ValueError: the engine has masters of its own; or a master is a copy, or has another
                dtype, shape or placement than its parameter.
        """
        if not engine.takes_masters:
            raise ValueError(
                f"masters= cannot be used with {engine.kind}: DeepSpeed's masters are averaged "
                "without it, and FSDP1's flat parameters are not supported; leave it out"
            )
        self._find = find
        trained = [w for w in weights if w.fqn in averaged and not w.is_buffer]
        self._parameters = [w.tensor for w in trained]
        # Kept, so that an address in `stamp` is not used again.
        self._held = list(map(find, self._parameters))
        cuts = {
            w.fqn: _with_master(w, master, engine)
            for w, master in zip(trained, self._held, strict=True)
            if master is not None
        }
        self.weights = [cuts.get(w.fqn, w) for w in weights]
        if self.stamp() != list(map(_pointer_of_master, self._held)):
            raise ValueError(
                "masters= returns a new tensor at each call; it must return the tensor that the "
                "optimizer writes, or a view of it, not a copy (.float(), .clone())"
            )

    def __bool__(self) -> bool:
        """Whether there is a master."""
        return any(master is not None for master in self._held)

    def stamp(self) -> list[int]:
        """Changes if a master appears, is replaced or moves. Local: calls `find` per parameter."""
        return list(map(_pointer_of_master, map(self._find, self._parameters)))


def _pointer_of_master(master: torch.Tensor | None) -> int:
    return -1 if master is None else pointer(local_of(master))


def _with_master(weight: Weight, master: object, engine: Engine) -> Weight:
    """A weight that is averaged from its master, and read by the forward pass as before."""
    if not isinstance(master, torch.Tensor) or not master.is_floating_point():
        kind = master.dtype if isinstance(master, torch.Tensor) else type(master).__name__
        raise ValueError(f"{weight.fqn}: masters= returned {kind}, wanted an fp32 tensor or None")
    problem = _problem(master, engine.precomputed_names)
    if master.dtype.itemsize < 4:
        problem = f"is {master.dtype}; scaled or split masters cannot be averaged, use fp32 ones"
    try:
        shape, fragments = engine.cut(weight.fqn, master) if problem is None else ((), ())
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise ValueError(f"{weight.fqn}: its master {problem}")
    fragments = [f for f in fragments if f.meta.numel]
    if shape != weight.shape or [f.meta for f in fragments] != [f.meta for f in weight.fragments]:
        raise ValueError(
            f"{weight.fqn}: its master has shape {shape}, the parameter {weight.shape}, or they "
            "are placed in different ways; masters= must return a tensor of the parameter's "
            "shape, memory format and placement"
        )
    pairs = list(zip(fragments, weight.fragments, strict=True))
    if all(own.view.data_ptr() == live.view.data_ptr() for own, live in pairs):
        return weight  # the parameter is its own master
    return replace(
        weight,
        fragments=tuple(replace(own, forward_view=live.forward_view) for own, live in pairs),
    )


def refuse_freezing() -> None:
    """Raise if the compiler may have copied weights into compiled code. Local."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and getattr(config, "freezing", False):
        raise RuntimeError(
            "torch._inductor.config.freezing is set: compiled code holds copies of the weights and "
            "would not show the average; set it to False and compile the model again"
        )


class Registered:
    """Tensors by where they are registered, and their addresses with no Python code for each.

    Wrappers whose values cannot be read are skipped.
    """

    def __init__(
        self, registered: Iterable[Registration], precomputed: Set[str] = frozenset()
    ) -> None:
        self._kinds: dict[str, tuple[list[dict[str, torch.Tensor | None]], list[str]]] = {}
        for registration in registered:
            path = path_to_values(registration.tensor, precomputed)
            # A sparse tensor has no address.
            if path is not None and registration.tensor.layout == torch.strided:
                registries, names = self._kinds.setdefault(path, ([], []))
                registries.append(registration.registry)
                names.append(registration.name)

    def addresses(self) -> list[int]:
        """The data pointers of what is registered there now."""
        pointers: list[int] = []
        for path, (registries, names) in self._kinds.items():
            pointers += addresses([*map(dict.get, registries, names)], path)
        return pointers


def addresses(tensors: Sequence[torch.Tensor | None], path: str) -> list[int]:
    """Data pointers of the values at a path; 0 for None, and -1 for a tensor of another kind.

    Each step runs for all tensors before the next one, so that a core waits for several tensors at
    once if they are not in its caches.
    """
    values = attrgetter(path) if path else None
    try:
        plain = [*map(values, tensors)] if values else tensors
        return [*map(torch.Tensor.data_ptr, plain)]  # type: ignore[arg-type]
    except (TypeError, AttributeError, ValueError):  # some are of another kind, or lazy
        return [_pointer_at(tensor, values) for tensor in tensors]


def _pointer_at(tensor: torch.Tensor | None, values: attrgetter[torch.Tensor] | None) -> int:
    try:
        return pointer(values(tensor) if values else tensor)
    except (AttributeError, ValueError):
        return -1


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None and for an empty tensor."""
    return 0 if tensor is None else tensor.data_ptr()
