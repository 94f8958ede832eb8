"""Averages to disk and back: cut by one layout, read by another.

[Note: nothing is half done]
A save writes to a directory beside its path and exchanges the two when every rank has written and
synced; until then what was at the path is what a reader finds. A load reads everything that any
rank needs once and compares the checksums, and only when all ranks have found all good does the
first byte of an average change. Each step that may fail on one rank ends in an agreement, so that
the same error is raised on every rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint import background, checksums, consolidated, manifest, parsing
from dist_ema.checkpoint.agreement import agreed, described, merged, refuse_different
from dist_ema.checkpoint.background import TIMEOUT_S, Handle, Letters
from dist_ema.checkpoint.blocks import Files, check_file
from dist_ema.checkpoint.consolidated import open_any
from dist_ema.checkpoint.directory import refuse_working_directory, target
from dist_ema.checkpoint.manifest import CheckpointError, Manifest
from dist_ema.checkpoint.matching import Match, match
from dist_ema.checkpoint.regions import RegionReader
from dist_ema.checkpoint.snapshot import copied, non_finite
from dist_ema.checkpoint.visibility import retried_when_visible
from dist_ema.checkpoint.writer import Report, Save
from dist_ema.core.group import Group, digest
from dist_ema.core.layout import Box, Fragment, TensorMeta
from dist_ema.core.safetensors import DTYPES
from dist_ema.schedule import same_rule

__all__ = [
    "TIMEOUT_S",
    "CheckpointError",
    "Fragment",
    "Handle",
    "TensorMeta",
    "differing_schedules",
    "load",
    "refuse_non_finite",
    "save",
]


def save(
    path: str | Path,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    state: Mapping[str, Any],
    group: Group,
    *,
    asynchronous: bool = False,
    timeout: float = TIMEOUT_S,
) -> Handle | None:
    """Write averages to a directory that all ranks share. Collective: every rank calls it.

    A checkpoint at `path` is replaced at one instant. A directory that holds files of others is
    refused. Memory: one block; on rank 0, the manifest. Four small exchanges and one
    gather of the plan.

    With `asynchronous`, returns after one copy of the local bytes, and the rest happens on a thread
    that uses no process group (see [Note: letters]). The memory of the copy is kept for the next. A
    save or load that follows waits for it first.

    Args:
        averages: what this rank holds of each, by name. Names in the same order on every rank.
        tensors: all that this rank knows to be averaged. Ranks that hold different parts of a model
            (pipeline stages) may know different tensors: one checkpoint holds all of them.
        timeout: seconds without progress until an asynchronous save gives a rank up.
        state: JSON; see `dist_ema.checkpoint.parsing.check_state` for what it must have.

    Raises:
        CheckpointError: an average holds NaN or Inf (the tensors are named); a rank cannot write or
            does not see the directory; what is at `path` is no checkpoint. On every rank, and what
            was at `path` is as it was.
    """
    with agreed(group):
        background.settle()
        _check(averages, tensors, state)
        state = json.loads(json.dumps(state))  # the caller's may change before it is written
        place = target(Path(path))
        try:
            refuse_working_directory(place)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    refuse_different(group, (str(place), list(averages)))
    tensors = _of_all_ranks(tensors, group)
    with agreed(group):
        if asynchronous:
            averages, broken = copied(averages)
        else:
            broken = non_finite(averages)
    refuse_non_finite(broken, group)
    work = Save(place, averages, tensors, state)
    letters: Letters | None = None
    try:
        _begin(work, group, asynchronous)
        if asynchronous:
            if group.size > 1:
                with agreed(group):
                    letters = work.letters(group.rank, group.size, timeout)
                with agreed(group):
                    letters.meet()
            rank = group.rank
            return background.start(place, lambda: _write_apart(work, rank, letters))
        with agreed(group):
            report = work.write(group.rank)
        reports = group.gather(report)
        with agreed(group):
            if group.rank == 0:
                work.finish(reports)
    except BaseException:
        if letters is not None:
            letters.close()
        if group.rank == 0:
            work.abandon()
        raise
    return None


def load(
    path: str | Path,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    group: Group,
    *,
    strict: bool = True,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """Fill averages from a checkpoint, however it was cut. Collective: every rank calls it.

    All parts are filled, those that this rank does not send as well. Memory: one block.

    A safetensors file, or a directory of them with or without an index, is taken for the average
    too, its names being those of the model. It has no checksums and no counters: the state is {},
    and the caller starts counting at 0.

    Args:
        strict: refuse missing and unexpected tensors, instead of warning of them.
        others: names that safetensors files may have beside the averaged ones.

    Returns:
        The state that was saved.

    Raises:
        CheckpointError: the checkpoint is cut short, altered or none; an average or a tensor is
            missing or does not fit; ranks see different files. On every rank, and nothing has
            changed.
    """
    with agreed(group):
        background.settle()
    if not group.equal(digest(sorted(others))):
        others = set().union(*group.all_gather(set(others)))
    every = _of_all_ranks(tensors, group)
    return retried_when_visible(
        Path(path), group, lambda: _load(Path(path), averages, every, group, strict, others)
    )


def differing_schedules(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What to warn of when a state was saved under other schedules than those of now. Local."""
    told = []
    for name, average in own["averages"].items():
        theirs = saved["averages"][name]["schedule"]
        if not same_rule(theirs, average["schedule"]):
            told.append(
                f"the average {name!r} was saved with {theirs}, and goes on with "
                f"{average['schedule']}, as ShardedEMA was built"
            )
    return told


