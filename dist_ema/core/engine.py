"""What an engine is: it lists a model's weights as fragments and makes the forward pass see them.

[Note: engines]
Every way of cutting a model has one engine file, and each answers four questions only: which
fragments does this rank hold, are those views still good, how are gathered copies dropped before
the shown storage is written, and how is what was written made visible. Averaging, replicas, swap,
gather and files are written once, against fragments.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """One tensor of the model, whether or not this rank holds a part of it."""

    fqn: str
    aliases: tuple[str, ...]  # further names of a tied tensor
    shape: Shape  # of the whole tensor
    tensor: torch.Tensor  # as registered (a shard or an empty tensor under some engines)
    is_buffer: bool
    persistent: bool
    fragments: tuple[Fragment, ...]  # what this rank holds; empty is normal
    problem: str | None = None  # why its storage cannot be read as fragments

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def views(self) -> list[torch.Tensor]:
        """This rank's storage, a 1-D tensor for each fragment."""
        return [fragment.view for fragment in self.fragments]


class Engine(ABC):
    """A model cut in one way. What has a body here is right where nothing is gathered or copied."""

    communicates = False  # whether `release` and `publish` do
    is_plain = False  # whether every rank holds all of each weight
    source = "weights"  # or "master": what the fragments' views are

    def __init__(self, model: nn.Module) -> None:
        """`model` is as the user holds it, wrapped or not; nothing is changed."""
        self._model = model

    @staticmethod
    @abstractmethod
    def claims(model: nn.Module) -> bool:
        """Whether a model is cut in this way. Local."""

    def weights(self) -> list[Weight]:
        """Every parameter and buffer, in the order of `state_dict()`. Local."""
        return list_weights(registrations(self._model), self._locate, self._cut)

    def buffers(self) -> list[Weight]:
        """The buffers that are registered now: any may come, change its shape or go. Local."""
        every = registrations(self._model)
        parameters = {
            id(self._locate(registration)) for registration in every if not registration.is_buffer
        }
        # A parameter that is registered as a buffer too is that parameter's further name.
        found = [s for s in every if s.is_buffer and id(self._locate(s)) not in parameters]
        return list_weights(found, self._locate, self._cut)

    def buffer_registries(self) -> list[dict[str, torch.Tensor | None]]:
        """Where the model's modules register buffers. Local, without a walk over the tensors."""
        return [module._buffers for module in self._model.modules()]

    def _locate(self, registration: Registration) -> torch.Tensor:
        """The tensor that a slot stands for between training steps."""
        return registration.tensor

    def _cut(self, registration: Registration, tensor: torch.Tensor) -> Cut:
        """The global shape of a tensor, and what this rank holds of it."""
        return cut_whole(registration, tensor)

    @abstractmethod
    def stamp(self) -> list[int]:
        """Data pointers of all parameters that `weights()` viewed. Local.

        Equal lists mean that the views are still good.

        Called at every update: no allocation beyond the list, no communication, no host sync.
        """

    def applied_steps(self) -> int | None:
        """Optimizer steps that took effect so far, where the engine counts them. Local."""
        return None

    def process_groups(self) -> list[dist.ProcessGroup]:
        """Groups that the engine made already, to be used for replicas before new ones. Local."""
        return []

    def versioned(self, weight: Weight) -> Iterator[torch.Tensor]:
        """Tensors that autograd counts writes to a weight by (`_version`). Local."""
        yield weight.tensor
        for fragment in weight.fragments:
            yield fragment.view
            yield fragment.forward_view

    def release(self) -> None:
        """Drop gathered copies, so that the shown storage may be written. May be collective."""
        return

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward pass read the shown storage as it is now. May be collective.

        Values that torch caches by the identity of a weight are dropped. A backward pass through an
        earlier forward pass is refused by autograd from then on.
        """


Cut = tuple[Shape, Sequence[Fragment]]  # the shape of a whole tensor, what this rank holds of it


def list_weights(
    found: Sequence[Registration],
    locate: Callable[[Registration], torch.Tensor],
    cut: Callable[[Registration, torch.Tensor], Cut],
) -> list[Weight]:
    """Each distinct tensor of some slots once, under its first name.

    What cannot be cut says why in `problem`: it matters only if it is averaged or read.

    Args:
        locate: the tensor that a slot stands for between training steps.
        cut: the global shape of a tensor, and the fragments that this rank holds.
    """
    metas: dict[int, list[Registration]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for registration in found:
        tensor = locate(registration)
        tensors[id(tensor)] = tensor
        metas.setdefault(id(tensor), []).append(registration)
    weights = []
    for key, tied in metas.items():
        # A name that is not in the state dict is none, unless all are such.
        tied = [registration for registration in tied if registration.persistent] or tied
        tied = sorted(
            tied, key=lambda registration: registration.is_buffer
        )  # a parameter, if it is one as well
        registration, tensor = tied[0], tensors[key]
        shape, problem = tuple(tensor.shape), _problem(tensor)
        fragments: Sequence[Fragment] = ()
        if problem is None:
            try:
                shape, fragments = cut(registration, tensor)
            except ValueError as error:
                problem = str(error)
        weights.append(
            Weight(
                registration.fqn,
                tuple(dict.fromkeys(s.fqn for s in tied if s.fqn != registration.fqn)),
                shape,
                tensor,
                registration.is_buffer,
                registration.persistent,
                tuple(f for f in fragments if f.meta.numel),
                problem,
            )
        )
    return weights


def _problem(tensor: torch.Tensor) -> str | None:
    """Why a tensor's storage cannot be viewed; None if it can."""
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        return (
            "no storage yet; materialise the model (to_empty, a first forward of lazy modules, "
            "loading) before building the average"
        )
    local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    if is_wrapper(local):
        return (
            f"is a {type(local).__name__}, whose values are in other tensors (quantized or "
            "scaled); leave it out by params=, or convert it to a plain parameter"
        )
    return None


