"""One error on every rank, whoever met it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.core.group import Group


@contextmanager
def agreed(group: Group) -> Iterator[None]:
    """Run a local block; if it fails on any rank, raise one error on every rank. Collective."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if group.any(problem is not None):
        told = group.all_gather(None if problem is None else described(problem))
        raise CheckpointError(merged(told)) from problem


def described(problem: Exception) -> str:
    if isinstance(problem, CheckpointError):
        return str(problem)
    if isinstance(problem, OSError) and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    return f"{type(problem).__name__}: {problem}"


def merged(told: Sequence[str | None]) -> str:
    """The problems of all ranks, each told once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(told):
        if text is not None:
            ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and len(next(iter(ranks_of.values()))) == len(told):
        return next(iter(ranks_of))
    return "; ".join(
        f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {text}"
        for text, who in ranks_of.items()
    )


def refuse_different(group: Group, own: object, what: str = "averages or paths") -> None:
    if group.equal(own):
        return
    told = group.all_gather(own)
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            raise CheckpointError(
                f"ranks have different {what}: rank 0 {told[0]}, rank {rank} {theirs}"
            )
