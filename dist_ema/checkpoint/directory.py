"""Atomic replacement of checkpoint directories.

[Note: siblings]
A directory `NAME` is written as `.NAME.tmp-xxxxxxxx` in the same parent and exchanged with `NAME`;
the old directory is then removed. On file systems that cannot exchange two names, the old directory
is `.NAME.old-xxxxxxxx` between two renames. `clear_stale` cleans up after killed processes, and
`find` reads what they left.

Only files that a save writes are removed, by their names; see `_files`. Other files that appear in
a directory while it is replaced keep their path: they are moved to the new directory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dist_ema.core.errors import CheckpointError

_MAX_OPEN = 256  # files at a time; the limit of a process is often 1024
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15
_SYNC_FILE_RANGE_WRITE = 2

MANIFEST = "manifest.json"  # a directory without it is no checkpoint
_OWN_FILES = re.compile(
    r"manifest\.json|([^/]+/)?shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors"
    r"|\.?dist_ema\.rank-\d+"  # of an asynchronous save
)

VISIBLE_WITHIN_S = 30.0  # delay of a network file system until another host sees a new name


@contextmanager
def replaced_directory(path: Path, *, sync_files: bool = True) -> Iterator[Path]:
    """Yield an empty sibling to write a checkpoint to, which replaces `path` at the end.

    At any time `path` is the old directory or the new one (on file systems that cannot exchange two
    names, there is a moment when it is neither and the old one is beside it). If the block raises,
    `path` is unchanged and the sibling is removed. Parents of `path` are created.

    Args:
        sync_files: flush the files to disk after the block; False if the block does so.

    Raises:
        CheckpointError: see `refuse_foreign` and `refuse_working_directory`.
    """
    path = target(path)
    refuse_working_directory(path)
    refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    with hidden_sibling(path, "tmp") as new:
        yield new
        for file, is_own in _files(new) if sync_files else ():
            if is_own:
                sync(file)
        refuse_foreign(path)
        with suppress(FileNotFoundError):
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        put_in_place(new, path)


@contextmanager
def hidden_sibling(path: Path, kind: str) -> Iterator[Path]:
    """Yield an empty directory beside `path`. After the block, the files of a save are removed.

    It is locked, so that `clear_stale` of other processes does not remove it. The kernel releases
    the lock when this process ends.
    """
    with ExitStack() as locks:
        while True:
            directory = _sibling(path, kind)
            directory.mkdir()
            with suppress(FileNotFoundError):  # another process removed it before it was locked
                if locks.enter_context(_locked(directory)) and directory.exists():
                    break
        try:
            yield directory
        finally:
            remove(directory)


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError unless a path is free, empty, or a checkpoint without further files."""
    with suppress(FileNotFoundError):  # free, or another process is replacing it
        while True:
            before = path.stat().st_ino
            problem = _obstacle(path)
            if problem is None:
                return
            if path.stat().st_ino == before:  # not replaced meanwhile by another process
                raise CheckpointError(f"{path}: {problem}")


