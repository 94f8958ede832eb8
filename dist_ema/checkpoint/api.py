"""Averages to disk and back: cut by one layout, read by another.

[Note: nothing is half done]
A save writes to a directory beside its path and exchanges the two when every rank has written and
synced; until then what was at the path is what a reader finds. A load reads everything that any
rank needs once and compares the checksums, and only when all ranks have found all good does the
first byte of an average change. Each step that may fail on one rank ends in an agreement, so that
the same error is raised on every rank.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from dist_ema.checkpoint import background, collector, consolidated, manifest, parsing
from dist_ema.checkpoint.agreement import agreed, described, merged, refuse_different
from dist_ema.checkpoint.background import Handle, Letters
from dist_ema.checkpoint.blocks import Files, check_file
from dist_ema.checkpoint.boxed import Part, TensorInfo, boxed
from dist_ema.checkpoint.consolidated import open_any
from dist_ema.checkpoint.manifest import CheckpointError, Manifest
from dist_ema.checkpoint.matching import Match, match
from dist_ema.checkpoint.planners import EmaLoadPlanner, EmaSavePlanner, key_of
from dist_ema.checkpoint.reader import ShardReader
from dist_ema.checkpoint.shards import nbytes_of
from dist_ema.checkpoint.snapshot import copied, non_finite
from dist_ema.checkpoint.visibility import retried_when_visible
from dist_ema.checkpoint.writer import Orders, ShardWriter
from dist_ema.export.format import DTYPES
from dist_ema.files import target
from dist_ema.ranks import Ranks, digest
from dist_ema.schedule import same_rule

__all__ = [
    "CheckpointError",
    "Handle",
    "Part",
    "TensorInfo",
    "differing_schedules",
    "load",
    "refuse_non_finite",
    "save",
]


def save(
    path: str | Path,
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
    state: Mapping[str, Any],
    ranks: Ranks,
    *,
    asynchronous: bool = False,
) -> Handle | None:
    """Write averages to a directory that all ranks share. Collective: every rank calls it.

    What is at `path` is replaced, if it is a checkpoint, at one instant; files in it that are of no
    checkpoint are kept. Memory: one block; on rank 0, the manifest. Four small exchanges and one
    gather of the plan.

    With `asynchronous`, returns after one copy of the local bytes, and the rest happens on a thread
    that uses no process group (see [Note: letters]). The memory of the copy is kept for the next. A
    save or load that follows waits for it first.

    Args:
        averages: what this rank holds of each, by name. Names in the same order on every rank.
        tensors: all that is averaged, on every rank in the same order.
        state: JSON; see `dist_ema.checkpoint.parsing.check_state` for what it must have.

    Raises:
        CheckpointError: an average holds NaN or Inf (the tensors are named); a rank cannot write or
            does not see the directory; what is at `path` is no checkpoint. On every rank, and what
            was at `path` is as it was.
    """
    with agreed(ranks):
        background.settle()
        _check(averages, tensors, state)
        state = json.loads(json.dumps(state))  # the caller's may change before it is written
        place = target(Path(path))
    refuse_different(ranks, (str(place), list(averages), digest(tensors)))
    with agreed(ranks):
        if asynchronous:
            averages, broken = copied(averages)
        else:
            broken = non_finite(averages)
    refuse_non_finite(broken, ranks)
    planner = EmaSavePlanner()
    writer = ShardWriter(place, list(averages), tensors, state, asynchronous=asynchronous)
    try:
        plan, metadata = _plan_save(planner, writer, averages, tensors, ranks)
        if asynchronous:
            rank, size = ranks.rank, ranks.size
            return background.start(
                place, lambda: _write_apart(planner, writer, plan, metadata, rank, size)
            )
        _write_together(planner, writer, plan, metadata, ranks)
    except BaseException:
        if ranks.rank == 0:
            writer.abandon()
        raise
    return None


def load(
    path: str | Path,
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
    ranks: Ranks,
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
    with agreed(ranks):
        background.settle()
    return retried_when_visible(
        Path(path), ranks, lambda: _load(Path(path), averages, tensors, ranks, strict, others)
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


# Saving.


def refuse_non_finite(broken: set[str], ranks: Ranks) -> None:
    """Raise on every rank if any found broken tensors, and name them. Collective."""
    if ranks.any(bool(broken)):
        names = sorted(set().union(*ranks.all_gather(broken)))
        raise CheckpointError(
            f"the average holds NaN or Inf in {', '.join(names)}; nothing is written"
        )


def _check(
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
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


def _keyed(averages: Mapping[str, Sequence[Part]], tensors: Sequence[TensorInfo]) -> dict[str, Any]:
    return {
        key_of(number, fqn): value
        for number, parts in enumerate(averages.values())
        for fqn, value in boxed(parts, tensors).items()
    }


@collector.paused()
def _plan_save(
    planner: EmaSavePlanner,
    writer: ShardWriter,
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
    ranks: Ranks,
) -> tuple[SavePlan, Metadata | None]:
    """What this rank writes, and on rank 0 what there will be; the directory is made. Collective.

    As `torch.distributed.checkpoint.save` does it, without raising what `except Exception` misses
    on the way, and apart from the writing.
    """
    coordinates = ranks.rank == 0
    with agreed(ranks):
        planner.set_up_planner(_keyed(averages, tensors), None, coordinates)
        writer.set_up_storage_writer(coordinates)
        plan = writer.prepare_local_plan(planner.create_local_plan())
    plans: list[SavePlan] = ranks.gather(plan)
    metadata = None
    with agreed(ranks):
        if coordinates:
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
    orders: Orders = ranks.scatter([p.storage_data for p in plans])
    with agreed(ranks):
        writer.check_seen(orders)
    return planner.finish_plan(dataclasses.replace(plan, storage_data=orders)), metadata


def _write_together(
    planner: EmaSavePlanner,
    writer: ShardWriter,
    plan: SavePlan,
    metadata: Metadata | None,
    ranks: Ranks,
) -> None:
    with agreed(ranks):
        sums = _write(planner, writer, plan)
    every = ranks.gather(sums)
    with agreed(ranks):
        if metadata is not None:
            writer.finish(metadata, _results(planner.global_plan, every))


def _write_apart(
    planner: EmaSavePlanner,
    writer: ShardWriter,
    plan: SavePlan,
    metadata: Metadata | None,
    rank: int,
    size: int,
) -> None:
    """The same on a thread: what ranks tell one another goes through files."""
    orders: Orders = plan.storage_data
    letters = Letters(Path(orders.letters), Path(orders.directory), rank, size)
    sums: list[list[str]] = []
    problem: Exception | None = None
    try:
        sums = _write(planner, writer, plan)
    except Exception as error:
        problem = error
        writer.remove_own()
    report = {"problem": None if problem is None else described(problem), "sums": sums}
    if metadata is None:
        letters.report(report)
        lost = letters.outcome(lambda: writer.is_in_place(orders))
    else:
        try:
            told = [report, *(letters.reports() if size > 1 else [])]
            problems = [each["problem"] if each else "could not write" for each in told]
            if any(problems):
                raise CheckpointError(merged(problems))
            writer.finish(metadata, _results(planner.global_plan, [each["sums"] for each in told]))
            lost = None
        except Exception as error:
            problem, lost = problem or error, described(error)
        if size > 1:
            letters.conclude(lost)
        if lost is not None:
            writer.abandon()
    if lost is not None:
        raise CheckpointError(lost) from problem


def _write(planner: EmaSavePlanner, writer: ShardWriter, plan: SavePlan) -> list[list[str]]:
    """Write this rank's files. Returns the checksums of each item's blocks."""
    return [list(result.storage_data) for result in writer.write_data(plan, planner).wait()]


@collector.paused()
def _results(plans: Sequence[SavePlan], sums: Sequence[list[list[str]]]) -> list[list[WriteResult]]:
    return [
        [
            WriteResult(item.index, nbytes_of(item), tuple(found))
            for item, found in zip(plan.items, theirs, strict=True)
        ]
        for plan, theirs in zip(plans, sums, strict=True)
    ]


# Loading.


def _load(
    path: Path,
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
    ranks: Ranks,
    strict: bool,
    others: Collection[str],
) -> dict[str, Any]:
    files: Files | None = None
    try:
        with agreed(ranks):
            files, about = open_any(path)
        assert files is not None
        refuse_different(ranks, about.id or digest(about), what="checkpoints")
        with agreed(ranks):
            try:
                found = match(about, list(averages), tensors, others, strict=strict)
            except CheckpointError as error:
                raise CheckpointError(f"{files.directory}: {error}") from None
            _check_files(files, about, found, ranks)
        _read(files, about, found, averages, tensors, ranks)
    finally:
        if files is not None:
            files.close()
    for note in found.notes:
        warnings.warn(f"{files.directory}: {note}", stacklevel=6)
    return dict(about.state)


def _check_files(files: Files, about: Manifest, found: Match, ranks: Ranks) -> None:
    """Compare lengths and headers of all files, each on one rank. Local."""
    plain = not about.algorithm
    averages = [about.averages[consolidated.NAME if plain else name] for name in found.sources]
    every = [(average, name) for average in averages for name in average.files]
    for average, name in every[ranks.rank :: ranks.size]:
        check_file(files, about, average, name)


def _read(
    files: Files,
    about: Manifest,
    found: Match,
    averages: Mapping[str, Sequence[Part]],
    tensors: Sequence[TensorInfo],
    ranks: Ranks,
) -> None:
    """Check all that is needed, agree, and only then copy. Collective."""
    planner = EmaLoadPlanner()
    with agreed(ranks), collector.paused():
        values = _keyed(averages, tensors)
        sources = {
            key_of(number, fqn): source
            for number, name in enumerate(averages)
            for fqn, source in found.sources[name].items()
        }
        reader = ShardReader(files, about, sources)
        metadata = reader.read_metadata()
        wanted = {key: values[key] for key in sources if values[key].numel()}
        planner.set_up_planner(wanted, metadata, ranks.rank == 0)
        reader.set_up_storage_reader(metadata, ranks.rank == 0)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.check(plan)
    with agreed(ranks), torch.no_grad():
        try:
            reader.read_data(plan, planner).wait()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; it was good a moment before, and the average is overwritten in part: "
                "load again"
            ) from error
