"""Which pieces of which weights this rank averages and sends: made once, remade when storage moves.

[Note: who averages what]
A weight that one rank holds is averaged there. Where several ranks hold equal fragments, each
averages a slice of them (`replicas="split"`), so the average costs 4*P/world bytes a rank under
every engine; or each averages all that it holds (`"whole"`), and the first holder sends it when
gathering. Buffers are never split: ranks need not agree on them (batch statistics), and the first
holder's are the ones that count, as they are for DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dist_ema.core.group import Group
from dist_ema.core.holders import Holders, find_holders
from dist_ema.core.layout import Fragment
from dist_ema.core.replicas import ReplicaGroup, find_replica_groups
from dist_ema.engines.engine import Engine, Weight

Selects = str | Callable[[str, nn.Parameter], bool]
SelectsBuffers = str | Callable[[str, torch.Tensor], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The local part of a model's layout. Rebuilt from the same holders when storage moves."""

    weights: tuple[Weight, ...]  # parameters, and averaged buffers
    averaged: frozenset[str]  # fqns, parameters and buffers
    holders: tuple[Holders, ...]  # of every fragment of `weights`, in order
    replica_groups: tuple[ReplicaGroup, ...]  # averaged parameters, cut among their holders
    num_shared_groups: int  # of all ranks together
    parameters: tuple[Fragment, ...]  # averaged here
    buffers: tuple[Fragment, ...]  # averaged here
    rest: tuple[Fragment, ...]  # parameters that are not averaged

    @property
    def fragments(self) -> list[Fragment]:
        """All that is averaged here."""
        return [*self.parameters, *self.buffers]


def chosen(weights: list[Weight], params: Selects, buffers: SelectsBuffers) -> frozenset[str]:
    """Names of the weights to average.

    Raises:
        ValueError: nothing is chosen.
    """

    def wanted(weight: Weight) -> bool:
        tensor = weight.tensor
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        if weight.is_buffer:
            chosen = buffers(weight.fqn, tensor) if callable(buffers) else buffers == "average"
            return bool(chosen) and weight.persistent
        if callable(params):
            return bool(params(weight.fqn, tensor))  # type: ignore[arg-type]
        return params == "all" or tensor.requires_grad

    averaged = frozenset(w.fqn for w in weights if wanted(w))
    problems = [f"{w.fqn}: {w.problem}" for w in weights if w.fqn in averaged and w.problem]
    if problems:
        raise ValueError("; ".join(problems))
    if not any(not w.is_buffer for w in weights if w.fqn in averaged):
        num_parameters = sum(not w.is_buffer for w in weights)
        raise ValueError(
            f"the model has {num_parameters} parameters and none is averaged with "
            f"params={params!r}; pass a model that trains, or params='all'"
        )
    return averaged


def make_plan(
    weights: list[Weight], averaged: frozenset[str], engine: Engine, split: bool, group: Group
) -> Plan:
    """Find out who holds what, and share the work. Collective: every rank calls it."""
    _refuse_differing_choice(weights, averaged, group)
    weights = _in_layout(weights, averaged)
    metas = [f.meta for w in weights for f in w.fragments]
    chosen_here = [w.fqn in averaged for w in weights for _ in w.fragments]
    holders = tuple(find_holders(metas, chosen_here, group))
    held = _held(weights, averaged, holders)
    replica_groups: tuple[ReplicaGroup, ...] = ()
    num_shared = 0
    if split:
        replica_groups, num_shared = find_replica_groups(held, group, engine.process_groups())
    return _assemble(tuple(weights), averaged, holders, replica_groups, num_shared, group)


def _refuse_differing_choice(weights: list[Weight], averaged: frozenset[str], group: Group) -> None:
    """Refuse a weight or buffer that is averaged on some ranks only. Collective.

    Shards of a weight are in different places, so that holders cannot tell.
    """
    mine = {w.fqn: w.fqn in averaged for w in weights}
    if group.equal(mine):
        return
    first: dict[str, bool] = {}
    differing = {
        fqn
        for theirs in group.all_gather(mine)  # parts of a model have names of their own
        for fqn, is_averaged in theirs.items()
        if first.setdefault(fqn, is_averaged) != is_averaged
    }
    if differing:
        raise ValueError(
            f"averaged on some ranks and not on others: {', '.join(sorted(differing))}; "
            "requires_grad, params= and buffers= must choose the same weights on every rank"
        )