def _obstacle(path: Path) -> str | None:
    """Why an existing path must not be replaced, or None."""
    if not path.is_dir():
        return "exists and is no directory"
    entries = sorted(os.listdir(path))
    if not entries:
        return None
    if MANIFEST not in entries:
        return (
            f"exists and is no checkpoint (it holds {', '.join(entries[:5])}); "
            "remove it or save to another path"
        )
    if not is_checkpoint(path):
        return (
            f"exists and is no checkpoint of dist_ema ({MANIFEST} is of another kind or "
            "damaged); remove it or save to another path"
        )
    foreign = {file.relative_to(path).parts[0] for file, is_own in _files(path) if not is_own}
    if foreign:
        return (
            f"holds files that are not part of the checkpoint ({', '.join(sorted(foreign)[:5])}); "
            "move them away or save to another path"
        )
    return None


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds the manifest of a save."""
    with suppress(FileNotFoundError, NotADirectoryError):
        with open(directory / MANIFEST, "rb") as file:
            return file.read(64).startswith(b'{"format":"dist_ema"')
    return False


def target(path: Path) -> Path:
    """The absolute path to replace: for a symbolic link, its target."""
    is_direct = not os.path.islink(path) and ".." not in path.parts
    return path.absolute() if is_direct else Path(os.path.realpath(path))


def refuse_working_directory(path: Path) -> None:
    """Raise CheckpointError if the working directory is `path` or below it.

    Relative paths would lead into the removed directory.
    """
    with suppress(FileNotFoundError):  # the working directory was removed
        if Path.cwd().is_relative_to(os.path.realpath(path)):
            raise CheckpointError(
                f"{path} holds the working directory and cannot be replaced; give a directory "
                "below it"
            )


def clear_stale(path: Path) -> None:
    """Remove what killed writers of this path left in its parent.

    If nothing is at the path, a checkpoint that a writer had renamed is put back. Directories with
    other files are kept, and so are those of `hidden_sibling` in a living process. A directory is
    renamed before it is emptied, so that a writer without a lock fails instead of replacing a
    checkpoint by an empty directory.
    """
    if not path.exists() and (old := _latest_old(path)) is not None:
        with suppress(OSError):  # another process has put it back or replaced it
            os.rename(old, path)
    for entry in _siblings(path, "tmp|old|mail|trash"):
        with suppress(OSError), _locked(entry) as is_free:  # or another process has renamed it
            if is_free and all(is_own or file.is_dir() for file, is_own in _files(entry)):
                trash = _sibling(path, "trash")
                os.rename(entry, trash)
                remove(trash)


def _files(directory: Path) -> Iterator[tuple[Path, bool]]:
    """All files and empty directories below a directory, and whether a save wrote them, by name."""
    for parent, directories, names in os.walk(directory):
        if not directories and not names and Path(parent) != directory:
            yield Path(parent), False
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *links):
            file = Path(parent, name)
            yield file, _OWN_FILES.fullmatch(str(file.relative_to(directory))) is not None


def remove(directory: Path) -> None:
    """Remove the files that a save wrote to a directory, then the directories that are empty."""
    for file, is_own in list(_files(directory)):
        with suppress(OSError):
            if is_own:
                file.unlink()
    for parent, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):
            os.rmdir(parent)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory; yields False if another process holds the lock.

    On a file system without locks, nothing is locked.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    is_free = True
    try:
        with suppress(OSError):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
        yield is_free
    finally:
        release(fd)


def release(lock: int) -> None:
    """Release a lock, even if a forked child has inherited the descriptor."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def find(path: Path) -> Path:
    """The directory to read for a path: itself, or the one that a killed writer had renamed."""
    path = target(path)
    if os.path.exists(path):
        return path
    return _latest_old(path) or path


def becomes_visible(is_visible: Callable[[], bool]) -> bool:
    """Wait until another host's files are visible here; False after `VISIBLE_WITHIN_S`."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not is_visible():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Let the disk begin to write a range of a file, where the system can, without waiting."""
    with suppress(AttributeError, OSError):
        offset, length = ctypes.c_int64(start), ctypes.c_int64(nbytes)
        ctypes.CDLL(None).sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def put_in_place(new: Path, path: Path) -> None:
    """Replace a path by a sibling, atomically where the file system can, and sync.

    The sibling's files must be on disk. Other files that are in `path` by now are moved to it.

    Raises:
        OSError: the system refuses, or `new` is no checkpoint. `path` is unchanged.
    """
    (new / MANIFEST).stat()
    for parent, _, _ in os.walk(new):
        sync(Path(parent))
    old = None
    with ExitStack() as locks:
        with suppress(FileNotFoundError):
            locks.enter_context(_locked(path))
        while True:
            try:
                os.rename(new, path)  # replaces an empty directory as well
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    if old is not None and not path.exists():
                        os.rename(old, path)
                    raise
            if _exchange(new, path):
                old = new
                break
            aside = _sibling(path, "old")
            with suppress(FileNotFoundError):  # another process is replacing it
                os.rename(path, aside)
                old = aside
        sync(path.parent)
        if old is not None:
            _keep_other_files(old, path)
            remove(old)
            sync(path.parent)


