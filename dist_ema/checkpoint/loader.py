"""Loads averages from a checkpoint, however their tensors were sharded when it was saved.

[Note: a failed load changes nothing]
Every byte that a rank needs is read and verified once, and only when all ranks have succeeded, the
values are read again and copied. Each step that may fail on one rank ends with an exchange, so that
the same error is raised on every rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.background import BackgroundSaves
from dist_ema.checkpoint.directory import becomes_visible, find
from dist_ema.checkpoint.manifest import SavedAverage
from dist_ema.checkpoint.reader import PLAIN, Checkpoint, Target
from dist_ema.checkpoint.writer import Averages, tensors_of_all_ranks
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.core.safetensors import torch_dtype

_MAX_NAMES = 8  # of a kind in a message

Source = tuple[SavedAverage, dict[str, str]]  # an average, and the saved name of each tensor


def load(
    path: str | Path,
    averages: Averages,
    tensors: Sequence[TensorMeta],
    group: Group,
    *,
    strict: bool = True,
    others: Collection[str] = (),
    background: BackgroundSaves | None = None,
) -> dict[str, Any]:
    """Fill averages from a checkpoint. Collective: every rank calls it.

    All fragments are filled, whether or not this rank owns them. Memory: one block.

    A safetensors file, or a directory of them with or without an index, is loaded as the average
    too; its names are those of the model. It has no checksums and no counters: the returned state
    is empty.

    Args:
        strict: refuse missing and unexpected tensors, instead of warning of them.
        others: names that safetensors files may have beside the averaged ones.

    Returns:
        The saved state.

    Raises:
        CheckpointError: the checkpoint is damaged or there is none; an average or a tensor is
            missing or does not fit; ranks see different files. On every rank, and nothing has
            changed.
    """
    path = Path(path)
    with group.together(error=CheckpointError):
        (background or BackgroundSaves()).wait()
    if not group.equal(sorted(others)):
        others = set().union(*group.all_gather(set(others)))
    every = tensors_of_all_ranks(tensors, group)
    while True:
        try:
            return _load(path, averages, every, group, strict, others)
        except CheckpointError:
            # A network file system may show the files to some ranks later than to others.
            if not _becomes_visible_to_all(path, group):
                raise


def _becomes_visible_to_all(path: Path, group: Group) -> bool:
    """Whether a rank did not see what another one saw, and all see it now. Collective."""

    def names() -> set[str]:
        place = find(path)
        return {str(each) for each in (place, *place.rglob("*")) if os.path.lexists(each)}

    own = names()
    every: set[str] = set().union(*group.all_gather(own))
    if not group.any(own != every):
        return False
    is_visible = becomes_visible(lambda: names().issuperset(every))
    return not group.any(not is_visible)


def _load(
    path: Path,
    averages: Averages,
    tensors: Sequence[TensorMeta],
    group: Group,
    strict: bool,
    others: Collection[str],
) -> dict[str, Any]:
    checkpoint: Checkpoint | None = None
    try:
        with group.together(error=CheckpointError):
            checkpoint = Checkpoint(path)
            identity = checkpoint.identity()
        assert checkpoint is not None
        if not group.equal(identity):
            every = group.all_gather(identity)
            raise CheckpointError(f"{path}: ranks see different checkpoints: {', '.join(every)}")
        notes: list[str] = []
        with group.together(error=CheckpointError):
            try:
                sources = _match(checkpoint, list(averages), tensors, others, strict, notes)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.directory}: {error}") from None
            files = [(average, name) for average, _ in sources.values() for name in average.files]
            for average, name in files[group.rank :: group.size]:
                checkpoint.check_file(average, name)
        with group.together(error=CheckpointError):
            _fill(checkpoint, sources, averages, copies=False)
        with group.together(error=CheckpointError):
            try:
                _fill(checkpoint, sources, averages, copies=True)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; the checkpoint changed while it was read, and the average is "
                    "overwritten in part: load again"
                ) from error
    finally:
        if checkpoint is not None:
            checkpoint.close()
    for note in notes:
        warnings.warn(f"{checkpoint.directory}: {note}", stacklevel=5)
    return dict(checkpoint.state)


@torch.no_grad()
def _fill(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    averages: Averages,
    *,
    copies: bool,
) -> None:
    """Read and verify every block that this rank needs, and copy the values if `copies`. Local."""
    for name, fragments in averages.items():
        targets: dict[str, list[Target]] = {}
        for fragment in fragments:
            if fragment.meta.numel:
                target = (fragment.meta.box, fragment.tensor)
                targets.setdefault(fragment.meta.fqn, []).append(target)
        average, saved_names = sources[name]
        for fqn, saved_name in saved_names.items():
            if copies:
                checkpoint.fill(average, saved_name, targets.get(fqn, ()))
            else:
                checkpoint.fill(average, saved_name, targets.get(fqn, ()), put=None)


def _match(
    checkpoint: Checkpoint,
    names: Sequence[str],
    tensors: Sequence[TensorMeta],
    others: Collection[str],
    strict: bool,
    notes: list[str],
) -> dict[str, Source]:
    """For each average, the saved one and the names of its tensors. Appends warnings to `notes`.

    Raises:
        CheckpointError: an average or a tensor is missing or does not fit; all of them are listed.
    """
    saved = checkpoint.averages
    allowed: set[str] = set()
    if checkpoint.is_plain:
        if len(names) != 1:
            raise CheckpointError(
                f"holds one average without a name, and {', '.join(names)} are wanted; build "
                "ShardedEMA with one decay to load it"
            )
        saved = {names[0]: saved[PLAIN]}
        allowed = set(others) | {alias for t in tensors for alias in t.aliases}
    absent = [name for name in names if name not in saved]
    if absent:
        raise CheckpointError(
            f"has no average named {', '.join(map(repr, absent))}; it has "
            f"{', '.join(map(repr, saved))}"
        )
    ignored = [name for name in saved if name not in names]
    if ignored:
        notes.append(f"its averages {', '.join(map(repr, ignored))} are not loaded")
    return {
        name: (saved[name], _match_one(saved[name], tensors, allowed, strict, notes))
        for name in names
    }


def _match_one(
    average: SavedAverage,
    tensors: Sequence[TensorMeta],
    allowed: Collection[str],
    strict: bool,
    notes: list[str],
) -> dict[str, str]:
    names = average.names()
    saved_names: dict[str, str] = {}
    lists: dict[str, list[str]] = {
        "does not fit": [],
        "missing": [],
        "unexpected": [],
        "rounded to a narrower dtype": [],
    }
    for meta in tensors:
        fqn = next((names[n] for n in (meta.fqn, *meta.aliases) if n in names), None)
        if fqn is None:
            lists["missing"].append(meta.fqn)
            continue
        saved_names[meta.fqn] = fqn
        shape, dtype = average.tensors[fqn].shape, torch_dtype(average.tensors[fqn].dtype)
        is_number = dtype.is_complex or dtype.is_floating_point
        if shape != meta.shape:
            problem = f"the checkpoint has shape {shape}, the model {meta.shape}"
            lists["does not fit"].append(f"{meta.fqn}: {problem}")
        elif dtype.is_complex != meta.dtype.is_complex or not is_number:
            problem = f"the checkpoint has {dtype}, the average {meta.dtype}"
            lists["does not fit"].append(f"{meta.fqn}: {problem}")
        elif torch.promote_types(dtype, meta.dtype) != meta.dtype:
            lists["rounded to a narrower dtype"].append(meta.fqn)
    used = set(saved_names.values())
    lists["unexpected"] += [n for n in average.tensors if n not in used and n not in allowed]
    texts = {kind: _listed(kind, fqns) for kind, fqns in lists.items() if fqns}
    rounded = texts.pop("rounded to a narrower dtype", None)
    if "does not fit" in texts or (strict and texts):
        advice = "" if "does not fit" in texts else " (strict=False loads the rest)"
        raise CheckpointError("; ".join(texts.values()) + advice)
    notes += [*texts.values(), *filter(None, [rounded])]
    return saved_names


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{kind}: {', '.join(names[:_MAX_NAMES])}{more}"
