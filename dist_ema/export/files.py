"""The files of an export: how tensors are assigned to them, written, and replace older files.

[Note: replacing files]
New files are written to a hidden directory inside the target, `.export-xxxxxxxx/new`, the stage.
When they are complete and on disk, they replace the old ones:

- If one file is all that changes, it is renamed over the old one.
- Otherwise every name that changes first becomes a symbolic link into the stage, to `now/NAME`.
  `now` is a link to `old`, which has a hard link to each old file: nothing has changed for readers.
  Then `now` is replaced by a link to `new`. This rename is the commit: it changes configuration,
  index and weights together. Then each file is renamed from the stage over its link.
- On a file system without links, the old files are renamed to `old` in the stage, then the new ones
  to their names. A process that is killed meanwhile leaves a directory that cannot be loaded.

If a process is killed, all its links lead to the old files, or all to the new ones. The next export
turns them into plain files and removes the stage. A stage is locked (`flock`) while its process
lives, and `.export-lock` while names are changed; without `flock`, exports to one directory must
not run at the same time. No other file of the directory is moved, linked, opened or deleted.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from dist_ema.checkpoint.directory import sync, target
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, FragmentMeta, Shape, TensorMeta
from dist_ema.core.safetensors import dtype_name, header_of
from dist_ema.export.layouts import ModelLayout, read_config

_SUFFIX = ".safetensors"
_WRITTEN_BY = {"written_by": "dist_ema.export"}  # in the metadata of weights files and indices
_BLOCK = 1 << 20  # elements that are cast, checked and written at a time
_MAX_OPEN = 256  # files at a time; the usual limit of a process is 1024
_STAGE = re.compile(r"\.export-[0-9a-f]{8}")
_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored."""

    file: str
    start: int  # in bytes
    dtype: torch.dtype
    averaged: bool


@dataclass(frozen=True)
class ExportPlan:
    """All that is known about an export before its first value. The same on every rank."""

    files: dict[str, tuple[bytes, int]]  # weights files, with their headers and sizes
    texts: dict[str, str]  # further files, index included
    places: dict[str, Place]  # by fqn, of the tensors that are written
    own_names: str  # pattern of the names that weights and index of such an export can have
    is_variant: bool  # whether the library's own weights may be in the same directory


def plan_export(
    tensors: Iterable[TensorMeta],
    layout: ModelLayout,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    weights_name: str | None,
    metadata: Mapping[str, str] | None = None,
    *,
    keep_dtypes: bool = False,
) -> ExportPlan:
    """Assign tensors to files.

    In a file, wider dtypes come first, then names in order, as safetensors itself writes them: so
    each tensor starts at a multiple of its itemsize, and equal tensors give equal files.

    Args:
        metadata: of the weights files, beside their own.
        keep_dtypes: write half-precision tensors as they are although `dtype` is None.

    Raises:
        ValueError: an argument is out of range, or the layout cannot hold what is averaged.
    """
    weights_name = layout.weights_name if weights_name is None else weights_name
    if not re.fullmatch(r"\w[\w.+-]*\.safetensors", str(weights_name)):
        raise ValueError(f"weights_name is {weights_name!r}, wanted a name ending in {_SUFFIX}")
    limit = _max_bytes(max_shard_size)
    if layout.library == "peft":  # which loads a single file only
        limit = sys.maxsize
    tensors = list(tensors)
    if not keep_dtypes:
        tensors = [replace(tensor, dtype=tensor.dtype_as(dtype)) for tensor in tensors]
    names = {t.fqn: layout.name_of((t.fqn, *t.aliases)) for t in tensors}
    lost = [t.fqn for t in tensors if t.averaged and names[t.fqn] is None]
    if not set(lost) <= set(layout.ignored):
        raise ValueError(
            f"the layout of {layout.library} has no room for {', '.join(lost)}, which are "
            "averaged; with adapters, average the active one only (params=) and name other layers "
            "in modules_to_save, or use gather_state_dict()"
        )
    named = [(name, tensor) for tensor in tensors if (name := names[tensor.fqn]) is not None]
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in named if not dtype_name(tensor.dtype)]
    if unknown:
        raise ValueError(f"safetensors has no dtype for {', '.join(unknown)}")
    counts = Counter(["__metadata__", *(name for name, _ in named)])
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"a file cannot hold two tensors of one name: {', '.join(repeated)}")

    parts: list[list[tuple[str, TensorMeta]]] = [[]]
    size = 0
    for name, tensor in sorted(named, key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append((name, tensor))
        size += tensor.nbytes
    metadata = {**(metadata or {}), "format": "pt", **_WRITTEN_BY}
    if layout.library == "plain":
        metadata |= dict(sorted((alias, t.fqn) for t in tensors for alias in t.aliases))
    stem, library_stem = (n.removesuffix(_SUFFIX) for n in (weights_name, layout.weights_name))
    files: dict[str, tuple[bytes, int]] = {}
    places: dict[str, Place] = {}
    for i, part in enumerate(parts, start=1):
        numbered = f"{stem}-{i:05d}-of-{len(parts):05d}{_SUFFIX}"
        file = weights_name if len(parts) == 1 else numbered
        entries = [(name, str(dtype_name(t.dtype)), t.shape) for name, t in part]
        header, starts, nbytes = header_of(entries, metadata)
        for (_, t), start in zip(part, starts, strict=True):
            places[t.fqn] = Place(file, start, t.dtype, t.averaged)
        files[file] = header, nbytes

    sizes: Counter[torch.dtype] = Counter()
    for t in tensors:
        if t.averaged and t.dtype.is_floating_point:
            sizes[t.dtype] += t.nbytes
    usual = max(sizes, key=lambda kind: (sizes[kind], str(kind)), default=torch.float32)
    texts = layout.config_files(usual)
    # from_pretrained(variant="ema") looks for model.safetensors.index.ema.json.
    index = f"{weights_name}.index.json"
    if stem.startswith(f"{library_stem}."):
        index = f"{layout.weights_name}.index.{stem.removeprefix(f'{library_stem}.')}.json"
    if len(parts) > 1:
        total = sum(tensor.nbytes for _, tensor in named)
        weight_map = {name: places[tensor.fqn].file for name, tensor in sorted(named)}
        content = {"metadata": {"total_size": total, **_WRITTEN_BY}, "weight_map": weight_map}
        texts[index] = json.dumps(content, indent=2) + "\n"
    own_names = rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}"
    return ExportPlan(files, texts, places, own_names, weights_name != layout.weights_name)