def _of_all_ranks(tensors: Sequence[TensorMeta], group: Group) -> Sequence[TensorMeta]:
    """The tensors of all ranks, which differ where ranks hold different parts of one model.

    Collective: every rank calls it. An all-reduce of two integers if all ranks have the same.

    Raises:
        CheckpointError: ranks have a name in common, and its shape, dtype or aliases differ.
    """
    if group.equal(digest(tensors)):
        return tensors
    first: dict[str, tuple[int, TensorMeta]] = {}
    problems: dict[str, str] = {}
    for rank, theirs in enumerate(group.all_gather(list(tensors))):
        for info in theirs:
            other, known = first.setdefault(info.fqn, (rank, info))
            if info != known:
                problems.setdefault(
                    info.fqn,
                    f"{info.fqn} is {_described(known)} on rank {other} and {_described(info)} on "
                    f"rank {rank}",
                )
    if problems:
        raise CheckpointError(
            f"ranks have different tensors of one name: {'; '.join(list(problems.values())[:8])}; "
            "parts of one model need distinct names, and ranks that hold different models a "
            "process group each (process_group=)"
        )
    return [info for _, info in first.values()]


def _described(info: TensorMeta) -> str:
    aliases = f" with the aliases {', '.join(info.aliases)}" if info.aliases else ""
    return f"{info.dtype} of shape {info.shape}{aliases}"


# Saving.


def refuse_non_finite(broken: set[str], group: Group) -> None:
    """Raise on every rank if any found broken tensors, and name them. Collective."""
    if group.any(bool(broken)):
        names = sorted(set().union(*group.all_gather(broken)))
        raise CheckpointError(
            f"the average holds NaN or Inf in {', '.join(names)}; nothing is written"
        )


def _check(
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    state: Mapping[str, Any],
) -> None:
    unknown = [f"{t.fqn} ({t.dtype})" for t in tensors if t.dtype not in DTYPES]
    if unknown:
        raise CheckpointError(f"safetensors has no dtype for {', '.join(unknown)}")
    if any(t.fqn == "__metadata__" for t in tensors):
        raise CheckpointError("safetensors has no room for a tensor named __metadata__")
    json.dumps(state, allow_nan=False)
    parsing.check_state(state, averages)
    for name in averages:
        manifest.directory_of(name, list(averages))


