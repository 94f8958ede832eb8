"""The plan: which fragments of which weights this rank averages and owns.

[Note: ownership]
A weight that one rank holds is averaged there. Where several ranks hold equal fragments, each
averages a slice of them (`replicas="split"`), so the average costs 4*P/world bytes a rank under
every engine; or each averages all that it holds (`"whole"`), and the first holder is the owner.
The owner's values are gathered and saved. Buffers are never split: they may differ between ranks
(batch statistics), and the first holder's are used, as in DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dist_ema.core.engine import Engine, Weight
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment, Shape
from dist_ema.core.replicas import Holders, ReplicaGroup, find_holders, find_replica_groups

Selects = str | Callable[[str, nn.Parameter], bool]
SelectsBuffers = str | Callable[[str, torch.Tensor], bool]

_MAX_DIFFERENCES = 8  # in a message


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """This rank's part of a model's layout. Rebuilt from the same holders when storage moves."""

    weights: tuple[Weight, ...]  # parameters, and averaged buffers
    averaged: frozenset[str]  # fqns of parameters and buffers
    holders: tuple[Holders, ...]  # of every fragment of `weights`, in order
    replica_groups: tuple[ReplicaGroup, ...]  # averaged parameters, split among their holders
    num_shared_groups: int  # of all ranks together
    parameters: tuple[Fragment, ...]  # averaged here
    buffers: tuple[Fragment, ...]  # averaged here
    rest: tuple[Fragment, ...]  # owned here and not averaged

    @property
    def fragments(self) -> list[Fragment]:
        """All that is averaged here."""
        return [*self.parameters, *self.buffers]


def averaged_names(
    weights: Sequence[Weight], params: Selects, buffers: SelectsBuffers
) -> frozenset[str]:
    """Names of the weights to average.

    Raises:
        ValueError: the storage of a selected weight cannot be read.
    """

    def is_selected(weight: Weight) -> bool:
        tensor = weight.tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        if weight.is_buffer:
            wanted = buffers(weight.fqn, tensor) if callable(buffers) else buffers == "average"
            return bool(wanted) and weight.persistent
        if callable(params):
            return bool(params(weight.fqn, tensor))  # type: ignore[arg-type]
        return params == "all" or tensor.requires_grad

    selected = [w for w in weights if is_selected(w)]
    problems = [f"{w.fqn}: {w.problem}" for w in selected if w.problem]
    if problems:
        raise ValueError("; ".join(problems))
    return frozenset(w.fqn for w in selected)


def make_plan(
    weights: Sequence[Weight], averaged: frozenset[str], engine: Engine, split: bool, group: Group
) -> Plan:
    """Find the holders of each fragment and divide the work. Collective: every rank calls it."""
    _refuse_differing_selection(weights, averaged, group)
    weights = _fixed(weights, averaged)
    holders = tuple(find_holders([f.meta for w in weights for f in w.fragments], group))
    replica_groups: tuple[ReplicaGroup, ...] = ()
    num_shared = 0
    if split:
        held = _averaged_parameters(weights, averaged, holders)
        replica_groups, num_shared = find_replica_groups(held, group, engine.process_groups())
    return _assemble(weights, averaged, holders, replica_groups, num_shared, group)


def _refuse_differing_selection(
    weights: Sequence[Weight], averaged: frozenset[str], group: Group
) -> None:
    """Raise if a weight is averaged on some ranks only, or has several shapes. Collective."""
    own = {
        w.fqn: (w.fqn in averaged, w.shape if not w.is_buffer or w.fqn in averaged else None)
        for w in weights
    }
    if group.equal(own):
        return
    first: dict[str, tuple[bool, Shape | None]] = {}
    differing: dict[str, list[tuple[bool, Shape | None]]] = {}
    for report in group.all_gather(own):  # parts of a model have their own names
        for fqn, value in report.items():
            if first.setdefault(fqn, value) != value:
                differing[fqn] = [first[fqn], value]
    if some := sorted(fqn for fqn, (a, b) in differing.items() if a[0] != b[0]):
        raise ValueError(
            f"averaged on some ranks and not on others: {', '.join(some)}; "
            "requires_grad, params= and buffers= must choose the same weights on every rank"
        )
    if differing:
        listed = (f"{fqn}: {a[1]} and {b[1]}" for fqn, (a, b) in sorted(differing.items()))
        raise ValueError(
            f"ranks have other shapes of one name: {'; '.join(listed)}; in the parts of one model, "
            "tensors have the names that they have in the whole"
        )


def rebind(plan: Plan, weights: Sequence[Weight], group: Group) -> Plan:
    """The same plan over storage that moved. Local.

    Parameters that are not averaged may have another shape: bitsandbytes packs frozen weights anew.

    Raises:
        RuntimeError: parameters or averaged buffers have other names, shapes or shards.
    """
    weights = _fixed(weights, plan.averaged)
    differences = _differences(plan.weights, weights, plan.averaged)
    before, after = ([w for w in ws if w.is_buffer] for ws in (plan.weights, weights))
    buffers = _differences(before, after, plan.averaged)
    if buffers and len(buffers) == len(differences):
        raise RuntimeError(
            f"averaged buffers have changed since this average was built: {'; '.join(buffers)}; "
            "leave them out by buffers=, or build ShardedEMA when they have their final shape"
        )
    if differences:
        raise RuntimeError(
            "the model's parameters were replaced or changed since this average was built: "
            f"{'; '.join(differences)}; build ShardedEMA after fully_shard(), DDP or "
            "accelerator.prepare(), with what they return"
        )
    held = _averaged_parameters(weights, plan.averaged, plan.holders)
    moved = {(fragment.meta, holders): fragment for fragment, holders in held}
    replica_groups = tuple(
        replace(g, fragments=tuple(moved[f.meta, g.ranks] for f in g.fragments))
        for g in plan.replica_groups
    )
    return _assemble(
        weights, plan.averaged, plan.holders, replica_groups, plan.num_shared_groups, group
    )


def _fixed(weights: Sequence[Weight], averaged: frozenset[str]) -> list[Weight]:
    """The weights whose layout must not change: all but the buffers that are not averaged."""
    return [w for w in weights if not w.is_buffer or w.fqn in averaged]


def _averaged_parameters(
    weights: Sequence[Weight], averaged: frozenset[str], holders: Sequence[Holders]
) -> list[tuple[Fragment, Holders]]:
    """The fragments of averaged parameters, with their holders."""
    fragments = [(w, f) for w in weights for f in w.fragments]
    return [
        (fragment, ranks)
        for (weight, fragment), ranks in zip(fragments, holders, strict=True)
        if weight.fqn in averaged and not weight.is_buffer
    ]


def _assemble(
    weights: Sequence[Weight],
    averaged: frozenset[str],
    holders: tuple[Holders, ...],
    replica_groups: tuple[ReplicaGroup, ...],
    num_shared_groups: int,
    group: Group,
) -> Plan:
    parameters = [fragment for g in replica_groups for fragment in g.own()]
    buffers, rest = [], []
    fragments = [(w, f) for w in weights for f in w.fragments]
    for (weight, fragment), ranks in zip(fragments, holders, strict=True):
        is_owner = ranks[0] == group.rank
        if weight.fqn not in averaged:
            if weight.persistent and is_owner:
                rest.append(fragment)
        elif weight.is_buffer:
            buffers.append(replace(fragment, is_owner=is_owner))
        elif not replica_groups:
            parameters.append(replace(fragment, is_owner=is_owner))
    return Plan(
        tuple(weights),
        averaged,
        holders,
        replica_groups,
        num_shared_groups,
        tuple(parameters),
        tuple(buffers),
        tuple(rest),
    )


def _differences(
    old: Sequence[Weight], new: Sequence[Weight], averaged: frozenset[str]
) -> list[str]:
    """How two layouts differ, one text for each tensor."""

    def layout(weight: Weight | None) -> object:
        if weight is None:
            return None
        metas, t = [f.meta for f in weight.fragments], weight.tensor
        layout = weight.shape, metas, t.is_complex(), t.is_floating_point()
        return weight.aliases, weight.is_buffer, layout if weight.fqn in averaged else len(metas)

    def describe(weight: Weight | None) -> str:
        if weight is None:
            return "missing"
        boxes = [f.meta.box for f in weight.fragments]
        is_whole = [box.sizes for box in boxes] == [weight.shape]
        parts = "whole" if is_whole else f"boxes {[f'{b.offsets}+{b.sizes}' for b in boxes]} here"
        return f"shape {weight.shape}, {parts}, {weight.tensor.dtype}"

    before, after = ({w.fqn: w for w in weights} for weights in (old, new))
    texts = [
        f"{fqn}: was {describe(before.get(fqn))}, is {describe(after.get(fqn))}"
        for fqn in dict.fromkeys([*before, *after])
        if layout(before.get(fqn)) != layout(after.get(fqn))
    ]
    if not texts and list(before) != list(after):
        texts = ["its parameters are in another order"]
    more = len(texts) - _MAX_DIFFERENCES
    return texts[:_MAX_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