def write_export(
    path: Path, plan: ExportPlan, group: Group, write_values: Callable[[Writer], None]
) -> None:
    """Write the planned files and let them replace older ones. Collective: every rank calls it.

    Args:
        write_values: writes the values of this rank. Called on every rank.

    Raises:
        ValueError: an averaged tensor holds NaN or Inf. On every rank; `path` is as it was.
    """
    with ExitStack() as on_rank_0:
        directory = path
        with group.together():
            if group.rank == 0:
                directory = on_rank_0.enter_context(replaced_files(path, plan))
                for name, text in plan.texts.items():
                    (directory / name).write_text(text)
                for name, (header, nbytes) in plan.files.items():
                    with (directory / name).open("xb") as file:
                        file.write(header)
                        file.truncate(nbytes)
        with closing(Writer(Path(group.broadcast(str(directory))), plan)) as writer:
            write_values(writer)
            if group.any(bool(writer.not_finite)):
                names = sorted(set().union(*group.all_gather(writer.not_finite)))
                raise ValueError(
                    "the average holds NaN or Inf, or what the dtype asked for cannot hold, in "
                    f"{', '.join(names)}; nothing is written"
                )
            with group.together():
                writer.sync()
        with group.together():
            on_rank_0.close()


class Writer:
    """The open files of an export that this process writes to."""

    def __init__(self, directory: Path, plan: ExportPlan) -> None:
        self.directory, self._plan = directory, plan
        self._open: dict[str, int] = {}
        self.not_finite: set[str] = set()  # averaged tensors that hold NaN or Inf

    def sees_files(self) -> bool:
        """Whether this process sees the files that rank 0 has created."""
        return all((self.directory / name).is_file() for name in self._plan.files)

    def write_chunk(self, fqn: str, start: int, values: torch.Tensor) -> None:
        """Write elements of a row-major tensor from `start` on: 1-D, in any dtype."""
        self._write(fqn, values, lambda at, block: [(start + at, block)])

    def write_fragment(self, meta: FragmentMeta, values: torch.Tensor) -> None:
        """Write a fragment, in the order of its storage: 1-D, in any dtype, on any device."""
        self._write(meta.fqn, values, lambda at, block: _pieces(meta, at, block))

    def _write(
        self,
        fqn: str,
        values: torch.Tensor,
        pieces: Callable[[int, torch.Tensor], Iterable[tuple[int, torch.Tensor]]],
    ) -> None:
        """Cast and check values block by block; `pieces` splits a block into contiguous runs."""
        place = self._plan.places[fqn]
        fd = self._file(place.file)
        for at in range(0, values.numel(), _BLOCK):
            block = values[at : at + _BLOCK].to("cpu", place.dtype)
            comparable = block.float() if block.element_size() == 1 else block
            if place.averaged and not comparable.isfinite().all():
                self.not_finite.add(fqn)
            for offset, piece in pieces(at, block):
                data = piece.contiguous().view(torch.uint8).numpy().data
                start = place.start + offset * place.dtype.itemsize
                while data:  # one write takes at most 2 GB
                    n = os.pwrite(fd, data, start)
                    data, start = data[n:], start + n

    def sync(self) -> None:
        """Wait until what this process wrote is on disk."""
        for fd in self._open.values():
            os.fsync(fd)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, name: str) -> int:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN:
                oldest = self._open.pop(next(iter(self._open)))
                os.fsync(oldest)
                os.close(oldest)
            self._open[name] = os.open(self.directory / name, os.O_WRONLY)
        return self._open[name]