def _keep_other_files(old: Path, new: Path) -> None:
    """Move files that `save` did not write from the replaced directory to the new one."""
    for file in [file for file, is_own in _files(old) if not is_own]:
        to = new / file.relative_to(old)
        with suppress(OSError):  # another process has cleared it away
            to.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(to):
                os.rename(file, to)


def _sibling(path: Path, kind: str) -> Path:
    """A new hidden name in the same parent; for `kind` see `clear_stale`."""
    return path.parent / f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}"


def _siblings(path: Path, kinds: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{path.name}.") + rf"({kinds})-[0-9a-f]{{8}}")
    with suppress(OSError):  # no such directory, or it may not be read
        named = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
        return [entry for entry in named if entry.is_dir() and not entry.is_symlink()]
    return []


def _latest_old(path: Path) -> Path | None:
    whole = [entry for entry in _siblings(path, "old") if (entry / MANIFEST).exists()]
    return max(whole, key=lambda entry: entry.stat().st_ctime, default=None)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two directories atomically; False where the system cannot."""
    names = _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b)
    with suppress(AttributeError, OSError):
        return bool(ctypes.CDLL(None).renameat2(*names, _RENAME_EXCHANGE) == 0)
    return False


# Reading.


class Files:
    """The files of one directory, kept open while they are read.

    If the directory is replaced meanwhile, the files of the old one are read: names are looked up
    in the directory that was opened.
    """

    def __init__(self, directory: Path, num: int = 1) -> None:
        """
        Args:
            num: number of directories that are open at a time. They share the limit of open files.
        """
        self.directory = directory
        self._max_open = max(1, _MAX_OPEN // num)
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{directory}: {error.strerror}; a checkpoint is a directory that every rank sees"
            ) from error
        self._open: OrderedDict[str, int] = OrderedDict()
        self._first: dict[str, tuple[int, ...]] = {}  # identity of each file when first opened

    def close(self) -> None:
        for fd in (self._fd, *self._open.values()):
            os.close(fd)

    def names(self, below: str = "") -> list[str]:
        """Names in the directory, or in one below it, sorted; [] if it does not exist."""
        try:
            fd = os.open(below or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._fd)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def has(self, name: str) -> bool:
        """Whether there is a regular file of this name."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self._fd).st_mode)
        except OSError:
            return False

    def checkpoints(self) -> list[str]:
        """Names of directories in this one that are checkpoints of `save`, sorted."""
        return [name for name in self.names() if self.has(f"{name}/{MANIFEST}")]

    def size(self, name: str) -> int:
        return os.fstat(self._file(name)).st_size

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a file from `start` on."""
        fd, done = self._file(name), 0
        while done < len(buffer):
            try:
                n = os.preadv(fd, [buffer[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.directory / name}: {error.strerror}") from error
            if n == 0:
                raise CheckpointError(
                    f"{self.directory / name}: ends at byte {start + done}, wanted "
                    f"{start + len(buffer)}; the file is cut short"
                )
            done += n

    def read_bytes(self, name: str, start: int, nbytes: int) -> bytes:
        """A part of a file; `nbytes` must be validated by the caller."""
        buffer = bytearray(nbytes)
        self.read(name, start, memoryview(buffer))
        return bytes(buffer)

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            # Opening a pipe without O_NONBLOCK would wait for its other end.
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise CheckpointError(f"{self.directory / name}: {error.strerror}") from error
        status, problem = os.fstat(fd), ""
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            problem = "is no regular file"
        elif self._first.setdefault(name, identity) != identity:
            problem = "was replaced while it was read; load again"
        if problem:
            os.close(fd)
            raise CheckpointError(f"{self.directory / name}: {problem}")
        while len(self._open) >= self._max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = fd
        return fd
