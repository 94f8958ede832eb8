"""An export from a sharded checkpoint: one process, no model, no process group.

A checkpoint holds the average and what must be known of the model: its layout, and the names of
frozen weights and buffers. Their values come from a base, a directory that the library wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.manifest import check_types, short
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.core.errors import CheckpointError, listed
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.core.names import can_name_model
from dist_ema.core.safetensors import torch_dtype
from dist_ema.export.files import (
    Writer,
    names_in_model,
    plan_exports,
    summary,
    write_export,
)
from dist_ema.export.layouts import ModelLayout, layout_from_directory, layout_from_json
from dist_ema.schedule import averages_of

_OTHER = {"shape": [int], "dtype": str, "aliases": [str]}  # JSON of a tensor beside the average
_CHUNK_BYTES = 8 << 20  # read and written at a time
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


class Source:
    """The tensors of one average in an open checkpoint, or of a model that others saved."""

    def __init__(self, checkpoint: Checkpoint, name: str | None) -> None:
        self.path, self.state = checkpoint.directory, checkpoint.state
        names = averages_of(checkpoint.averages)
        if name is None and len(names) > 1:
            raise ValueError(f"{self.path} holds several averages, {names}; pass one as name")
        if name is not None and name not in checkpoint.averages:
            raise ValueError(f"{self.path} holds no average named {name!r}, but {names}")
        self.checkpoint, self.name = checkpoint, names[0] if name is None else name
        self.average = checkpoint.averages[self.name]
        for file in self.average.files:
            checkpoint.check_file(self.average, file)
        self.tensors = [
            TensorMeta(fqn, tensor.aliases, tensor.shape, torch_dtype(tensor.dtype))
            for fqn, tensor in self.average.tensors.items()
        ]

    def chunks(self, tensor: TensorMeta) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements of a tensor in row-major order, each chunk with its start."""
        step = _CHUNK_BYTES // tensor.dtype.itemsize
        for start in range(0, tensor.numel, step):
            numel = min(step, tensor.numel - start)
            chunk = torch.empty(numel, dtype=tensor.dtype, device="cpu")
            self.checkpoint.read(self.average, tensor.fqn, start, chunk)
            yield start, chunk


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

    Local. Memory: a few chunks of 8 MiB and a block of the checkpoint.

    Args:
        name: the average, if the checkpoint has several.
        base: a directory of safetensors with the tensors that are not averaged, and config.json if
            the checkpoint has no layout of the model.
        progress: called with the number of bytes to read; returns a context manager of a function
            that is called with the number of bytes read.

    Returns:
        {"library", "files", "nbytes"} of the export.

    Raises:
        CheckpointError: the checkpoint or the base is damaged, or of another model; or a tensor is
            in neither. `out` is unchanged.
        ValueError: an argument is out of range, the average holds NaN or Inf, or `out` cannot take
            an export. The same.
    """
    with ExitStack() as opened:
        opened_checkpoint = opened.enter_context(Checkpoint(checkpoint))
        if inside := opened_checkpoint.averages_inside():
            warnings.warn(f"{checkpoint}: its own weights are exported, but {inside}", stacklevel=2)
        saved = Source(opened_checkpoint, name)
        sources = {tensor.fqn: (saved, tensor) for tensor in saved.tensors}
        layouts, others = models_of(saved, base)
        tensors, problems = list(saved.tensors), []
        in_base: dict[str, TensorMeta] = {}
        if base is not None:
            base_saved = Source(opened.enter_context(Checkpoint(base)), None)
            in_base = {n: t for t in base_saved.tensors for n in (t.fqn, *t.aliases)}
            if others is None:  # not known: the base's tensors that are not averaged
                averaged = {n for t in saved.tensors for n in (t.fqn, *t.aliases)}
                others = [t for t in base_saved.tensors if averaged.isdisjoint((t.fqn, *t.aliases))]
        for other in others or ():
            names = (other.fqn, *other.aliases)
            if name_in_files(layouts, names) is None:
                continue
            tensor = next((in_base[n] for n in names if n in in_base), None)
            if tensor is None:
                problems.append(f"{other.fqn} is missing")
            elif tensor.shape != other.shape:
                problems.append(f"{other.fqn} has shape {tensor.shape}, wanted {other.shape}")
            elif tensor.dtype.is_floating_point != other.dtype.is_floating_point:
                problems.append(f"{other.fqn} is of {tensor.dtype}, wanted {other.dtype}")
            else:
                tensors.append(replace(other, averaged=False))
                sources[other.fqn] = base_saved, tensor
        if problems:
            hint = "" if base else "; give the directory of a model that has them (--base)"
            raise CheckpointError(f"{base or checkpoint}: {listed(problems)}{hint}")
        tensors = [replace(t, dtype=t.dtype_as(dtype)) for t in tensors]
        plans = plan_exports(tensors, layouts, max_shard_size, weights_name)

        def write_values(writer: Writer) -> None:
            for fqn in writer.plan.places:
                source, tensor = sources[fqn]
                for start, chunk in source.chunks(tensor):
                    writer.write_chunk(fqn, start, chunk)
                    advance(chunk.nbytes)

        total = sum(sources[fqn][1].nbytes for plan in plans.values() for fqn in plan.places)
        with progress(total) as advance:
            write_export(out, plans, Group.alone(), write_values)
    return summary(plans)


def name_in_files(layouts: Mapping[str, ModelLayout], names: Sequence[str]) -> str | None:
    """The name in its model's files of a tensor of these names, after the model's name."""
    for model, layout in layouts.items():
        name = layout.name_of(names_in_model(model, names))
        if name is not None:
            return f"{model}.{name}" if model else name
    return None


def dtype_named(name: str | None) -> torch.dtype | None:
    """A floating-point dtype by its name in torch, or a short one (bf16, fp16, fp32, fp64)."""
    if name is None:
        return None
    dtype = getattr(torch, _SHORT_NAMES.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}, wanted a floating one such as bf16 or float32")
    return dtype


def models_of(
    saved: Source, base: Path | None
) -> tuple[dict[str, ModelLayout], list[TensorMeta] | None]:
    """The layout of each model, and the tensors that are not averaged; None if not known.

    Args:
        base: a directory with configurations, which are read if the checkpoint has no layout.
    """
    try:
        model = saved.state.get("model", {})
        if "problem" in model:
            raise CheckpointError(f"{saved.path}: when it was saved, {model['problem']}")
        cards = model.get("cards") or {"": model.get("card")}
        layouts = {
            str(name): layout_from_directory(base) if card is None else layout_from_json(card)
            for name, card in cards.items()
        }
        check_types(model.get("others", {}), {str: _OTHER}, f"{saved.path}: others")
        if not all(name == "" or can_name_model(name) for name in layouts):
            raise CheckpointError(f"{saved.path}: {short([*layouts])} cannot name models")
        if "others" not in model:
            return layouts, None
        return layouts, [
            TensorMeta(fqn, tuple(t["aliases"]), tuple(t["shape"]), torch_dtype(t["dtype"]))
            for fqn, t in model["others"].items()
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{saved.path}: the 'model' entry is malformed") from error