def runs(shape: Shape, box: Box) -> tuple[int, Iterator[int]]:
    """The contiguous runs of a box in a row-major tensor: their length, and where each starts."""
    split = len(shape)  # dims from here on are contiguous
    while split and box.sizes[split - 1 :] == shape[split - 1 :]:
        split -= 1
    split = max(split - 1, 0)  # the next outer dim may be covered in part
    length = math.prod(box.sizes[split:])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    base = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
    outer = [range(0, box.sizes[d] * strides[d], strides[d]) for d in range(split)]
    return length, (base + sum(at) for at in itertools.product(*outer))


def _pieces(
    meta: FragmentMeta, start: int, block: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """The contiguous runs of elements of a fragment from `start` on, with their offsets."""
    for at, part in meta.slices(start, start + block.numel()):
        values = part.unflatten(block[at - start : at - start + part.numel]).reshape(-1)
        length, offsets = runs(meta.shape, part.box)
        yield from zip(offsets, values.split(length), strict=True)


def _max_bytes(size: int | str) -> int:
    """A size in bytes, or such as "5GB" (10**9) or "5GiB" (2**30)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(I?)B)?\s*", str(size).upper())
    base = 1024 if match and match[3] else 1000
    nbytes = int(float(match[1]) * base ** " KMGT".index(match[2] or " ")) if match else 0
    if nbytes <= 0:
        raise ValueError(f"max_shard_size is {size!r}, wanted bytes > 0 or such as '5GB'")
    return nbytes


def _stale_files(path: Path, plan: ExportPlan) -> set[str]:
    """The files of an earlier export that have no new version.

    Raises:
        ValueError: weights that no export wrote would stay, and loaders might prefer them to the
            new ones (transformers prefers a single file to an index, diffusers an index to a single
            file); or a variant has another dtype than the weights whose configuration it shares.
    """
    stale = set()
    for entry in list(path.iterdir()):
        is_new = entry.name in plan.files or entry.name in plan.texts
        if is_new or not re.fullmatch(plan.own_names, entry.name):
            continue
        if _is_own(entry):
            stale.add(entry.name)
        elif "-of-" not in entry.name and entry.exists():  # else read through an index only
            raise ValueError(
                f"{entry} was not written by export(), and some loaders would read it in place of "
                f"{next(iter(plan.files))}; remove it, export to another directory, or change "
                "max_shard_size"
            )
    for name, text in plan.texts.items() if plan.is_variant else ():
        if not name.endswith("config.json") or not (path / name).is_file():
            continue
        existing, own = (
            config.get("dtype", config.get("torch_dtype"))
            for config in (read_config(path / name), json.loads(text))
        )
        if None not in (existing, own) and existing != own:
            raise ValueError(
                f"{path / name} says {existing}, and loaders cast what they read to that; this "
                f"export is {own}: export with dtype=torch.{existing}, or to another directory"
            )
    return stale


def _is_own(file: Path) -> bool:
    """Whether an export wrote a weights file or an index."""
    try:
        if file.name.endswith(_SUFFIX):
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
        else:
            metadata = json.loads(file.read_text())["metadata"]
        return bool(metadata.items() >= _WRITTEN_BY.items())
    except Exception:  # the libraries raise many kinds for a malformed file
        return False


@contextmanager
def replaced_files(directory: Path, plan: ExportPlan) -> Iterator[Path]:
    """Give an empty directory to write to; if the block succeeds, its files replace older ones.

    Readers of `directory` see all of the old files or all of the new ones; see
    [Note: replacing files]. If the block raises, `directory` is as it was.

    Raises:
        ValueError: see `_stale_files`; before the block, or after it.
    """
    directory = target(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is not a directory")
    is_new = not directory.exists()
    stage = directory / f".export-{uuid.uuid4().hex[:8]}"
    with ExitStack() as lock:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                _clear_abandoned(directory)
                _stale_files(directory, plan)  # raises early
                (stage / "new").mkdir(parents=True)
                fd = _lock(stage / "lock")
                assert fd is not None
                lock.callback(os.close, fd)
            yield stage / "new"
            for entry in (stage / "new").iterdir():
                sync(entry)
            sync(stage / "new")
            with _locked(directory):
                _commit(directory, stage, _stale_files(directory, plan))
        finally:
            if stage.exists():
                _settle(directory, stage)
                shutil.rmtree(stage, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # not empty, unless the export failed
                    directory.rmdir()


def _commit(directory: Path, stage: Path, stale: set[str]) -> None:
    new = {entry.name for entry in (stage / "new").iterdir()}
    texts = [name for name in new if not name.endswith(_SUFFIX)]
    unchanged, _, _ = filecmp.cmpfiles(directory, stage / "new", texts, shallow=False)
    # Weights after configurations, and an index after the weights.
    names = sorted((new - {*unchanged}) | stale, key=lambda n: (".index." in n, n not in texts, n))
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a directory; an export writes a file")
    if len(names) == 1 and not stale:
        os.replace(stage / "new" / names[0], directory / names[0])
    elif _keep_old(directory, stage, names):
        for name in names:
            _put_link(f"{stage.name}/now/{name}", directory / name, stage)
        sync(directory)
        _put_link("new", stage / "now", stage)
        sync(stage)
        _settle(directory, stage)
    else:
        _replace_in_turn(directory, stage, names)
    sync(directory)
    _clear_abandoned(directory, is_replaced=True)


def _keep_old(directory: Path, stage: Path, names: Sequence[str]) -> bool:
    """Link the old files into the stage; False where the file system has no such links."""
    old = stage / "old"
    try:
        old.mkdir()
        for name in names:
            place = directory / name
            if place.is_symlink():
                os.symlink(os.path.realpath(place), old / name)
            elif place.exists():
                os.link(place, old / name)
        _put_link("old", stage / "now", stage)
        sync(stage)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        shutil.rmtree(old)
        return False
    return True


def _put_link(text: str, place: Path, stage: Path) -> None:
    """Replace a name by a symbolic link, in one step."""
    os.symlink(text, stage / "link")
    os.replace(stage / "link", place)


def _settle(directory: Path, stage: Path) -> None:
    """Replace each link into a stage by the file that it leads to."""
    for entry in list(directory.iterdir()):
        try:
            if os.readlink(entry) != f"{stage.name}/now/{entry.name}":
                continue
        except OSError:  # not a link, or removed by another export
            continue
        try:
            os.rename(stage / "now" / entry.name, entry)
        except FileNotFoundError:
            entry.unlink()
    sync(directory)


def _replace_in_turn(directory: Path, stage: Path, names: Sequence[str]) -> None:
    old = stage / "old"
    old.mkdir()
    try:
        for name in reversed(names):
            if os.path.lexists(directory / name):
                os.rename(directory / name, old / name)
        for name in names:
            if (stage / "new" / name).exists():
                os.rename(stage / "new" / name, directory / name)
    except BaseException:
        for entry in old.iterdir():
            os.replace(entry, directory / entry.name)
        raise


def _clear_abandoned(directory: Path, *, is_replaced: bool = False) -> None:
    """Remove the stages of killed processes; the files that their links lead to stay.

    A stage that holds the only copy of the old files stays until they are replaced.
    """
    for stage in list(directory.iterdir()):
        fd = None
        with suppress(OSError):  # removed by another process, or of another user
            fd = _lock(stage / "lock") if _STAGE.fullmatch(stage.name) else None
        if fd is None:
            continue
        os.close(fd)
        _settle(directory, stage)
        has_only_copy = (stage / "old").exists() and not (stage / "now").is_symlink()
        if is_replaced or not has_only_copy:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Be the only process that changes names in the directory."""
    file = directory / ".export-lock"
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        fd = _lock(file)
        with suppress(FileNotFoundError):  # the process that held the lock has removed the file
            if fd is not None and os.path.samestat(os.fstat(fd), file.stat()):
                break
        if fd is not None:
            os.close(fd)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file}: another export has held it for {_LOCK_TIMEOUT_S:.0f} s")
        time.sleep(0.01)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(fd)


def _lock(file: Path) -> int | None:
    """Lock a file, which is made if needed, until the returned descriptor is closed.

    None if another process holds the lock. Without `flock`, nothing is locked.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        pass
    return fd
