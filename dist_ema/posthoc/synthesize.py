"""Averages of any width, made after the run from those of two widths that were kept in it.

    ema = ShardedEMA(model, decay={"narrow": PowerFunction(sigma_rel=0.05),
                                   "wide": PowerFunction(sigma_rel=0.10)})
    ...                                 # ema.update() every step, ema.save(...) from time to time
    synthesize(["run/ema-001000", "run/ema-002000"], sigma_rel=0.07, out="run/ema-0.07")

After arXiv 2312.02696, section 3. `dist_ema.posthoc.profiles` fits the profile;
`dist_ema.posthoc.combine` streams the weights.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch

from dist_ema.checkpoint.directory import refuse_foreign, replaced_directory, target
from dist_ema.checkpoint.writer import written_by
from dist_ema.core.errors import CheckpointError
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.combine import Result, Term, combine
from dist_ema.posthoc.profiles import Fit, Profile, fit
from dist_ema.posthoc.snapshots import (
    SYNTHESIZED,
    Stored,
    at_step,
    check_all,
    counterpart,
    open_all,
    refuse_other_models,
)
from dist_ema.schedule import PowerFunction, decay_at, to_json

NAME = "ema"  # of the one average of a result
_MAX_GAMMA = 30_000.0  # beyond it the fit of long runs is no longer exact
_MAX_WIDTHS = 256
_BAD_RESIDUAL = 0.1

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True, slots=True)
class Synthesis:
    """An average that was synthesized, and how well."""

    path: Path  # the checkpoint that was written
    schedule: PowerFunction  # wanted
    step: int
    residual: float  # of the profile: norm of what no sum of the stored ones has, relative
    coefficients: dict[tuple[str, str], float]  # by checkpoint and name of the average in it

    def __str__(self) -> str:
        return (
            f"{self.path}: sigma_rel {self.schedule.sigma_rel:.6g}, gamma "
            f"{self.schedule.gamma:.6g}, step {self.step}; from {len(self.coefficients)} averages, "
            f"residual {self.residual:.2g}"
        )

    @property
    def problem(self) -> str | None:
        """What to warn of, if the profile is matched badly."""
        if self.residual <= _BAD_RESIDUAL:
            return None
        return (
            f"{self.path}: the profile of sigma_rel={self.schedule.sigma_rel:.4g} at step "
            f"{self.step} is matched badly, with a residual of {self.residual:.0%}; save more "
            "often, or keep averages of widths on both sides of it"
        )


def synthesize(
    checkpoints: Iterable[str | Path],
    *,
    gamma: float | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
    out: str | Path,
) -> Synthesis:
    """Write the power-function average of another width, from checkpoints of one run.

    The checkpoints hold averages that `ShardedEMA` kept with `PowerFunction` schedules, two or more
    widths as a rule, and may have been saved by different engines and world sizes. The result is
    the best least-squares fit to the average that would have been kept with this width, under the
    same `start_step` and `update_every`. It is a sharded checkpoint of one average, named "ema",
    cut like the checkpoint at `step`: `ShardedEMA.load` and `dist-ema inspect`, `verify` and
    `export` take it. A width that is stored at `step` is copied bit for bit.

    Local: one process, without a process group; do not call it on several ranks. Reads every
    checkpoint once, checking checksums; the sums are made in float64. Memory: about 150 MB, and the
    manifests.

    Args:
        checkpoints: directories, in any order. All of them are used.
        gamma: exponent of the wanted profile; or
        sigma_rel: its standard deviation relative to the training so far, at most 0.3002.
        step: at which the average is wanted, one that is stored; the last if None.
        out: directory to be written. A checkpoint that is there is replaced at one instant.

    Warns:
        UserWarning: the residual of the profile is above 0.1.

    Raises:
        CheckpointError: a checkpoint is cut short, altered, or of another model (names, shapes and
            dtypes are listed), run or schedule; or the result would not be finite.
        ValueError: not exactly one width is given; no checkpoint is of `step`, or one is of a later
            step; one is given twice; `out` is among them. Nothing is written.
    """
    wanted = PowerFunction(gamma, sigma_rel=sigma_rel)
    (made,) = sweep(checkpoints, {Path(out): wanted}, step=step)
    if made.problem:
        warnings.warn(made.problem, stacklevel=2)
    return made


def sweep(
    checkpoints: Iterable[str | Path],
    wanted: dict[Path, PowerFunction],
    *,
    step: int | None = None,
    progress: Progress = lambda total: nullcontext(lambda nbytes: None),
) -> list[Synthesis]:
    """Write several widths in one pass over the files, as `synthesize` does one. Local.

    Args:
        wanted: the widths, by the directory to be written.
        progress: given the bytes to be read, a context that gives a function to be called with the
            bytes that were read since the last call.
    """
    paths = _paths(checkpoints)
    narrow = [schedule.gamma for schedule in wanted.values() if schedule.gamma > _MAX_GAMMA]
    if narrow:
        raise ValueError(
            f"gamma is {max(narrow):g}, wanted at most {_MAX_GAMMA:g}: so narrow a profile is the "
            "weights of the last few steps"
        )
    _check_outs(list(wanted), paths)
    with ExitStack() as closing:
        stored = open_all(paths, closing)
        like = at_step(stored, step)
        refuse_other_models(stored, like)
        noise = _noise(like)
        check_all(stored)
        count = like.profile.count
        profiles = [Profile(schedule.gamma, count) for schedule in wanted.values()]
        fits = fit([one.profile for one in stored], profiles, noise)
        made = [
            Synthesis(
                target(path),
                schedule,
                like.step,
                found.residual,
                {
                    (str(one.path), one.name): x
                    for one, x in zip(stored, found.coefficients, strict=True)
                },
            )
            for (path, schedule), found in zip(wanted.items(), fits, strict=True)
        ]
        _write(stored, like, made, fits, progress)
    return made


def asked(
    out: Path, gamma: float | None, sigma_rel: float | None, between: str | None
) -> dict[Path, PowerFunction]:
    """What the command line asks for: one width, or "FROM:TO:BY" of sigma_rel, both ends in it.

    Raises:
        ValueError: this is no range, or no power function has such a width.
    """
    if between is None:
        return {out: PowerFunction(gamma, sigma_rel=sigma_rel)}
    try:
        # In decimals: names are as they are written, and 0.1 is the float that a run was given.
        first, last, by = map(Decimal, between.split(":"))
        num = int((last - first) / by) + 1 if last >= first and by > 0 else 0
    except (ValueError, ArithmeticError):
        num = 0
    if not 0 < num <= _MAX_WIDTHS:
        raise ValueError(
            f"--sweep is {between!r}, wanted FROM:TO:BY such as 0.05:0.25:0.05, of at most "
            f"{_MAX_WIDTHS} widths"
        )
    return {
        out / f"sigma_rel-{first + i * by}": PowerFunction(sigma_rel=float(first + i * by))
        for i in range(num)
    }


def _write(
    stored: Sequence[Stored],
    like: Stored,
    made: Sequence[Synthesis],
    fits: Sequence[Fit],
    progress: Progress,
) -> None:
    used = [i for i in range(len(stored)) if any(found.coefficients[i] for found in fits)]
    terms = [_term(stored[i], like) for i in used]
    with ExitStack() as replacing:
        results = []
        for one, found in zip(made, fits, strict=True):
            refuse_foreign(one.path)
            try:
                directory = replacing.enter_context(replaced_directory(one.path))
            except OSError as error:
                raise CheckpointError(f"{one.path}: {error.strerror or error}") from error
            results.append(
                Result(
                    directory,
                    uuid.uuid4().hex,
                    NAME,
                    [found.coefficients[i] for i in used],
                    _state(like, one.schedule),
                    written_by(1) | {SYNTHESIZED: _account(one)},
                )
            )
        with progress(sum(stored[i].nbytes for i in used)) as advance:
            try:
                combine(terms, _term(like, like), results, advance)
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or made[0].path}: {error.strerror or error}"
                ) from error


def _paths(checkpoints: Iterable[str | Path]) -> list[Path]:
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"checkpoints is {checkpoints!r}, wanted a list of paths")
    paths = [Path(path) for path in checkpoints]
    if not paths:
        raise ValueError("no checkpoints are given")
    return paths


def _check_outs(outs: Sequence[Path], checkpoints: Sequence[Path]) -> None:
    if not 0 < len(outs) <= _MAX_WIDTHS:
        raise ValueError(f"{len(outs)} widths are wanted; 1 to {_MAX_WIDTHS} are made in one pass")
    taken = {target(path).resolve(): path for path in checkpoints}
    for out in outs:
        place = target(out).resolve()
        for other, path in taken.items():
            if place == other or place.is_relative_to(other) or other.is_relative_to(place):
                raise ValueError(f"out {out} would be written over the checkpoint {path}")
    if len({target(out).resolve() for out in outs}) < len(outs):
        raise ValueError(f"several widths would be written to one of {', '.join(map(str, outs))}")


def _noise(like: Stored) -> float:
    """The relative error of stored numbers: the epsilon of the coarsest dtype among them."""
    found = 0.0
    for fqn, tensor in like.average.tensors.items():
        dtype = torch_dtype(tensor.dtype)
        if not (dtype.is_floating_point or dtype.is_complex) or tensor.dtype.startswith("F8"):
            raise CheckpointError(f"{like}: {fqn} has dtype {tensor.dtype}, which no average has")
        found = max(found, torch.finfo(dtype).eps)
    return found


def _term(stored: Stored, like: Stored) -> Term:
    names = {}
    for fqn, tensor in like.average.tensors.items():
        own = counterpart(stored.average, fqn, tensor.aliases)
        assert own is not None  # of another model, which is refused
        names[fqn] = own
    return Term(stored.checkpoint, stored.average, names)


def _state(like: Stored, schedule: PowerFunction) -> dict[str, object]:
    """The counters with which the average goes on as if it had been kept."""
    state, every = like.checkpoint.state, like.checkpoint.state["update_every"]
    decay = decay_at(schedule, like.profile.count * every, every)
    return {
        **state,  # what it says of the model too
        "averages": {NAME: {"schedule": to_json(schedule), "decay": decay, "mixed": True}},
    }


def _account(made: Synthesis) -> dict[str, object]:
    return {
        "sigma_rel": made.schedule.sigma_rel,
        "residual": made.residual,
        "from": [
            {"checkpoint": path, "average": name, "coefficient": x}
            for (path, name), x in made.coefficients.items()
        ],
    }
