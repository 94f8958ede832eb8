"""Averages of any width, made after the run from those of two widths that were kept in it.

    ema = ShardedEMA(model, decay={"narrow": PowerFunction(sigma_rel=0.05),
                                   "wide": PowerFunction(sigma_rel=0.10)})
    ...                                 # ema.update() every step, ema.save(...) from time to time
    synthesize(["run/ema-001000", "run/ema-002000"], sigma_rel=0.07, out="run/ema-0.07")

After arXiv 2312.02696, section 3. `profiles` fits the profile, `combine` streams the weights.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch

from dist_ema.checkpoint.directory import refuse_foreign, replaced_directory, target
from dist_ema.checkpoint.writer import written_by
from dist_ema.core.errors import CheckpointError
from dist_ema.core.safetensors import torch_dtype
from dist_ema.posthoc.combine import Output, combine
from dist_ema.posthoc.profiles import Profile, fit
from dist_ema.posthoc.snapshots import (
    SYNTHESIZED,
    Snapshot,
    match_tensors,
    open_snapshots,
    refuse_overlap,
    snapshot_at,
)
from dist_ema.schedule import PowerFunction, decay_at, to_json

NAME = "ema"  # of the average in a result
_MAX_GAMMA = 30_000.0  # beyond it the fit of long runs is no longer exact
_MAX_WIDTHS = 256
_BAD_RESIDUAL = 0.1

Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True, slots=True)
class SynthesisResult:
    """A synthesized average, and how well it fits."""

    path: Path  # the checkpoint that was written
    schedule: PowerFunction
    step: int
    residual: float  # norm of the difference to the wanted profile, relative to the profile's
    coefficients: dict[tuple[str, str], float]  # by checkpoint and name of the average in it

    def __str__(self) -> str:
        return (
            f"{self.path}: sigma_rel {self.schedule.sigma_rel:.6g}, gamma "
            f"{self.schedule.gamma:.6g}, step {self.step}; from {len(self.coefficients)} averages, "
            f"residual {self.residual:.2g}"
        )

    def summary(self) -> dict[str, object]:
        """The fields as JSON holds them."""
        return {
            "path": str(self.path),
            "sigma_rel": self.schedule.sigma_rel,
            "gamma": self.schedule.gamma,
            "step": self.step,
            "residual": self.residual,
            "from": [
                {"checkpoint": path, "average": name, "coefficient": x}
                for (path, name), x in self.coefficients.items()
            ],
        }

    @property
    def problem(self) -> str | None:
        """A warning, if the profile fits badly."""
        if self.residual <= _BAD_RESIDUAL:
            return None
        return (
            f"{self.path}: the profile of sigma_rel={self.schedule.sigma_rel:.4g} at step "
            f"{self.step} fits badly, with a residual of {self.residual:.0%}; save more often, or "
            "keep averages of a smaller and a larger width"
        )


def synthesize(
    checkpoints: Iterable[str | Path],
    *,
    gamma: float | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
    out: str | Path,
) -> SynthesisResult:
    """Write the power-function average of another width, from checkpoints of one run.

    The checkpoints hold averages that `ShardedEMA` kept with `PowerFunction` schedules, usually two
    or more widths, and may have been saved by different engines and world sizes. The result is the
    least-squares fit to the average that would have been kept with this width, under the same
    `start_step` and `update_every`. It is a sharded checkpoint of one average, named "ema", sharded
    like the checkpoint at `step`, for `ShardedEMA.load` and `dist-ema inspect`, `verify` and
    `export`. A width that is stored at `step` is copied bit for bit.

    Local: one process, without a process group; do not call it on several ranks. Reads every
    checkpoint once and verifies checksums; sums are computed in float64. Memory: about 150 MB, and
    the manifests.

    Args:
        checkpoints: directories, in any order. All of them are used.
        gamma: exponent of the wanted profile; or
        sigma_rel: its standard deviation relative to the training so far, at most 0.3002.
        step: step of the wanted average, which must be stored; the last if None.
        out: directory to write. A checkpoint in it is replaced atomically.

    Warns:
        UserWarning: the residual of the profile is above 0.1.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another model (names, shapes and dtypes are
            listed), run or schedule; or the result would not be finite.
        ValueError: not exactly one width is given; no checkpoint is of `step`, or one is later; one
            is given twice; `out` is among them. Nothing is written.
    """
    wanted = PowerFunction(gamma, sigma_rel=sigma_rel)
    (result,) = sweep(checkpoints, {Path(out): wanted}, step=step)
    if result.problem:
        warnings.warn(result.problem, stacklevel=2)
    return result


def sweep(
    checkpoints: Iterable[str | Path],
    wanted: Mapping[Path, PowerFunction],
    *,
    step: int | None = None,
    progress: Progress = lambda total: nullcontext(lambda nbytes: None),
) -> list[SynthesisResult]:
    """Write several widths in one pass over the files; see `synthesize`. Local.

    Args:
        wanted: the widths, by the directory to write.
        progress: called with the bytes to read; a context manager of a function that is called with
            the bytes read since the last call.
    """
    if isinstance(checkpoints, str | os.PathLike):
        raise ValueError(f"checkpoints is {checkpoints!r}, wanted a list of paths")
    paths = [Path(path) for path in checkpoints]
    if not paths:
        raise ValueError("no checkpoints are given")
    largest = max((schedule.gamma for schedule in wanted.values()), default=0.0)
    if largest > _MAX_GAMMA:
        raise ValueError(
            f"gamma is {largest:g}, wanted at most {_MAX_GAMMA:g}: a narrower profile "
            "would average the last few steps only"
        )
    _check_outputs(list(wanted), paths)
    with ExitStack() as stack:
        snapshots = open_snapshots(paths, stack)
        like = snapshot_at(snapshots, step)
        names = [match_tensors(one, like) for one in snapshots]
        noise = _noise(like)
        for one in snapshots:
            for name in one.average.files:
                one.checkpoint.check_file(one.average, name)
        count = like.profile.count
        profiles = [Profile(schedule.gamma, count) for schedule in wanted.values()]
        fits = fit([one.profile for one in snapshots], profiles, noise)
        keys = [(str(one.path), one.name) for one in snapshots]
        results = [
            SynthesisResult(
                target(path),
                schedule,
                like.step,
                fitted.residual,
                dict(zip(keys, fitted.coefficients, strict=True)),
            )
            for (path, schedule), fitted in zip(wanted.items(), fits, strict=True)
        ]
        _write(snapshots, names, like, results, progress)
    return results


def parse_widths(
    out: Path, gamma: float | None, sigma_rel: float | None, widths: str | None
) -> dict[Path, PowerFunction]:
    """The widths of the command line: one, or "FROM:TO:BY" of sigma_rel with both ends.

    Raises:
        ValueError: this is no range, or no power function has such a width.
    """
    if widths is None:
        return {out: PowerFunction(gamma, sigma_rel=sigma_rel)}
    try:
        # Decimals: names are as written, and 0.1 is the same float as in the run.
        first, last, by = map(Decimal, widths.split(":"))
        num = int((last - first) / by) + 1 if last >= first and by > 0 else 0
    except (ValueError, ArithmeticError):
        num = 0
    if not 0 < num <= _MAX_WIDTHS:
        raise ValueError(
            f"--sweep is {widths!r}, wanted FROM:TO:BY such as 0.05:0.25:0.05, of at most "
            f"{_MAX_WIDTHS} widths"
        )
    return {
        out / f"sigma_rel-{first + i * by}": PowerFunction(sigma_rel=float(first + i * by))
        for i in range(num)
    }


def _check_outputs(outputs: Sequence[Path], checkpoints: Sequence[Path]) -> None:
    if not 0 < len(outputs) <= _MAX_WIDTHS:
        raise ValueError(
            f"{len(outputs)} widths are wanted, the limit is {_MAX_WIDTHS} in one pass"
        )
    places = [Path(os.path.realpath(out)) for out in outputs]
    for out in outputs:
        refuse_overlap(out, checkpoints)
    if len(set(places)) < len(places):
        raise ValueError(
            f"several widths would be written to one of {', '.join(map(str, outputs))}"
        )


def _noise(like: Snapshot) -> float:
    """The relative error of stored numbers: the epsilon of the coarsest dtype."""
    noise = 0.0
    for fqn, tensor in like.average.tensors.items():
        dtype = torch_dtype(tensor.dtype)
        if not (dtype.is_floating_point or dtype.is_complex) or tensor.dtype.startswith("F8"):
            raise CheckpointError(f"{like}: {fqn} has dtype {tensor.dtype}, which no average has")
        noise = max(noise, torch.finfo(dtype).eps)
    return noise


def _write(
    snapshots: Sequence[Snapshot],
    names: Sequence[Mapping[str, str]],
    like: Snapshot,
    results: Sequence[SynthesisResult],
    progress: Progress,
) -> None:
    coefficients = [list(result.coefficients.values()) for result in results]
    used = [i for i in range(len(snapshots)) if any(row[i] for row in coefficients)]
    with ExitStack() as stack:
        outputs = []
        for result, row in zip(results, coefficients, strict=True):
            refuse_foreign(result.path)
            try:
                directory = stack.enter_context(replaced_directory(result.path))
            except OSError as error:
                raise CheckpointError(f"{result.path}: {error.strerror or error}") from error
            origin = {k: result.summary()[k] for k in ("sigma_rel", "residual", "from")}
            outputs.append(
                Output(
                    directory,
                    uuid.uuid4().hex,
                    NAME,
                    [row[i] for i in used],
                    _state(like, result.schedule),
                    written_by(1) | {SYNTHESIZED: origin},
                )
            )
        selected = [snapshots[i] for i in used]
        with progress(sum(one.average.nbytes for one in selected)) as advance:
            try:
                combine(selected, [names[i] for i in used], like, outputs, advance)
            except OSError as error:
                path = error.filename or results[0].path
                raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _state(like: Snapshot, schedule: PowerFunction) -> dict[str, object]:
    """The counters with which the average continues as if it had been kept."""
    state, every = like.checkpoint.state, like.checkpoint.state["update_every"]
    decay = decay_at(schedule, like.profile.count * every, every)
    average = {"schedule": to_json(schedule), "decay": decay, "mixed": True}
    return {**state, "averages": {NAME: average}}  # keeps "model", the layout of the model
