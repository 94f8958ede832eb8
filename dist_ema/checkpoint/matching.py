"""Which saved tensor fills which averaged one, and everything that does not fit, in one message."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from dist_ema.checkpoint import consolidated
from dist_ema.checkpoint.manifest import CheckpointError, Manifest, SavedAverage
from dist_ema.checkpoint.reader import Source
from dist_ema.core.layout import TensorMeta

_SHOWN = 8  # names of a kind in a message


@dataclass(slots=True)
class Match:
    """What to read for each average, by name and fqn, and what to warn of."""

    sources: dict[str, dict[str, Source]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def match(
    about: Manifest,
    names: Sequence[str],
    tensors: Sequence[TensorMeta],
    others: Collection[str],
    *,
    strict: bool,
) -> Match:
    """Find the saved tensors of some averages.

    Args:
        others: names that a consolidated file may have beside the averaged ones: the rest of the
            model's state dict.
        strict: refuse missing and unexpected tensors, instead of noting them.

    Raises:
        CheckpointError: an average or a tensor is missing, or a tensor is not of the same shape or
            kind; it lists them all.
    """
    found = Match()
    plain = set(about.averages) == {consolidated.NAME} and not about.algorithm
    if plain and len(names) != 1:
        raise CheckpointError(
            f"holds one average without a name, and {', '.join(names)} are wanted; build "
            "ShardedEMA with one decay to load it"
        )
    saved = {names[0]: about.averages[consolidated.NAME]} if plain else about.averages
    absent = [name for name in names if name not in saved]
    if absent:
        raise CheckpointError(
            f"has no average named {', '.join(map(repr, absent))}; it has "
            f"{', '.join(map(repr, saved))}"
        )
    left = [name for name in saved if name not in names]
    if left:
        found.notes.append(f"its averages {', '.join(map(repr, left))} are not loaded")
    for name in names:
        allowed = set(others) | {a for t in tensors for a in t.aliases} if plain else set()
        found.sources[name] = _match_one(saved[name], tensors, allowed, strict, found.notes)
    return found


def _match_one(
    average: SavedAverage,
    tensors: Sequence[TensorMeta],
    allowed: Collection[str],
    strict: bool,
    notes: list[str],
) -> dict[str, Source]:
    by_name = {alias: fqn for fqn, tensor in average.tensors.items() for alias in tensor.aliases}
    by_name |= {fqn: fqn for fqn in average.tensors}
    sources: dict[str, Source] = {}
    missing, wrong, rounded = [], [], []
    for info in tensors:
        fqn = next((by_name[n] for n in (info.fqn, *info.aliases) if n in by_name), None)
        if fqn is None:
            missing.append(info.fqn)
            continue
        source = Source(average, fqn, average.tensors[fqn])
        problem = _misfit(source, info)
        if problem:
            wrong.append(f"{info.fqn}: {problem}")
        elif torch.promote_types(source.dtype, info.dtype) != info.dtype:
            rounded.append(info.fqn)
        sources[info.fqn] = source
    used = {source.fqn for source in sources.values()}
    unexpected = [fqn for fqn in average.tensors if fqn not in used and fqn not in allowed]
    problems = [_listed(what, fqns) for what, fqns in (("does not fit", wrong),) if fqns]
    differing = [
        _listed(what, fqns)
        for what, fqns in (("missing", missing), ("unexpected", unexpected))
        if fqns
    ]
    if wrong or (strict and differing):
        advice = "" if wrong else " (strict=False loads the rest)"
        raise CheckpointError("; ".join(problems + differing) + advice)
    notes += differing
    if rounded:
        notes.append(_listed("rounded to a narrower dtype", rounded))
    return sources


def _misfit(source: Source, info: TensorMeta) -> str | None:
    if source.tensor.shape != info.shape:
        return f"the checkpoint has shape {source.tensor.shape}, the model {info.shape}"
    saved = source.dtype
    if saved.is_complex != info.dtype.is_complex or not (
        saved.is_complex or saved.is_floating_point
    ):
        return f"the checkpoint has {saved}, the average {info.dtype}"
    return None


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"
