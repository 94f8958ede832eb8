"""What an export consists of, and how values reach their places in its files."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_ema.checkpoint.directory import sync
from dist_ema.core.layout import Box, FragmentMeta, Shape, TensorMeta
from dist_ema.export.card import Card, name_in, texts_of
from dist_ema.export.format import (
    WRITTEN_BY,
    OutFile,
    TensorSpec,
    check_weights_name,
    index_name,
    index_text,
    is_marked,
    max_bytes,
    out_files,
    own_names,
)

_CHUNK = 1 << 20  # elements that are cast, checked and written at a time
_SHORT_BYTES = 4096  # a write of less costs more than sending the bytes to where they are joined
_FEW_RUNS = 16
_MAX_OPEN = 256  # files at a time; a process may commonly have 1024


@dataclass(frozen=True, slots=True)
class Draft:
    """All that is known about an export before its first value. The same on every rank."""

    files: dict[str, OutFile]
    texts: dict[str, str]  # further files, index included
    where: dict[str, tuple[str, str]]  # fqn -> file, name of the tensor in it
    own: str  # pattern of the names that weights and index of an export of this name can have
    is_variant: bool  # whether the library's own weights may lie beside it

    def start(self, fqn: str) -> tuple[str, int]:
        """The file of a tensor, and its first byte in it."""
        file, name = self.where[fqn]
        return file, self.files[file].starts[name]


def draft(
    outputs: Sequence[TensorMeta],
    card: Card,
    *,
    max_shard_size: int | str,
    weights_name: str | None,
) -> Draft:
    """Plan an export.

    Raises:
        ValueError: an argument is out of range, or the layout has no room for what is averaged.
    """
    if weights_name is None:
        weights_name = card["weights_name"]
    check_weights_name(weights_name)
    limit = max_bytes(max_shard_size)
    if card["library"] == "peft":  # whose loader knows one file only
        limit = sys.maxsize
    names = {o.fqn: name_in(card, (o.fqn, *o.aliases)) for o in outputs}
    lost = [o.fqn for o in outputs if o.averaged and names[o.fqn] is None]
    if lost and not set(lost) <= set(card["ignored"]):
        raise ValueError(
            f"the layout of {card['library']} has no room for {', '.join(lost)}, which are "
            "averaged; with adapters, average the active one only (params=) and name other layers "
            "in modules_to_save, or use gather_state_dict()"
        )
    metadata = {"format": "pt", **WRITTEN_BY}
    if card["library"] == "plain":
        metadata |= dict(sorted((alias, o.fqn) for o in outputs for alias in o.aliases))
    specs = [TensorSpec(name, o.shape, o.dtype) for o in outputs if (name := names[o.fqn])]
    files = out_files(specs, weights_name, limit, metadata)
    index = index_name(weights_name, card["weights_name"])
    floating = {o.dtype for o in outputs if o.averaged and o.dtype.is_floating_point}
    widest = max(floating, key=lambda dtype: (dtype.itemsize, str(dtype)), default=torch.float32)
    texts = texts_of(card, widest)
    if len(files) > 1:
        texts[index] = index_text(files)
    file_of = {name: file for file, told in files.items() for name in told.starts}
    where = {fqn: (file_of[name], name) for fqn, name in names.items() if name is not None}
    own = own_names(weights_name, index).pattern
    return Draft(files, texts, where, own, weights_name != card["weights_name"])


def stale_files(path: Path, plan: Draft) -> set[str]:
    """The files of an earlier export that have no new version.

    Raises:
        ValueError: weights that no export wrote would stay and might be read in place of the new
            ones (transformers prefers a single file to an index, diffusers an index to a single
            file); or a variant has another dtype than the weights beside it, whose configuration
            it shares.
    """
    stale = set()
    for entry in list(path.iterdir()) if path.is_dir() else []:
        if not re.fullmatch(plan.own, entry.name) or entry.name in (*plan.files, *plan.texts):
            continue
        with suppress(FileNotFoundError):  # another export may end just now
            if is_marked(entry):
                stale.add(entry.name)
            elif "-of-" not in entry.name:  # which is read through an index only
                raise ValueError(
                    f"{entry} was not written by export(), and some loaders would read it in place "
                    f"of {next(iter(plan.files))}; remove it, export to another directory, or "
                    "change max_shard_size"
                )
    for name, text in plan.texts.items():
        beside = path / name
        if not plan.is_variant or not name.endswith("config.json") or not beside.is_file():
            continue
        found, ours = _dtype_in(beside.read_text()), _dtype_in(text)
        if found is not None and ours is not None and found != ours:
            raise ValueError(
                f"{beside} says {found}, and loaders cast what they read to that; this export is "
                f"{ours}: export with dtype=torch.{found}, or to another directory"
            )
    return stale


def _dtype_in(config: str) -> str | None:
    try:
        told = json.loads(config)
        return told.get("dtype", told.get("torch_dtype"))  # type: ignore[no-any-return]
    except (ValueError, AttributeError):
        return None


class Writing:
    """The open files of an export that this process writes to."""

    def __init__(self, directory: Path, plan: Draft) -> None:
        self.directory, self._plan = directory, plan
        self._open: OrderedDict[str, int] = OrderedDict()
        self._written: set[str] = set()
        self.broken: set[str] = set()  # averaged tensors in which NaN or Inf was found

    def begin(self) -> None:
        """Make all files, with their headers and at their full size, and the further ones."""
        for name, text in self._plan.texts.items():
            (self.directory / name).write_text(text)
        for name, file in self._plan.files.items():
            fd = self._file(name, os.O_CREAT | os.O_EXCL)
            os.ftruncate(fd, file.nbytes)
            _write_at(fd, memoryview(file.header), 0)

    def is_seen(self) -> bool:
        """Whether this process sees the files that another one has begun."""
        return all((self.directory / name).is_file() for name in self._plan.files)

    def band(self, output: TensorMeta, start: int, values: torch.Tensor) -> None:
        """Write elements from `start` on of a tensor, row-major: 1-D, in any dtype, on the CPU."""
        name, first = self._plan.start(output.fqn)
        fd = self._file(name)
        for at in range(0, values.numel(), _CHUNK):
            part = values[at : at + _CHUNK].to(output.dtype)
            self._check(output, part)
            _write_at(fd, _bytes_of(part), first + (start + at) * output.dtype.itemsize)

    def run(self, output: TensorMeta, meta: FragmentMeta, values: torch.Tensor) -> None:
        """Write a piece from where it lives: 1-D, in any dtype, on any device."""
        name, first = self._plan.start(output.fqn)
        fd = self._file(name)
        itemsize = output.dtype.itemsize
        for start in range(0, meta.numel, _CHUNK):
            stop = min(start + _CHUNK, meta.numel)
            cast = values[start:stop].to("cpu", output.dtype)
            self._check(output, cast)
            for at, part in meta.slices(start, stop):
                held = part.unflatten(cast[at - start : at - start + part.numel])
                data = _bytes_of(held.contiguous().view(-1))
                length, offsets = runs(meta.shape, part.box)
                nbytes = length * itemsize
                for i, offset in enumerate(offsets):
                    piece = data[i * nbytes : (i + 1) * nbytes]
                    _write_at(fd, piece, first + offset * itemsize)

    def sync(self) -> None:
        """Wait until what this process wrote is on disk."""
        for name in sorted(self._written):
            sync(self.directory / name)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def _file(self, name: str, flags: int = 0) -> int:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = os.open(self.directory / name, os.O_WRONLY | flags, 0o666)
            self._written.add(name)
        self._open.move_to_end(name)
        return self._open[name]

    def _check(self, output: TensorMeta, values: torch.Tensor) -> None:
        if output.averaged and not is_finite(values):
            self.broken.add(output.fqn)


def is_finite(values: torch.Tensor) -> bool:
    if values.element_size() == 1:
        values = values.float()
    return bool(values.isfinite().all())


def refuse_broken(names: Sequence[str]) -> None:
    """Raise if averaged tensors hold NaN or Inf."""
    if names:
        raise ValueError(
            f"the average holds NaN or Inf, or what the dtype asked for cannot hold, in "
            f"{', '.join(sorted(names))}; nothing is written"
        )


def runs(shape: Shape, box: Box) -> tuple[int, Iterator[int]]:
    """How a box lies in a row-major tensor: the length of each run, and where the runs start."""
    split = len(shape)  # dims from here on are contiguous
    while split and box.sizes[split - 1 :] == shape[split - 1 :]:
        split -= 1
    split = max(split - 1, 0)  # the next dim further out may be a part of its own
    length = math.prod(box.sizes[split:])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    outer = [range(0, box.sizes[d] * strides[d], strides[d]) for d in range(split)]
    return length, (base + sum(at) for at in itertools.product(*outer))


def is_scattered(meta: FragmentMeta, itemsize: int) -> bool:
    """Whether a piece is better joined with others in memory than written run by run."""
    if meta.order is not None:
        return True
    length, _ = runs(meta.shape, meta.box)
    return length * itemsize < _SHORT_BYTES and meta.numel > _FEW_RUNS * length


def _bytes_of(values: torch.Tensor) -> memoryview:
    if values.numel() == 0:
        return memoryview(b"")
    data: memoryview = values.contiguous().view(torch.uint8).numpy().data
    return data


def _write_at(fd: int, data: memoryview, start: int) -> None:
    while data:  # one write takes at most 2 GB
        n = os.pwrite(fd, data, start)
        data, start = data[n:], start + n