def without_gaps(buffer: Weight) -> Weight:
    """A buffer to be read: a copy in place of a slice of a larger tensor, or of an expanded one."""
    tensor = buffer.tensor
    strided = type(tensor) is torch.Tensor and tensor.layout == torch.strided
    if buffer.problem is None or tensor.is_meta or not strided:
        return buffer
    fragment = whole_fragment(buffer.fqn, tensor.contiguous())
    fragments = (fragment,) if tensor.numel() else ()
    return replace(buffer, fragments=fragments, problem=None)


def is_wrapper(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor holds other tensors instead of storage; a DTensor is none here."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "_local_tensor")


def cut_whole(registration: Registration, tensor: torch.Tensor) -> Cut:
    """The cut of a tensor that is not cut: one fragment."""
    return tuple(tensor.shape), (whole_fragment(registration.fqn, tensor),)


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

    `shown` is what the forward pass reads, where that is another tensor.
    """
    meta = FragmentMeta(registration.fqn, shape, whole(shape), order)
    return shape, tuple(range_fragments(meta, start, view, forward_view))


def outdate_graphs(weights: Iterable[torch.Tensor]) -> None:
    """Let autograd refuse a backward pass through values that these weights had before.

    Engines that gather weights write to them in ways that autograd does not see.
    """
    torch.autograd.graph.increment_version(list(weights))


def refuse_freezing() -> None:
    """Raise if the compiler may have copied weights into compiled code. Local."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and getattr(config, "freezing", False):
        raise RuntimeError(
            "torch._inductor.config.freezing is set: compiled code holds copies of the weights and "
            "would not show the average; set it to False and compile the model again"
        )


class Registered:
    """Tensors by where they are registered, and their addresses with no Python work for each."""

    def __init__(self, metas: Iterable[tuple[dict[str, torch.Tensor | None], str]]) -> None:
        pairs = [(r, name) for r, name in metas if not is_wrapper(r.get(name))]
        self._registries = [registry for registry, _ in pairs]
        self._names = [name for _, name in pairs]

    def tensors(self) -> Iterator[torch.Tensor | None]:
        """What is registered there now; None where nothing is."""
        return map(dict.get, self._registries, self._names)

    def addresses(self) -> list[int]:
        """For a stamp. A DTensor has no storage: ask for that of its local tensor."""
        try:
            return list(map(torch.Tensor.data_ptr, self.tensors()))  # type: ignore[arg-type]
        except TypeError:  # some place is empty now
            return [pointer(tensor) for tensor in self.tensors()]


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element; 0 for a slot that is empty or holds no elements."""
    return 0 if tensor is None else tensor.data_ptr()
