"""The files of an export: how tensors are assigned to them, written, and replace older files.

[Note: replacing files]
New files are written to a hidden directory inside the target, `.export-xxxxxxxx/new`, the stage.
When they are complete and on disk, they replace the old ones:

- If one file is all that changes, it is renamed over the old one.
- Otherwise every name that changes first becomes a symbolic link into the stage, to `now/NAME`.
  `now` is a link to `old`, which has a hard link to each old file: nothing has changed for readers.
  Then `now` is replaced by a link to `new`. This rename is the commit: it changes configuration,
  index and weights together. Last, each file is renamed and replaces the link to it.
- On a file system without links, the old files are renamed to `old` in the stage, then the new ones
  to their names; renaming `old` to `replaced` is the commit. A process that is killed before leaves
  a directory that cannot be loaded.

The next export completes what a killed one has committed, undoes what it has not, and removes its
stage. `.export-lock` in the target is locked (`flock`) during an export, and another one waits;
without `flock`, exports to one directory must not run at the same time. No other file of the
directory is moved, linked, opened or deleted.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dist_ema.checkpoint.directory import is_checkpoint, release, sync, target
from dist_ema.checkpoint.writer import is_finite
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.core.safetensors import dtype_name, header_of
from dist_ema.export.layouts import ModelLayout, read_config

_SUFFIX = ".safetensors"
_WRITTEN_BY = {"written_by": "dist_ema.export"}  # in the metadata of weights files and indices
_BLOCK = 1 << 18  # elements that are cast, checked and written at a time: they stay in cache
_NUM_THREADS = 3  # one of them may wait for the disk
_MAX_WRITING = 16  # blocks at a time
_SYNC_BYTES = 32 << 20  # after which a sync begins that runs beside further writes
_MAX_OPEN = 256  # files at a time; the usual limit of a process is 1024
_LOCK_TIMEOUT_S = 300.0

_Entry = tuple[str, TensorMeta]  # a tensor, and its name in the file


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored."""

    file: str
    start: int  # in bytes
    dtype: torch.dtype
    averaged: bool


@dataclass(frozen=True)
class ExportPlan:
    """The files of an export and the place of each tensor. The same on every rank."""

    library: str
    files: dict[str, tuple[bytes, int]]  # weights files, with their headers and sizes
    texts: dict[str, str]  # further files, index included
    copies: Sequence[Path]  # files to copy, under their names
    places: dict[str, Place]  # by fqn, of the tensors that are written
    own_names: str  # pattern of the names that weights and index of such an export can have
    is_variant: bool  # whether the library's own weights may be in the same directory

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return [*self.files, *self.texts, *(file.name for file in self.copies)]


def plan_exports(
    tensors: Sequence[TensorMeta],
    layouts: Mapping[str, ModelLayout],
    max_shard_size: int | str,
    weights_name: str | None,
    *,
    metadata: Mapping[str, str] | None = None,
    copies: Sequence[Path] = (),
) -> dict[str, ExportPlan]:
    """Assign the tensors of each model to files. Returns plans by model name ("" for a single one).

    The name is a directory, and the names of the model's tensors begin with it.

    Args:
        tensors: in the dtypes in which they are written.
        metadata: of the weights files, beside their own.
        copies: files that each directory gets a copy of.

    Raises:
        ValueError: an argument is out of range, or a layout cannot hold what is averaged.
    """
    limit = _max_bytes(max_shard_size)
    metadata = {**(metadata or {}), "format": "pt", **_WRITTEN_BY}
    plans: dict[str, ExportPlan] = {}
    for model, layout in layouts.items():
        named = [(names_in_model(model, (t.fqn, *t.aliases)), t) for t in tensors]
        entries = _entries([(names, t) for names, t in named if names], layout)
        tied = {alias: names[0] for names, _ in named for alias in names[1:]}
        plans[model] = _plan_of_files(
            # peft reads a single file.
            _split(entries, sys.maxsize if layout.library == "peft" else limit),
            layout,
            layout.weights_name if weights_name is None else weights_name,
            metadata | (dict(sorted(tied.items())) if layout.library == "plain" else {}),
            copies,
        )
    return plans