def _begin(work: Save, group: Group, asynchronous: bool) -> None:
    """Make the directory that every rank writes to. Collective."""
    slow = group.any(not checksums.is_available(checksums.FAST))
    with agreed(group):
        if group.rank == 0:
            algorithm = checksums.ALWAYS if slow else checksums.FAST
            work.begin(algorithm, with_letters=asynchronous and group.size > 1)
    work.orders = group.broadcast(work.orders)
    with agreed(group):
        work.check_seen()


def _write_apart(work: Save, rank: int, letters: Letters | None) -> None:
    """Write on a thread: what ranks tell one another goes through files."""
    report: Report | None = None
    problem: Exception | None = None
    try:
        report = work.write(rank)
    except Exception as error:
        problem = error
        work.remove_own()
    own = {"problem": None if problem is None else described(problem), "report": report}
    try:
        if letters is not None and rank > 0:
            letters.report(own)
            lost = letters.outcome(work.is_in_place)
        else:
            lost = _finish_apart(work, own, letters)
    except Exception as error:
        problem, lost = problem or error, described(error)
    finally:
        if letters is not None:
            letters.close()
    if lost is not None:
        raise CheckpointError(lost) from problem


def _finish_apart(work: Save, own: dict[str, Any], letters: Letters | None) -> str | None:
    """On rank 0: finish if all ranks have written, and tell them. Returns what went wrong."""
    lost: str | None = None
    try:
        told = [own, *(letters.reports() if letters is not None else [])]
        problems = [each["problem"] if each else "could not write" for each in told]
        if any(problems):
            raise CheckpointError(merged(problems))
        work.finish([each["report"] for each in told])
    except Exception as error:
        lost = described(error)
    if letters is not None:
        letters.conclude(lost)
    if lost is not None:
        work.abandon()
    return lost


# Loading.


def _load(
    path: Path,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    group: Group,
    strict: bool,
    others: Collection[str],
) -> dict[str, Any]:
    files: Files | None = None
    try:
        with agreed(group):
            files, about = open_any(path)
        assert files is not None
        with agreed(group):
            # Plain files have no id, and other weights of the same model the same header.
            identity = about.id or digest(about, consolidated.sample(files, about))
        refuse_different(group, identity, what="checkpoints")
        with agreed(group):
            try:
                found = match(about, list(averages), tensors, others, strict=strict)
            except CheckpointError as error:
                raise CheckpointError(f"{files.directory}: {error}") from None
            _check_files(files, about, found, group)
        _read(files, about, found, averages, tensors, group)
    finally:
        if files is not None:
            files.close()
    for note in found.notes:
        warnings.warn(f"{files.directory}: {note}", stacklevel=6)
    return dict(about.state)


def _check_files(files: Files, about: Manifest, found: Match, group: Group) -> None:
    """Compare lengths and headers of all files, each on one rank. Local."""
    plain = not about.algorithm
    averages = [about.averages[consolidated.NAME if plain else name] for name in found.sources]
    every = [(average, name) for average in averages for name in average.files]
    for average, name in every[group.rank :: group.size]:
        check_file(files, about, average, name)


def _read(
    files: Files,
    about: Manifest,
    found: Match,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    group: Group,
) -> None:
    """Check all that is needed, agree, and only then copy. Collective."""
    reader = RegionReader(files, about)
    with agreed(group):
        _fill(reader, found, averages, copying=False)
    with agreed(group):
        try:
            _fill(reader, found, averages, copying=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; the checkpoint changed while it was read, and the average is "
                "overwritten in part: load again"
            ) from error


@torch.no_grad()
def _fill(
    reader: RegionReader,
    found: Match,
    averages: Mapping[str, Sequence[Fragment]],
    *,
    copying: bool,
) -> None:
    """Read and check every block that this rank needs; copy the values if `copying`. Local."""
    for name, parts in averages.items():
        targets: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        for part in parts:
            if part.meta.numel:
                targets.setdefault(part.meta.fqn, []).append((part.meta.box, part.tensor))
        for fqn, source in found.sources[name].items():
            if copying:
                reader.fill(source, targets.get(fqn, ()))
            else:
                reader.check(source, targets.get(fqn, ()))
