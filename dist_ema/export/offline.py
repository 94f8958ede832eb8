"""An export from a sharded checkpoint: one process, no model, no process group.

A checkpoint holds what is averaged, and a card of the model: the layout of its library, its
configuration, and what else belongs to it (frozen weights, buffers). The rest comes from a base, a
directory that the library wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.manifest import Manifest, SavedAverage, SavedTensor
from dist_ema.checkpoint.reader import PLAIN, Checkpoint
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import TensorMeta
from dist_ema.core.safetensors import torch_dtype
from dist_ema.export.card import Card, checked_card, guessed_card, name_in, with_config
from dist_ema.export.replace import replaced_files
from dist_ema.export.writing import (
    Writing,
    draft,
    refuse_broken,
    stale_files,
)

_BAND_BYTES = 32 << 20  # read, put together and written at a time
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_SHOWN = 8  # names in a message


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor of a checkpoint."""

    checkpoint: Checkpoint
    average: SavedAverage
    fqn: str

    @property
    def tensor(self) -> SavedTensor:
        return self.average.tensors[self.fqn]

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.tensor.dtype)

    def read(self, start: int, out: torch.Tensor) -> None:
        self.checkpoint.read(self.average, self.fqn, start, out)


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to write, and its source."""

    output: TensorMeta
    source: _Source


def export(
    checkpoint: Path,
    out: Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    weights_name: str | None = None,
    base: Path | None = None,
    progress: Callable[[int], Any] = lambda total: nullcontext(lambda nbytes: None),
) -> dict[str, Any]:
    """Write an average as a consolidated checkpoint, as `ShardedEMA.export` does, byte for byte.

    Local. Memory: a band of 32 MiB and a block, whatever the size of the model.

    Args:
        name: the average, where the checkpoint has several.
        dtype: of floating tensors; None for the average's, half-precision tensors that are not
            averaged being widened to fp32.
        base: a directory of safetensors with what is not averaged; config.json too where the
            checkpoint does not know the model's.
        progress: given the bytes to be read, a context manager of a function that is told how many
            were.

    Returns:
        {"library", "files", "nbytes"} of what was written.

    Raises:
        CheckpointError: the checkpoint or the base is cut short, altered or none; something that
            the model has is in neither. What is at `out` is as it was.
        ValueError: an argument is out of range, or the average holds NaN or Inf. The same.
    """
    with ExitStack() as opened:
        saved = opened.enter_context(Checkpoint(checkpoint))
        average = _average(saved.manifest, name, saved.directory)
        for file in average.files:
            saved.check_file(average, file)
        told: Mapping[str, Any] = saved.state.get("model", {})
        if not isinstance(told, dict):
            raise CheckpointError(f"{saved.directory}: tells of the model what makes no sense")
        if "problem" in told:
            raise CheckpointError(f"{saved.directory}: when it was saved, {told['problem']}")
        card = _card(told, base)
        items = [
            _Item(_output(fqn, source, dtype, averaged=True), source)
            for fqn, source in _sources(saved, average).items()
        ]
        items += _rest(told, card, items, base, dtype, opened)
        return _write(out, items, card, max_shard_size, weights_name, progress)


def dtype_named(name: str | None) -> torch.dtype | None:
    """A floating dtype by its name in torch, or a short one (bf16, fp16, fp32, fp64)."""
    if name is None:
        return None
    found = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}, wanted a floating one such as bf16 or float32")
    return found


def _write(
    out: Path,
    items: list[_Item],
    card: Card,
    max_shard_size: int | str,
    weights_name: str | None,
    progress: Callable[[int], Any],
) -> dict[str, Any]:
    plan = draft(
        [item.output for item in items],
        card,
        max_shard_size=max_shard_size,
        weights_name=weights_name,
    )
    stale_files(out, plan)  # raises early
    written = [item for item in items if item.output.fqn in plan.where]
    written.sort(key=lambda item: plan.start(item.output.fqn))
    with replaced_files(out, lambda: stale_files(out, plan)) as directory:
        with (
            closing(Writing(directory, plan)) as writing,
            progress(sum(item.source.tensor.nbytes for item in written)) as advance,
        ):
            writing.begin()
            for item in written:
                _copy(item, writing, advance)
            refuse_broken(sorted(writing.broken))
    return {
        "library": card["library"],
        "files": [*plan.files, *plan.texts],
        "nbytes": sum(file.nbytes for file in plan.files.values()),
    }


def _copy(item: _Item, writing: Writing, advance: Callable[[int], object]) -> None:
    numel = item.source.tensor.nbytes // item.source.dtype.itemsize
    step = _BAND_BYTES // item.source.dtype.itemsize
    for start in range(0, numel, step):
        band = torch.empty(min(step, numel - start), dtype=item.source.dtype)
        item.source.read(start, band)
        writing.band(item.output, start, band)
        advance(band.nbytes)


def _average(about: Manifest, name: str | None, where: Path) -> SavedAverage:
    names = list(about.averages)
    if name is None and len(names) > 1:
        raise ValueError(f"{where} holds several averages, {names}; say which by its name")
    if name is not None and name not in names:
        raise ValueError(f"{where} holds no average named {name!r}, but {names}")
    return about.averages[names[0] if name is None else name]


def _card(told: Mapping[str, Any], base: Path | None) -> Card:
    card = checked_card(told["card"]) if "card" in told else guessed_card(base)
    if base is None or card["texts"] or card["library"] == "plain":
        return card
    return with_config(card, base)


def _sources(checkpoint: Checkpoint, average: SavedAverage) -> dict[str, _Source]:
    return {fqn: _Source(checkpoint, average, fqn) for fqn in average.tensors}


def _output(fqn: str, source: _Source, dtype: torch.dtype | None, *, averaged: bool) -> TensorMeta:
    tensor = source.tensor
    held = TensorMeta(fqn, tensor.aliases, tensor.shape, source.dtype, averaged)
    return replace(held, dtype=held.dtype_as(dtype))


def _rest(
    told: Mapping[str, Any],
    card: Card,
    items: list[_Item],
    base: Path | None,
    dtype: torch.dtype | None,
    opened: ExitStack,
) -> list[_Item]:
    """What the model has beside the average, from the base."""
    averaged = {name for item in items for name in (item.output.fqn, *item.output.aliases)}
    found: dict[str, _Source] = {}
    if base is not None:
        model = opened.enter_context(Checkpoint(base))
        if not model.is_plain:
            raise CheckpointError(f"{base}: is a sharded checkpoint, wanted a model's directory")
        average = model.averages[PLAIN]
        found = _sources(model, average)
    if "others" not in told:  # whatever the base has and the average has not
        return [
            _Item(_output(fqn, source, dtype, averaged=False), source)
            for fqn, source in found.items()
            if averaged.isdisjoint((fqn, *source.tensor.aliases))
        ]
    wanted = {
        fqn: other
        for fqn, other in _others(told["others"]).items()
        if name_in(card, (fqn, *other.aliases)) is not None
    }
    return _from_base(wanted, found, base, dtype)


def _from_base(
    wanted: Mapping[str, TensorMeta],
    found: Mapping[str, _Source],
    base: Path | None,
    dtype: torch.dtype | None,
) -> list[_Item]:
    items, missing, differing = [], [], []
    for fqn, other in wanted.items():
        source = next((found[n] for n in (fqn, *other.aliases) if n in found), None)
        if source is None:
            missing.append(fqn)
        elif source.tensor.shape != other.shape:
            differing.append(f"{fqn} has shape {source.tensor.shape}, wanted {other.shape}")
        elif source.dtype.is_floating_point != other.dtype.is_floating_point:
            differing.append(f"{fqn} is of {source.dtype}, wanted {other.dtype}")
        else:
            output = replace(other, dtype=other.dtype_as(dtype))
            items.append(_Item(output, source))
    if differing:
        raise CheckpointError(f"{base}: is of another model: {_some(differing)}")
    if missing and base is None:
        raise CheckpointError(
            f"the model has {len(missing)} tensors that were not averaged and are not in the "
            f"checkpoint: {_some(missing)}; give the directory of a model that has them (--base)"
        )
    if missing:
        raise CheckpointError(f"{base}: lacks {_some(missing)}, which the model has")
    return items


def _others(told: object) -> dict[str, TensorMeta]:
    try:
        assert isinstance(told, dict)
        return {
            str(fqn): TensorMeta(
                str(fqn),
                tuple(str(alias) for alias in other["aliases"]),
                tuple(int(n) for n in other["shape"]),
                torch_dtype(other["dtype"]),
                False,
            )
            for fqn, other in told.items()
        }
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError("the manifest tells of the model what makes no sense") from error


def _some(texts: Iterable[str]) -> str:
    every = list(texts)
    more = len(every) - _SHOWN
    return "; ".join(every[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