def names_in_model(model: str, names: Iterable[str]) -> list[str]:
    """The names that a model's own `state_dict()` has for a tensor; [] for another model's."""
    prefix = f"{model}." if model else ""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _entries(named: Sequence[tuple[list[str], TensorMeta]], layout: ModelLayout) -> list[_Entry]:
    """The tensors that are written: wider dtypes first, then by name, as safetensors orders them.

    So each starts at a multiple of its itemsize, and equal tensors give equal files.
    """
    lost = [names[0] for names, t in named if t.averaged and layout.name_of(names) is None]
    if not set(lost) <= set(layout.ignored):
        raise ValueError(
            f"the layout of {layout.library} has no room for {', '.join(lost)}, which are "
            "averaged; with adapters, average the active one only (params=) and name other layers "
            "in modules_to_save, or use gather_state_dict()"
        )
    in_files = [(layout.name_of(names), t) for names, t in named]
    entries = [(name, t) for name, t in in_files if name is not None]
    unknown = [f"{name} ({t.dtype})" for name, t in entries if dtype_name(t.dtype) is None]
    if unknown:
        raise ValueError(f"safetensors has no dtype for {', '.join(unknown)}")
    counts = Counter(["__metadata__", *(name for name, _ in entries)])
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"a file cannot hold two tensors of one name: {', '.join(repeated)}")
    return sorted(entries, key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))


def _split(entries: Sequence[_Entry], limit: int) -> list[list[_Entry]]:
    """Consecutive parts of at most `limit` bytes, or of one tensor."""
    parts: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry[1].nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry[1].nbytes
    return parts


def _plan_of_files(
    parts: Sequence[Sequence[_Entry]],
    layout: ModelLayout,
    weights_name: str,
    metadata: Mapping[str, str],
    copies: Sequence[Path],
) -> ExportPlan:
    """The plan of a model whose tensors are divided into one part for each file."""
    if not re.fullmatch(r"\w[\w.+-]*\.safetensors", str(weights_name)):
        raise ValueError(f"weights_name is {weights_name!r}, wanted a name ending in {_SUFFIX}")
    stem, library_stem = (n.removesuffix(_SUFFIX) for n in (weights_name, layout.weights_name))
    files: dict[str, tuple[bytes, int]] = {}
    places: dict[str, Place] = {}
    weight_map: dict[str, str] = {}
    sizes: Counter[torch.dtype] = Counter()
    for i, part in enumerate(parts, start=1):
        numbered = f"{stem}-{i:05d}-of-{len(parts):05d}{_SUFFIX}"
        file = weights_name if len(parts) == 1 else numbered
        tensors = [(name, str(dtype_name(t.dtype)), t.shape) for name, t in part]
        header, starts, nbytes = header_of(tensors, metadata)
        files[file] = header, nbytes
        for (name, t), start in zip(part, starts, strict=True):
            places[t.fqn] = Place(file, start, t.dtype, t.averaged)
            weight_map[name] = file
            if t.averaged and t.dtype.is_floating_point:
                sizes[t.dtype] += t.nbytes
    usual = max(sizes, key=lambda kind: (sizes[kind], str(kind)), default=torch.float32)
    texts = layout.config_files(usual)
    # from_pretrained(variant="ema") looks for model.safetensors.index.ema.json.
    index = f"{weights_name}.index.json"
    if stem.startswith(f"{library_stem}."):
        index = f"{layout.weights_name}.index.{stem.removeprefix(f'{library_stem}.')}.json"
    if len(parts) > 1:
        total = sum(t.nbytes for part in parts for _, t in part)
        content = {
            "metadata": {"total_size": total, **_WRITTEN_BY},
            "weight_map": dict(sorted(weight_map.items())),
        }
        texts[index] = json.dumps(content, indent=2) + "\n"
    own_names = rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}"
    is_variant = weights_name != layout.weights_name
    return ExportPlan(layout.library, files, texts, copies, places, own_names, is_variant)


