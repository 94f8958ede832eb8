"""Power-function averages in checkpoints, and the checks that they can be combined.

[Note: the profile of a snapshot]
An average has the profile of its schedule (see [Note: profiles]) only if the schedule made all of
its updates. The state of a checkpoint shows that: `step`, `start_step` and `update_every` say how
many updates there must have been, `num_updates` how many there were, and the last decay applied is
that of the last of them. Skipped steps (`update(step=...)` with gaps), a changed schedule and an
average that was started again in a resumed run are detected by that, or noted when a checkpoint is
loaded, and refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from dist_ema.checkpoint.manifest import SavedAverage
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.core.errors import CheckpointError, listed
from dist_ema.posthoc.profiles import Profile
from dist_ema.schedule import PowerFunction, decay_at, from_json

SYNTHESIZED = "synthesized"  # key of `Manifest.written`


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A power-function average in an open checkpoint."""

    path: Path
    name: str
    schedule: PowerFunction
    step: int
    profile: Profile
    checkpoint: Checkpoint
    average: SavedAverage

    def __str__(self) -> str:
        return f"{self.path} ({self.name!r})"


def open_snapshots(paths: Sequence[Path], stack: ExitStack) -> list[Snapshot]:
    """Every power-function average of some checkpoints, ordered by step. Reads the manifests.

    Other averages in the same checkpoints are ignored.

    Args:
        stack: closes the checkpoints.

    Raises:
        CheckpointError: a checkpoint is damaged, was synthesized, has no such average, or one with
            another profile than its schedule's; or they are not of one run.
        ValueError: a checkpoint is given twice, or two averages have the same profile.
    """
    opened = [(path, stack.enter_context(Checkpoint(path, num=len(paths)))) for path in paths]
    refuse_duplicates(opened)
    snapshots = [each for path, one in opened for each in _snapshots(path, one)]
    snapshots.sort(key=lambda one: (one.step, one.profile.gamma))
    _refuse_other_runs(snapshots)
    return snapshots


def snapshot_at(snapshots: Sequence[Snapshot], step: int | None) -> Snapshot:
    """A snapshot of the last step. If `step` is given, it must be the last one."""
    steps = sorted({one.step for one in snapshots})
    if step is not None and step not in steps:
        known = listed([str(each) for each in steps], separator=", ")
        raise ValueError(f"no checkpoint is of step {step}; there are steps {known}")
    wanted = steps[-1] if step is None else step
    late = dict.fromkeys(str(one.path) for one in snapshots if one.step > wanted)
    if late:
        raise ValueError(
            f"{', '.join(late)}: later than the wanted step {wanted}; an average at a step is made "
            "of checkpoints up to it, so leave them out"
        )
    return next(one for one in snapshots if one.step == wanted)


def match_tensors(snapshot: Snapshot, like: Snapshot) -> dict[str, str]:
    """The name in `snapshot` of each tensor of `like`: tied tensors may have another one.

    Raises:
        CheckpointError: tensors, shapes or dtypes differ; they are listed.
    """
    saved, known = snapshot.average.tensors, snapshot.average.names()
    names: dict[str, str] = {}
    differences = []
    for fqn, tensor in like.average.tensors.items():
        name = next((known[n] for n in (fqn, *tensor.aliases) if n in known), None)
        if name is None:
            differences.append(f"{fqn} is missing")
            continue
        names[fqn] = name
        other = saved[name]
        if other.shape != tensor.shape:
            differences.append(f"{fqn} has shape {other.shape}, wanted {tensor.shape}")
        if other.dtype != tensor.dtype:
            differences.append(f"{fqn} has dtype {other.dtype}, wanted {tensor.dtype}")
    used = set(names.values())
    differences += [f"{n} is unexpected" for n in saved if n not in used]
    if differences:
        raise CheckpointError(f"{snapshot}: is of another model than {like}: {listed(differences)}")
    return names


def refuse_duplicates(checkpoints: Iterable[tuple[Path, Checkpoint]]) -> None:
    """Raise ValueError if a checkpoint is given twice, or with a copy of it or a file in it."""
    seen: list[tuple[Path, str, set[str]]] = []
    for path, checkpoint in checkpoints:
        names = [a.path_of(name) for a in checkpoint.averages.values() for name in a.files]
        files = {os.path.realpath(checkpoint.directory / name) for name in names}
        for known, known_id, known_files in seen:
            common = files & known_files
            is_inside = common and common in (files, known_files)  # one is a subset of the other
            if is_inside or (known_id and known_id == checkpoint.manifest.id):
                raise ValueError(f"{path}: is the same checkpoint as {known}; give it once")
        seen.append((path, checkpoint.manifest.id, files))