def rebind(plan: Plan, weights: list[Weight], group: Group) -> Plan:
    """The same plan over storage that moved. Local.

    Raises:
        RuntimeError: parameters or averaged buffers have other names, shapes or shards.
    """
    weights = _in_layout(weights, plan.averaged)
    buffers = _differences(_buffers(plan.weights), _buffers(weights))
    differences = _differences(plan.weights, weights)
    if buffers and len(buffers) == len(differences):
        raise RuntimeError(
            f"averaged buffers have changed since this average was built: {'; '.join(buffers)}; "
            "leave them out by buffers=, or build ShardedEMA when they have their final shape"
        )
    if differences:
        raise RuntimeError(
            "the model's parameters were replaced or changed since this average was built: "
            f"{'; '.join(differences)}; build ShardedEMA when the model is as it will be trained, "
            "with what fully_shard(), DDP or accelerator.prepare() return"
        )
    held = iter(_held(weights, plan.averaged, plan.holders))
    fresh = {(f.meta, h): f for f, h in held}
    replica_groups = tuple(
        replace(s, fragments=tuple(fresh[f.meta, s.ranks] for f in s.fragments))
        for s in plan.replica_groups
    )
    return _assemble(
        tuple(weights), plan.averaged, plan.holders, replica_groups, plan.num_shared_groups, group
    )


def _held(
    weights: list[Weight], averaged: frozenset[str], holders: tuple[Holders, ...]
) -> list[tuple[Fragment, Holders]]:
    """The averaged parameters' fragments with their holders."""
    fragments = [(w, f) for w in weights for f in w.fragments]
    return [
        (f, h)
        for (w, f), h in zip(fragments, holders, strict=True)
        if w.fqn in averaged and not w.is_buffer
    ]


def _assemble(
    weights: tuple[Weight, ...],
    averaged: frozenset[str],
    holders: tuple[Holders, ...],
    replica_groups: tuple[ReplicaGroup, ...],
    num_shared_groups: int,
    group: Group,
) -> Plan:
    parameters = [fragment for g in replica_groups for fragment in g.own()]
    buffers, rest = [], []
    who = iter(holders)
    for weight in weights:
        for fragment in weight.fragments:
            first = next(who)[0] == group.rank
            if weight.fqn not in averaged:
                if weight.persistent and first:
                    rest.append(fragment)
            elif weight.is_buffer:
                buffers.append(replace(fragment, is_owner=first))
            elif not replica_groups:
                parameters.append(replace(fragment, is_owner=first))
    return Plan(
        weights,
        averaged,
        holders,
        replica_groups,
        num_shared_groups,
        tuple(parameters),
        tuple(buffers),
        tuple(rest),
    )


def _in_layout(weights: list[Weight], averaged: frozenset[str]) -> list[Weight]:
    """What must not change: other buffers may come, go and change their shape at any time."""
    return [w for w in weights if not w.is_buffer or w.fqn in averaged]


def _buffers(weights: Sequence[Weight]) -> list[Weight]:
    return [w for w in weights if w.is_buffer]


def _differences(old: Sequence[Weight], new: Sequence[Weight]) -> list[str]:
    """How two layouts differ, one text for each tensor, at most eight."""

    def described(weight: Weight | None) -> str:
        if weight is None:
            return "missing"
        boxes = [f.meta.box for f in weight.fragments]
        held = [f"{box.offsets}+{box.sizes}" for box in boxes]
        where = "whole" if [b.sizes for b in boxes] == [weight.shape] else f"boxes {held} here"
        return f"shape {weight.shape}, {where}"

    def layout(weight: Weight | None) -> object:
        if weight is None:
            return None
        return weight.aliases, weight.shape, weight.is_buffer, [f.meta for f in weight.fragments]

    was, now = ({w.fqn: w for w in weights} for weights in (old, new))
    texts = [
        f"{fqn}: was {described(was.get(fqn))}, is {described(now.get(fqn))}"
        for fqn in dict.fromkeys([*was, *now])
        if layout(was.get(fqn)) != layout(now.get(fqn))
    ]
    if not texts and list(was) != list(now):
        texts = ["its parameters are in another order"]
    more = [f"and {len(texts) - 8} more"] if len(texts) > 8 else []
    return texts[:8] + more