def _max_bytes(size: int | str) -> int:
    """A size in bytes, or such as "5GB" (10**9) or "5GiB" (2**30)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(I?)B)?\s*", str(size).upper())
    base = 1024 if match and match[3] else 1000
    nbytes = int(float(match[1]) * base ** " KMGT".index(match[2] or " ")) if match else 0
    if nbytes <= 0:
        raise ValueError(f"max_shard_size is {size!r}, wanted bytes > 0 or such as '5GB'")
    return nbytes


def write_export(
    path: Path,
    plans: Mapping[str, ExportPlan],
    group: Group,
    write_values: Callable[[Writer], None],
) -> None:
    """Write the planned files and let them replace older ones. Collective: every rank calls it.

    Each model has a directory of its own under `path`, and is replaced by itself when the files of
    all are written.

    Args:
        write_values: writes the values of this rank. Called on every rank.

    Raises:
        ValueError: an averaged tensor holds NaN or Inf, or `path` cannot take the export; see
            `_replaced_files`. On every rank; `path` is unchanged.
    """
    with ExitStack() as on_rank_0:
        for model, plan in plans.items():
            directory = path / model
            with group.together():
                if group.rank == 0:
                    if model and is_checkpoint(path):
                        raise ValueError(f"{path} is a checkpoint of save(); export elsewhere")
                    directory = on_rank_0.enter_context(_replaced_files(directory, plan))
                    for name, text in plan.texts.items():
                        (directory / name).write_text(text)
                    for copied in plan.copies:
                        shutil.copyfile(copied, directory / copied.name)
                    for name, (header, nbytes) in plan.files.items():
                        with (directory / name).open("xb") as file:
                            file.write(header)
                            file.truncate(nbytes)
            with closing(Writer(Path(group.broadcast(str(directory))), plan)) as writer:
                write_values(writer)
                with group.together():
                    writer.sync()
        with group.together():
            on_rank_0.close()


def summary(plans: Mapping[str, ExportPlan]) -> dict[str, Any]:
    """{"library", "files", "nbytes"} of an export, for the user."""
    return {
        "library": ", ".join(dict.fromkeys(plan.library for plan in plans.values())),
        "files": [str(Path(model, name)) for model, plan in plans.items() for name in plan.names],
        "nbytes": sum(nbytes for plan in plans.values() for _, nbytes in plan.files.values()),
    }


class Writer:
    """The open files of an export that this process writes to.

    Threads convert, check and write blocks, and wait for the disk, while the caller computes what
    follows.
    """

    def __init__(self, directory: Path, plan: ExportPlan) -> None:
        self.directory, self.plan = directory, plan
        self._not_finite: set[str] = set()  # averaged tensors that hold NaN or Inf
        self._open: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._writing: deque[Future[None]] = deque()
        self._syncs: list[Future[None]] = []
        self._unsynced = 0  # bytes

    def sees_files(self) -> bool:
        """Whether this process sees the files that rank 0 has created."""
        return all((self.directory / name).is_file() for name in self.plan.files)

    def write_chunk(self, fqn: str, start: int, values: torch.Tensor) -> None:
        """Write elements of a row-major tensor from `start` on: 1-D, in any dtype and place.

        The values must not change before `sync()` has returned.
        """
        place = self.plan.places[fqn]
        if place.file not in self._open:
            if len(self._open) == _MAX_OPEN:
                self.sync()
            self._open[place.file] = os.open(self.directory / place.file, os.O_WRONLY)
        fd, at = self._open[place.file], place.start + start * place.dtype.itemsize
        for block in values.split(_BLOCK):
            # The copy is made on this thread: its current stream computed the values.
            block = block if block.device.type == "cpu" else block.to("cpu", place.dtype)
            self._writing.append(self._threads.submit(self._write, fqn, block, fd, at))
            if len(self._writing) > _MAX_WRITING:
                self._writing.popleft().result()
            at += block.numel() * place.dtype.itemsize
            self._unsynced += block.numel() * place.dtype.itemsize
            if self._unsynced >= _SYNC_BYTES and all(sync.done() for sync in self._syncs[-1:]):
                self._syncs.append(self._threads.submit(self._sync_file, place.file, fd))
                self._unsynced = 0

    def _write(self, fqn: str, block: torch.Tensor, fd: int, at: int) -> None:
        """Convert, check and write a block of a tensor at a byte of a file. On a thread."""
        place = self.plan.places[fqn]
        block = block.to(place.dtype)
        comparable = block.float() if block.element_size() == 1 else block
        if place.averaged and not is_finite(comparable):
            self._not_finite.add(fqn)
        data = block.view(torch.uint8).numpy().data
        with _named(self.directory / place.file):
            while data:  # a write may be partial
                n = os.pwrite(fd, data, at)
                data, at = data[n:], at + n

    def _sync_file(self, file: str, fd: int) -> None:
        with _named(self.directory / file):
            os.fdatasync(fd)  # the header's writer has set the length

    def sync(self) -> None:
        """Wait until what this process wrote is on disk, and close the files.

        Raises:
            ValueError: an averaged tensor holds NaN or Inf.
        """
        for task in (*self._writing, *self._syncs):
            task.result()
        if self._not_finite:
            raise ValueError(
                "the average holds NaN or Inf, or values too large for the requested dtype, in "
                f"{', '.join(sorted(self._not_finite))}; nothing is written"
            )
        for file, fd in self._open.items():
            self._sync_file(file, fd)
        self._writing.clear()
        self._syncs.clear()
        self._close_files()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._close_files()

    def _close_files(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Give an error of the system the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def _replaced_files(directory: Path, plan: ExportPlan) -> Iterator[Path]:
    """Give an empty directory to write to; if the block succeeds, its files replace older ones.

    See [Note: replacing files]. If the block raises, `directory` is unchanged.
    """
    directory = target(directory)
    if is_checkpoint(directory):
        raise ValueError(
            f"{directory} is a checkpoint of save(), and save() replaces no directory that has "
            "other files in it; export to another directory"
        )
    is_new = not directory.exists()
    stage = directory / f".export-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            try:
                _clear_stages(directory)
                _stale_files(directory, plan)  # raises early
                (stage / "new").mkdir(parents=True)
                yield stage / "new"
                for entry in (stage / "new").iterdir():
                    sync(entry)
                sync(stage / "new")
                _commit(directory, stage, _stale_files(directory, plan))
            finally:
                _clear_stages(directory)
    finally:
        if is_new:
            with suppress(OSError):  # not empty, unless the export failed
                directory.rmdir()


def _stale_files(path: Path, plan: ExportPlan) -> set[str]:
    """The files of an earlier export that have no new version.

    Raises:
        ValueError: weights that no export wrote would stay, and loaders might prefer them to the
            new ones (transformers prefers a single file to an index, diffusers an index to a single
            file); or a variant has another dtype than the weights whose configuration it shares.
    """
    stale = set()
    for entry in list(path.iterdir()):
        is_new = entry.name in plan.names
        if is_new and entry.is_dir():
            raise IsADirectoryError(f"{entry} is a directory; an export writes a file")
        if is_new or not re.fullmatch(plan.own_names, entry.name):
            continue
        if _is_own(entry):
            stale.add(entry.name)
        elif "-of-" not in entry.name and entry.exists():  # others need an index
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
                f"{path / name} has dtype {existing}, to which loaders convert all weights; this "
                f"export has {own}: export with dtype=torch.{existing}, or to another directory"
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


def _commit(directory: Path, stage: Path, stale: set[str]) -> None:
    """Replace files by those in the stage, and remove stale ones; `_clear_stages` completes it."""
    new = {entry.name for entry in (stage / "new").iterdir()}
    texts = [name for name in new if not name.endswith(_SUFFIX)]
    unchanged, _, _ = filecmp.cmpfiles(directory, stage / "new", texts, shallow=False)
    # Weights after configurations, and an index after the weights.
    names = sorted((new - {*unchanged}) | stale, key=lambda n: (".index." in n, n not in texts, n))
    if len(names) == 1 and not stale:
        os.replace(stage / "new" / names[0], directory / names[0])
    elif _keep_old(directory, stage, names):
        for name in names:
            _put_link(f"{stage.name}/now/{name}", directory / name, stage)
        sync(directory)
        _put_link("new", stage / "now", stage)
        sync(stage)
    else:
        old = stage / "old"
        for name in reversed(names):
            if os.path.lexists(directory / name):
                os.rename(directory / name, old / name)
            else:
                (old / name).mkdir()
        for name in names:
            if name in new:
                os.rename(stage / "new" / name, directory / name)
        sync(directory)
        os.rename(old, stage / "replaced")


def _keep_old(directory: Path, stage: Path, names: list[str]) -> bool:
    """Link the old files to `old`, in which a directory stands for no file.

    False where the file system has no such links; then `old` is empty.
    """
    old = stage / "old"
    old.mkdir()
    try:
        _put_link("old", stage / "now", stage)
        for name in names:
            if (directory / name).exists():
                os.link(os.path.realpath(directory / name), old / name)
            else:
                (old / name).mkdir()
        sync(stage)
    except OSError:
        (stage / "now").unlink(missing_ok=True)
        shutil.rmtree(old)
        old.mkdir()
        return False
    return True


def _put_link(text: str, place: Path, stage: Path) -> None:
    """Replace a name by a symbolic link, in one step."""
    os.symlink(text, stage / "link")
    os.replace(stage / "link", place)


def _clear_stages(directory: Path) -> None:
    """Complete or undo this export and killed ones, and remove their stages."""
    for stage in list(directory.glob(".export-" + "[0-9a-f]" * 8)):
        is_committed = os.path.realpath(stage / "now") == os.path.realpath(stage / "new")
        for entry in list((stage / "old").glob("*")):
            place, source = directory / entry.name, entry
            if is_committed:
                source = stage / "new" / entry.name
                if not place.is_symlink():  # has its new file
                    continue
            if os.path.lexists(source) and not source.is_dir():
                os.replace(source, place)
            else:
                place.unlink(missing_ok=True)
        sync(directory)
        with suppress(FileNotFoundError):
            os.rename(stage / "old", stage / "replaced")  # nothing to be undone any more
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait until no other process exports to the directory, then keep others from it."""
    file = directory / ".export-lock"
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), file.stat()):
                break
        except (BlockingIOError, FileNotFoundError):  # the holder has removed the file
            pass
        except OSError:  # no `flock`
            break
        os.close(fd)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file}: another export has held it for {_LOCK_TIMEOUT_S:.0f} s")
        time.sleep(0.01)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        release(fd)
