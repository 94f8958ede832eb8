"""The power-function averages that checkpoints hold, and all that keeps them from being combined.

[Note: what a stored average is]
Its profile (see [Note: profiles]) is that of its schedule only if its updates were the schedule's
from the first to the last. The state of a checkpoint tells: `step`, `start_step` and `update_every`
say how many updates there must have been, `num_updates` how many there were, and the decay last
applied is that of the last of them. Steps that were skipped (`update(step=...)` with gaps), a
schedule that was changed on the way and an average that was begun anew in a resumed run are seen by
that, or noted when a checkpoint is loaded, and refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ema.checkpoint.manifest import SavedAverage
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.core.errors import CheckpointError
from dist_ema.posthoc.profiles import Profile
from dist_ema.schedule import PowerFunction, decay_at, from_json

SYNTHESIZED = "synthesized"  # key of `Manifest.written`
_SHOWN = 8  # tensors in a message
_MAX_OPEN = 512  # files at a time, over all checkpoints


@dataclass(frozen=True, slots=True)
class Stored:
    """One power-function average of one checkpoint, open to be read."""

    path: Path
    name: str
    schedule: PowerFunction
    step: int
    profile: Profile
    checkpoint: Checkpoint
    average: SavedAverage

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.average.tensors.values())

    def __str__(self) -> str:
        return f"{self.path} ({self.name!r})"


def open_all(paths: Sequence[Path], closing: ExitStack) -> list[Stored]:
    """Every power-function average of these checkpoints, in the order of steps. Reads manifests.

    Other averages beside one in the same checkpoint are left out.

    Args:
        closing: closes the files when it is closed.

    Raises:
        CheckpointError: a checkpoint is cut short or none, has no such average or another profile
            than its schedule says, or was synthesized.
        ValueError: a checkpoint is given twice, or two averages have one profile.
    """
    found: list[Stored] = []
    seen: dict[str, Path] = {}
    for path in paths:
        checkpoint = closing.enter_context(Checkpoint(path))
        checkpoint.files.max_open = max(1, _MAX_OPEN // len(paths))
        save_id = checkpoint.manifest.id
        if save_id and save_id in seen:
            raise ValueError(f"{path}: is the same checkpoint as {seen[save_id]}; give it once")
        seen[save_id] = path
        found += _averages(path, checkpoint)
    found.sort(key=lambda stored: (stored.step, stored.profile.gamma))
    _refuse_twins(found)
    _refuse_other_rules(found)
    return found


def at_step(stored: Sequence[Stored], step: int | None) -> Stored:
    """An average at the step for which one is wanted, which must be the last that is given.

    Raises:
        ValueError: no checkpoint is of this step, or one is of a later one.
    """
    steps = sorted({one.step for one in stored})
    told = ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint is of step {step}; there are steps {told}")
    wanted = steps[-1] if step is None else step
    late = [str(one.path) for one in stored if one.step > wanted]
    if late:
        raise ValueError(
            f"{', '.join(dict.fromkeys(late))}: later than the step {wanted} that is wanted; an "
            "average at a step is made of what was saved up to it, so leave them out"
        )
    return next(one for one in stored if one.step == wanted)


def refuse_other_models(stored: Sequence[Stored], like: Stored) -> None:
    """Refuse averages of other tensors than those of one of them.

    Raises:
        CheckpointError: names, shapes or dtypes differ; it lists them for the first such average.
    """
    for other in stored:
        differences = list(_differences(other.average, like.average))
        if differences:
            more = len(differences) - _SHOWN
            raise CheckpointError(
                f"{other}: is of another model than {like}: {'; '.join(differences[:_SHOWN])}"
                + (f"; and {more} more" if more > 0 else "")
            )


def check_all(stored: Sequence[Stored]) -> None:
    """Refuse files that are missing, cut short or have an altered header, before any is read."""
    for one in stored:
        for name in one.average.files:
            one.checkpoint.check_file(one.average, name)


def counterpart(average: SavedAverage, fqn: str, aliases: Sequence[str]) -> str | None:
    """The name that an average has for a tensor: it may be tied, and known by another name."""
    for name in (fqn, *aliases):
        if name in average.tensors:
            return name
    wanted = {fqn, *aliases}
    return next((n for n, t in average.tensors.items() if wanted & set(t.aliases)), None)


def _averages(path: Path, checkpoint: Checkpoint) -> Iterator[Stored]:
    about = checkpoint.manifest
    if not about.state:
        raise CheckpointError(
            f"{path}: holds plain weights without counters and schedules; give checkpoints that "
            "ShardedEMA.save wrote"
        )
    if SYNTHESIZED in about.written:
        raise CheckpointError(
            f"{path}: was synthesized; its profile is only near to that of its schedule. Give the "
            "checkpoints that were saved during the run"
        )
    told: dict[str, str] = {}
    any_found = False
    for name, average in about.averages.items():
        schedule = about.state["averages"][name]["schedule"]
        told[name] = str(schedule.get("kind"))
        if told[name] == "PowerFunction":
            any_found = True
            yield _stored(path, name, checkpoint, average)
    if not any_found:
        raise CheckpointError(
            f"{path}: has no average with a PowerFunction schedule, but "
            + ", ".join(f"{name!r} with {kind}" for name, kind in told.items())
        )


def _stored(path: Path, name: str, checkpoint: Checkpoint, average: SavedAverage) -> Stored:
    state = checkpoint.state
    own = state["averages"][name]
    where = f"{path} ({name!r})"
    try:
        schedule = from_json(own["schedule"])
        assert isinstance(schedule, PowerFunction)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    every, start = _whole(state, "update_every", 1, where), _whole(state, "start_step", 0, where)
    step, num_updates = state["step"], state["num_updates"]
    count = (step - start) // every
    if count < 1:
        raise CheckpointError(
            f"{where}: was saved at step {step}, before its first update as a power function "
            f"(start_step={start}, update_every={every}); it is a copy of the weights"
        )
    if num_updates != start + count:
        raise CheckpointError(
            f"{where}: has had {num_updates} updates by step {step}, wanted {start + count} "
            f"(start_step={start}, update_every={every}); steps were skipped or counted twice, so "
            "its profile is not known"
        )
    if own.get("mixed"):
        raise CheckpointError(
            f"{where}: {schedule} did not make it alone: it was loaded from an average with "
            "another schedule, or from a synthesized one"
        )
    decay, expected = own["decay"], decay_at(schedule, count * every, every)
    if decay is None or not math.isclose(decay, expected, rel_tol=1e-9, abs_tol=1e-12):
        raise CheckpointError(
            f"{where}: its last decay is {decay}, and {schedule} has {expected} at step {step}; "
            "it was not made by this schedule"
        )
    profile = Profile(schedule.gamma, count)
    return Stored(path, name, schedule, step, profile, checkpoint, average)


def _whole(state: Any, key: str, least: int, where: str) -> int:
    value = state.get(key)
    if type(value) is not int or not least <= value < 1 << 63:
        raise CheckpointError(f"{where}: {key} is {value!r}, wanted a whole number >= {least}")
    return value


def _refuse_twins(found: Sequence[Stored]) -> None:
    first: dict[Profile, Stored] = {}
    for one in found:
        if one.profile in first:
            raise ValueError(
                f"{one} has the same profile as {first[one.profile]}: {one.schedule} after "
                f"{one.profile.count} updates; give one of them"
            )
        first[one.profile] = one


def _refuse_other_rules(found: Sequence[Stored]) -> None:
    """Refuse averages that were not kept side by side under one set of options."""
    by_name: dict[str, Stored] = {}
    for one in found:
        for key in ("start_step", "update_every"):
            ours, theirs = one.checkpoint.state[key], found[0].checkpoint.state[key]
            if ours != theirs:
                raise CheckpointError(
                    f"{one} has {key}={ours}, and {found[0]} has {theirs}; they are not of one run"
                )
        first = by_name.setdefault(one.name, one)
        if one.schedule != first.schedule:
            raise CheckpointError(
                f"{one} has {one.schedule}, and {first} has {first.schedule}; they are not of one "
                "run, or the schedule was changed on the way"
            )


def _differences(found: SavedAverage, wanted: SavedAverage) -> Iterator[str]:
    used = set()
    for fqn, tensor in wanted.tensors.items():
        name = counterpart(found, fqn, tensor.aliases)
        if name is None:
            yield f"{fqn} is missing"
            continue
        used.add(name)
        other = found.tensors[name]
        if other.shape != tensor.shape:
            yield f"{fqn} has shape {other.shape}, wanted {tensor.shape}"
        if other.dtype != tensor.dtype:
            yield f"{fqn} has dtype {other.dtype}, wanted {tensor.dtype}"
    for name in found.tensors:
        if name not in used:
            yield f"{name} is unexpected"
