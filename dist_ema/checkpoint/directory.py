"""Atomic replacement of checkpoint directories.

[Note: siblings]
A directory `NAME` is written as `.NAME.tmp-xxxxxxxx` in the same parent and exchanged with `NAME`;
the old directory is then removed. On file systems that cannot exchange two names, the old directory
is `.NAME.old-xxxxxxxx` between two renames. `clear_stale` cleans up after killed processes, and
`find` reads what they left.

Only files that a save writes are removed, by their names; see `is_own`. Other files that appear in
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_ema.core.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # renameat2(2), Linux 3.15

MANIFEST = "manifest.json"  # a directory without it is no checkpoint
SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
_STATUS = re.compile(r"\.?(rank-\d+|left-\d+|outcome)")  # status files of an asynchronous save

VISIBLE_WITHIN_S = 30.0  # delay of a network file system until another host sees a new name


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yield an empty sibling to write a checkpoint to, which replaces `path` at the end.

    At any time `path` is the old directory or the new one (on file systems that cannot exchange two
    names, there is a moment when it is neither and the old one is beside it). If the block raises,
    `path` is unchanged and the sibling is removed. Parents of `path` are created.
    """
    path = target(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is no directory")
    refuse_working_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    new, lock = locked_sibling(path, "tmp")
    try:
        if path.exists():
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        yield new
        for entry in new.iterdir():
            if entry.is_file():
                sync(entry)
        put_in_place(new, path)
    except BaseException:
        remove(new)
        raise
    finally:
        release(lock)


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError unless a path is free, empty, or a checkpoint without further files."""
    while True:
        before = _inode(path)
        try:
            problem = _obstacle(path)
        except FileNotFoundError:  # another process is replacing it
            continue
        if problem is None:
            return
        if _inode(path) == before:  # not replaced meanwhile by another process
            raise CheckpointError(f"{path}: {problem}")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _obstacle(path: Path) -> str | None:
    """Why a path must not be replaced, or None."""
    if not path.exists():
        return None
    if not path.is_dir():
        return "exists and is no directory"
    entries = sorted(entry.name for entry in path.iterdir())
    if entries and MANIFEST not in entries:
        return (
            f"exists and is no checkpoint (it holds {', '.join(entries[:5])}); "
            "remove it or save to another path"
        )
    if entries and not is_checkpoint(path):
        return (
            f"exists and is no checkpoint of dist_ema ({MANIFEST} is of another kind or "
            "damaged); remove it or save to another path"
        )
    foreign = [entry for entry in entries if not is_own(path / entry)]
    if foreign:
        return (
            f"holds files that are not part of the checkpoint ({', '.join(foreign[:5])}); "
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
    return path.resolve() if path.is_symlink() or ".." in path.parts else path.absolute()


def refuse_working_directory(path: Path) -> None:
    """Raise CheckpointError if the working directory is `path` or below it.

    Relative paths would lead into the removed directory.
    """
    try:
        inside = Path.cwd().is_relative_to(path.resolve())
    except FileNotFoundError:  # the working directory was removed
        inside = False
    if inside:
        raise CheckpointError(
            f"{path} holds the working directory and cannot be replaced; give a directory below it"
        )


def sibling(path: Path, kind: str) -> Path:
    """A new hidden name in the same parent; for `kind` see `clear_stale`."""
    return path.parent / f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}"


def clear_stale(path: Path) -> None:
    """Remove what killed writers of this path left in its parent.

    If nothing is at the path, a checkpoint that a writer had renamed is put back. Directories with
    other files are kept, and so are those that another process is writing, if it holds the lock of
    `locked_sibling`. A directory is renamed before it is emptied, so that a writer without a lock
    fails instead of replacing a checkpoint by an empty directory.
    """
    if not path.exists() and (old := _latest_old(path)) is not None:
        with suppress(OSError):  # another process has put it back or replaced it
            os.rename(old, path)
    for entry in _siblings(path, "tmp|old|mail|trash"):
        trash = sibling(path, "trash")
        try:
            if _is_locked(entry) or any(map(_belongs_to_others, _foreign(entry))):
                continue
            os.rename(entry, trash)
        except OSError:  # another process has renamed it
            continue
        remove(trash)


def is_own(path: Path) -> bool:
    """Whether a save may have written all of a directory entry, by names alone."""
    if path.is_dir() and not path.is_symlink():
        names = os.listdir(path)
        return bool(names) and all(map(SHARD.fullmatch, names))
    return path.name == MANIFEST or SHARD.fullmatch(path.name) is not None


def _foreign(directory: Path) -> list[Path]:
    """Files that are no part of a checkpoint, in its directory and those of its averages."""
    foreign = []
    with suppress(OSError):
        for entry in directory.iterdir():
            inside = list(entry.iterdir()) if entry.is_dir() and not entry.is_symlink() else []
            if any(SHARD.fullmatch(each.name) for each in inside):
                foreign += [each for each in inside if not SHARD.fullmatch(each.name)]
            elif not is_own(entry):
                foreign.append(entry)
    return foreign


def _belongs_to_others(path: Path) -> bool:
    """Whether a foreign file is neither a status file nor an empty directory."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return _STATUS.fullmatch(path.name) is None


def remove(directory: Path) -> None:
    """Remove what a save writes to a directory, and the directory if it is empty then."""
    with suppress(OSError):
        for entry in list(directory.iterdir()):
            with suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    for each in list(entry.iterdir()):
                        if SHARD.fullmatch(each.name):
                            each.unlink()
                    entry.rmdir()
                elif is_own(entry) or _STATUS.fullmatch(entry.name):
                    entry.unlink()
        directory.rmdir()


def locked_sibling(path: Path, kind: str) -> tuple[Path, int]:
    """Create a sibling that `clear_stale` of other processes does not remove.

    Returns:
        The directory, and the file descriptor that holds its lock, for `release`. The kernel
        releases the lock when this process ends.
    """
    while True:
        directory = sibling(path, kind)
        directory.mkdir()
        fd = _lock(directory)
        if fd is None:  # removed by another process before it was locked
            continue
        if directory.exists():
            return directory, fd
        os.close(fd)


def _lock(directory: Path) -> int | None:
    """Lock a directory against `clear_stale`; None if it does not exist."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # another writer has locked it, or the file system has no locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def release(fd: int) -> None:
    """Release a lock, even if a forked child has inherited the descriptor."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:  # a file system without locks
        pass
    os.close(fd)


def _is_locked(directory: Path) -> bool:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def find(path: Path) -> Path:
    """The directory to read for a path: itself, or the one that a killed writer had renamed."""
    path = target(path)
    if path.exists():
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


def put_in_place(new: Path, path: Path) -> None:
    """Replace a path by a sibling, atomically where the file system can, and sync.

    The sibling's files must be on disk. Other files that are in `path` by now are moved to it.

    Raises:
        OSError: the system refuses, or `new` is no checkpoint. `path` is unchanged.
    """
    (new / MANIFEST).stat()
    sync(new)
    old, lock = None, _lock(path) if path.exists() else None
    try:
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
            aside = sibling(path, "old")
            with suppress(FileNotFoundError):  # another process is replacing it
                os.rename(path, aside)
                old = aside
        sync(path.parent)
        if old is not None:
            _clear_replaced(old, path)
            sync(path.parent)
    finally:
        if lock is not None:
            release(lock)


def _clear_replaced(old: Path, path: Path) -> None:
    """Remove a replaced directory, after moving other files in it to the same names in `path`."""
    with suppress(OSError):  # another process has cleared it away
        for each in _foreign(old):
            to = path / each.relative_to(old)
            to.parent.mkdir(exist_ok=True)
            _rename_to_free_name(each, to)
    remove(old)


def _siblings(path: Path, kinds: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{path.name}.") + rf"({kinds})-[0-9a-f]{{8}}")
    try:
        entries = list(path.parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        entry
        for entry in entries
        if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
    ]


def _latest_old(path: Path) -> Path | None:
    whole = [entry for entry in _siblings(path, "old") if (entry / MANIFEST).exists()]
    return max(whole, key=lambda entry: entry.stat().st_ctime, default=None)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two directories atomically; False where the system cannot."""
    return _renameat2(a, b, _RENAME_EXCHANGE) == 0


def _rename_to_free_name(source: Path, to: Path) -> None:
    """Rename, unless the new name exists."""
    code = _renameat2(source, to, _RENAME_NOREPLACE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) and not os.path.lexists(to):
        os.rename(source, to)


def _renameat2(a: Path, b: Path, flags: int) -> int:
    """Returns an error number, 0 for success."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return errno.ENOSYS
    failed = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags)
    return ctypes.get_errno() if failed else 0