def refuse_overlap(out: Path, checkpoints: Sequence[Path]) -> None:
    """Raise ValueError if a directory to write is, holds or is in a checkpoint that is read."""
    place = Path(os.path.realpath(out))
    for path in checkpoints:
        other = Path(os.path.realpath(path))
        if place.is_relative_to(other) or other.is_relative_to(place):
            raise ValueError(f"out {out} would be written over the checkpoint {path}")


def _snapshots(path: Path, checkpoint: Checkpoint) -> Iterator[Snapshot]:
    if checkpoint.is_plain:
        raise CheckpointError(
            f"{path}: holds plain weights without counters and schedules; give checkpoints that "
            "ShardedEMA.save wrote"
        )
    if SYNTHESIZED in checkpoint.manifest.written:
        raise CheckpointError(
            f"{path}: was synthesized, so its profile only approximates that of its schedule; give "
            "checkpoints that were saved during the run"
        )
    averages = checkpoint.state["averages"]
    kinds = {name: str(averages[name]["schedule"].get("kind")) for name in checkpoint.averages}
    if "PowerFunction" not in kinds.values():
        others = ", ".join(f"{name!r} with {kind}" for name, kind in kinds.items())
        raise CheckpointError(f"{path}: has no average with a PowerFunction schedule, but {others}")
    for name, kind in kinds.items():
        if kind == "PowerFunction":
            yield _snapshot(path, name, checkpoint)


def _snapshot(path: Path, name: str, checkpoint: Checkpoint) -> Snapshot:
    state, own = checkpoint.state, checkpoint.state["averages"][name]
    where = f"{path} ({name!r})"
    try:
        schedule = from_json(own["schedule"])
        assert isinstance(schedule, PowerFunction)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    every, start = _count(state, "update_every", 1, where), _count(state, "start_step", 0, where)
    step, num_updates = state["step"], state["num_updates"]
    rule = f"(start_step={start}, update_every={every})"
    count = (step - start) // every
    if count < 1:
        raise CheckpointError(
            f"{where}: was saved at step {step}, before its first update as a power function "
            f"{rule}; it is a copy of the weights"
        )
    if num_updates != start + count:
        raise CheckpointError(
            f"{where}: has {num_updates} updates at step {step}, wanted {start + count} {rule}; "
            "steps were skipped or counted twice, so its profile is not known"
        )
    if own.get("mixed"):
        raise CheckpointError(
            f"{where}: was not made by {schedule} alone: it was loaded from an average with "
            "another schedule, or from a synthesized one"
        )
    decay, expected = own["decay"], decay_at(schedule, count * every, every)
    if decay is None or not math.isclose(decay, expected, rel_tol=1e-9, abs_tol=1e-12):
        raise CheckpointError(
            f"{where}: its last decay is {decay}, and {schedule} has {expected} at step {step}; "
            "it was not made by this schedule"
        )
    profile, average = Profile(schedule.gamma, count), checkpoint.averages[name]
    return Snapshot(path, name, schedule, step, profile, checkpoint, average)


def _count(state: Mapping[str, object], key: str, least: int, where: str) -> int:
    value = state.get(key)
    if type(value) is not int or not least <= value < 1 << 63:
        raise CheckpointError(f"{where}: {key} is {value!r}, wanted a whole number >= {least}")
    return value


def _refuse_other_runs(snapshots: Sequence[Snapshot]) -> None:
    """Raise if snapshots have the same profile, or were not kept by one run with fixed options."""
    by_profile: dict[Profile, Snapshot] = {}
    by_name: dict[str, Snapshot] = {}
    for one in snapshots:
        same = by_profile.setdefault(one.profile, one)
        if same is not one:
            raise ValueError(
                f"{one} has the same profile as {same}: {one.schedule} after {one.profile.count} "
                "updates; give one of them"
            )
        first = snapshots[0]
        for key in ("start_step", "update_every"):
            values = one.checkpoint.state[key], first.checkpoint.state[key]
            if values[0] != values[1]:
                raise CheckpointError(
                    f"{one} has {key}={values[0]}, and {first} has {values[1]}; they are not of "
                    "one run"
                )
        named = by_name.setdefault(one.name, one)
        if one.schedule != named.schedule:
            raise CheckpointError(
                f"{one} has {one.schedule}, and {named} has {named.schedule}; they are not of one "
                "run, or the schedule was changed during it"
            )
