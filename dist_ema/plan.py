"""Which pieces of which weights this rank averages and sends: made once, remade when storage moves.

[Note: who averages what]
A weight that one rank holds is averaged there. Where several ranks hold equal fragments, each
averages a slice of them (`replicas="split"`), so the average costs 4*P/world bytes a rank under
every engine; or each averages all that it holds (`"whole"`), and the first holder sends it when
gathering. Buffers are never split: ranks need not agree on them (batch statistics), and the first
holder's are the ones that count, as they are for DDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from dist_ema.engines.engine import Engine, Weight
from dist_ema.holders import Holders, find_holders
from dist_ema.layout import Fragment
from dist_ema.ranks import Ranks
from dist_ema.replicas import ReplicaSet, replica_sets

Selects = str | Callable[[str, nn.Parameter], bool]
SelectsBuffers = str | Callable[[str, torch.Tensor], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A fragment that this rank averages, or sends as it lives."""

    fragment: Fragment
    sends: bool  # whether this rank's values are the ones that are gathered and written


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The local part of a model's layout. Rebuilt from the same holders when storage moves."""

    weights: tuple[Weight, ...]
    averaged: frozenset[str]  # fqns, parameters and buffers
    holders: tuple[Holders, ...]  # of every fragment of `weights`, in order
    sets: tuple[ReplicaSet, ...]  # averaged parameters, cut among their holders
    num_shared_sets: int  # of all ranks together
    parameters: tuple[Piece, ...]  # averaged here
    buffers: tuple[Piece, ...]  # averaged here
    rest: tuple[Piece, ...]  # not averaged, part of the state dict

    @property
    def pieces(self) -> list[Piece]:
        """All that is averaged here."""
        return [*self.parameters, *self.buffers]

    def buffer_views(self) -> list[torch.Tensor]:
        """The storage of all buffers that this rank holds, averaged or not."""
        return [f.view for w in self.weights if w.is_buffer for f in w.fragments]


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
            if not weight.persistent:
                return False
            return bool(buffers(weight.fqn, tensor)) if callable(buffers) else buffers == "average"
        if callable(params):
            return bool(params(weight.fqn, tensor))  # type: ignore[arg-type]
        return params == "all" or tensor.requires_grad

    averaged = frozenset(w.fqn for w in weights if wanted(w))
    if not any(not w.is_buffer for w in weights if w.fqn in averaged):
        num_parameters = sum(not w.is_buffer for w in weights)
        raise ValueError(
            f"the model has {num_parameters} parameters and none is averaged with "
            f"params={params!r}; pass a model that trains, or params='all'"
        )
    return averaged


def make_plan(
    weights: list[Weight], averaged: frozenset[str], engine: Engine, split: bool, ranks: Ranks
) -> Plan:
    """Find out who holds what, and share the work. Collective: every rank calls it."""
    places = [f.place for w in weights for f in w.fragments]
    chosen_here = [w.fqn in averaged for w in weights for _ in w.fragments]
    holders = tuple(find_holders(places, chosen_here, ranks))
    held = _held(weights, averaged, holders)
    sets: tuple[ReplicaSet, ...] = ()
    num_shared = 0
    if split:
        sets, num_shared = replica_sets(held, ranks, engine.process_groups())
    return _assemble(tuple(weights), averaged, holders, sets, num_shared, ranks)


def rebind(plan: Plan, weights: list[Weight], ranks: Ranks) -> Plan | None:
    """The same plan over storage that moved; None if the layout is another one. Local."""
    if _layout(plan.weights) != _layout(weights):
        return None
    held = iter(_held(weights, plan.averaged, plan.holders))
    fresh = {(f.place, h): f for f, h in held}
    sets = tuple(
        replace(s, fragments=tuple(fresh[f.place, s.ranks] for f in s.fragments)) for s in plan.sets
    )
    return _assemble(tuple(weights), plan.averaged, plan.holders, sets, plan.num_shared_sets, ranks)


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
    sets: tuple[ReplicaSet, ...],
    num_shared_sets: int,
    ranks: Ranks,
) -> Plan:
    parameters = [Piece(fragment, True) for s in sets for fragment in s.own()]
    buffers, rest = [], []
    who = iter(holders)
    for weight in weights:
        for fragment in weight.fragments:
            first = next(who)[0] == ranks.rank
            if weight.fqn not in averaged:
                if weight.persistent and first:
                    rest.append(Piece(fragment, True))
            elif weight.is_buffer:
                buffers.append(Piece(fragment, first))
            elif not sets:
                parameters.append(Piece(fragment, first))
    return Plan(
        weights,
        averaged,
        holders,
        sets,
        num_shared_sets,
        tuple(parameters),
        tuple(buffers),
        tuple(rest),
    )


def _layout(weights: Iterable[Weight]) -> list[object]:
    return [
        (w.fqn, w.aliases, w.shape, w.is_buffer, [f.place for f in w.fragments]) for w in weights
    ]


def parameters_differ(old: tuple[Weight, ...], new: list[Weight]) -> bool:
    """Whether two layouts differ in more than their buffers."""
    return _layout(w for w in old if not w.is_buffer) != _layout(w for w in new if not w.is_buffer)


def differences(old: tuple[Weight, ...], new: list[Weight]) -> list[str]:
    """What differs between two layouts, by name, with the old and the new shape."""
    before, now = {w.fqn: w for w in old}, {w.fqn: w for w in new}
    told = []
    for fqn in dict.fromkeys([*before, *now]):
        was, found = before.get(fqn), now.get(fqn)
        if was is None or found is None:
            told.append(f"{fqn} was {_shape(was)} and is {_shape(found)}")
        elif was.shape != found.shape:
            told.append(f"{fqn} had {_shape(was)} and has {_shape(found)}")
        elif was.aliases != found.aliases:
            told.append(f"{fqn} was tied to {list(was.aliases)} and is to {list(found.aliases)}")
        elif [f.place for f in was.fragments] != [f.place for f in found.fragments]:
            told.append(f"{fqn} is sharded in another way")
    return told or ["the order of its weights has changed"]


def _shape(weight: Weight | None) -> str:
    return "absent" if weight is None else f"shape {weight.shape}"
