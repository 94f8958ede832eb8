"""Directories of checkpoints that appear whole or not at all.

[Note: siblings]
A directory `NAME` is written as `.NAME.tmp-xxxxxxxx` beside it and exchanged with what stands
there; what stood there is then removed under that name. Where the file system cannot exchange two
names, the old directory is `.NAME.old-xxxxxxxx` for the moment between two renames. Whatever a
killed process left of these is put right by `clear_stale`, and read by `find`.

Only files that a save writes are ever removed, by their names; see `is_ours`. Files of others that
appear in a directory while it is replaced keep their path: they are moved to the new directory.
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

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2  # renameat2(2), Linux 3.15

MANIFEST = "manifest.json"  # a directory without it is no checkpoint
SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
_LETTER = re.compile(r"\.?(rank-\d+|left-\d+|outcome)")  # of ranks that save in the background

SEEN_WITHIN_S = 30.0  # a network file system may show a new name that late on another host


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Give an empty sibling to write a checkpoint to; it takes the place of `path` if all is well.

    At any instant `path` is the old directory or the new one (on file systems that cannot exchange
    two names there is a moment when it is neither, and the old one stands beside it). If the block
    raises, `path` is as it was and the sibling is gone.

    Args:
        path: directory; its parents are made.
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


def target(path: Path) -> Path:
    """The absolute path that is to be replaced: a link's target stands for the link."""
    return path.resolve() if path.is_symlink() or ".." in path.parts else path.absolute()


def refuse_working_directory(path: Path) -> None:
    """Refuse to replace a directory that holds the working directory of this process.

    Raises:
        ValueError: relative paths would lead into the directory that was removed.
    """
    try:
        inside = Path.cwd().is_relative_to(path.resolve())
    except FileNotFoundError:  # the working directory was removed
        inside = False
    if inside:
        raise ValueError(
            f"{path} holds the working directory and cannot be replaced; give a directory below it"
        )


def sibling(path: Path, kind: str) -> Path:
    """A fresh hidden name beside a path; `kind` is one of those of `clear_stale`."""
    return path.parent / f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}"


def clear_stale(path: Path) -> None:
    """Remove what killed writers of this path left beside it.

    If there is nothing at the path, a checkpoint that a writer had put aside is put back.

    What holds files of others is left alone, and so is what another process is writing, if it holds
    the lock of `locked_sibling`. A directory is renamed before it is emptied, so that its writer,
    if there is one that holds no lock, fails instead of putting an empty directory in the place of
    a checkpoint.
    """
    if not path.exists() and (old := _latest_old(path)) is not None:
        with suppress(OSError):  # another process has put it back or replaced it
            os.rename(old, path)
    for entry in _siblings(path, "tmp|old|mail|trash"):
        trash = sibling(path, "trash")
        try:
            if _is_locked(entry) or any(map(_is_of_others, _foreign(entry))):
                continue
            os.rename(entry, trash)
        except OSError:  # another process has renamed it
            continue
        remove(trash)


def is_ours(path: Path) -> bool:
    """Whether a save may have written an entry of a directory, all of it. By names alone."""
    if path.is_dir() and not path.is_symlink():
        names = os.listdir(path)
        return bool(names) and all(map(SHARD.fullmatch, names))
    return path.name == MANIFEST or SHARD.fullmatch(path.name) is not None


def _foreign(directory: Path) -> list[Path]:
    """What is no part of a checkpoint in its directory, and in those of its averages."""
    foreign = []
    with suppress(OSError):
        for entry in directory.iterdir():
            inside = list(entry.iterdir()) if entry.is_dir() and not entry.is_symlink() else []
            if any(SHARD.fullmatch(each.name) for each in inside):
                foreign += [each for each in inside if not SHARD.fullmatch(each.name)]
            elif not is_ours(entry):
                foreign.append(entry)
    return foreign


def _is_of_others(path: Path) -> bool:
    """Whether what is no part of a checkpoint is neither a letter nor a directory to write to."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return _LETTER.fullmatch(path.name) is None


def remove(directory: Path) -> None:
    """Remove what a save writes to a directory, and what is empty then. Files of others stay."""
    with suppress(OSError):
        for entry in list(directory.iterdir()):
            with suppress(OSError):
                if entry.is_dir() and not entry.is_symlink():
                    for each in list(entry.iterdir()):
                        if SHARD.fullmatch(each.name):
                            each.unlink()
                    entry.rmdir()
                elif is_ours(entry) or _LETTER.fullmatch(entry.name):
                    entry.unlink()
        directory.rmdir()


def locked_sibling(path: Path, kind: str) -> tuple[Path, int]:
    """Make a sibling that `clear_stale` of other processes leaves alone.

    Returns:
        The directory, and the file descriptor that holds its lock. The kernel releases the lock
        when this process ends; `release` does it earlier.
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
    """Let `clear_stale` leave a directory alone; None if it does not exist."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # another writer has locked it, or the file system has no locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def release(fd: int) -> None:
    """Release a lock, also where a forked child has inherited the descriptor."""
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
    """The directory to read for a path: itself, or the one that a killed writer had put aside."""
    path = target(path)
    if path.exists():
        return path
    return _latest_old(path) or path


def becomes_visible(is_visible: Callable[[], bool]) -> bool:
    """Wait until another host's files are visible here; False if they are not after a while."""
    deadline = time.monotonic() + SEEN_WITHIN_S
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
    """Let a sibling take the place of a path, in one step where the system can; durable after.

    What is in it must be on disk already. Files of others that are at the path by now go over.

    Raises:
        OSError: the system refuses, or `new` is no checkpoint (any more). `path` is as it was.
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
    """Remove what was replaced, and move what others wrote there to the same names below `path`."""
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
    """Let two directories change names in one step; False where the system cannot."""
    return _renameat2(a, b, _RENAME_EXCHANGE) == 0


def _rename_to_free_name(source: Path, to: Path) -> None:
    """Rename, unless there is something of the new name: then nothing happens."""
    code = _renameat2(source, to, _RENAME_NOREPLACE)
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) and not os.path.lexists(to):
        os.rename(source, to)


def _renameat2(a: Path, b: Path, flags: int) -> int:
    """An error number; 0 if all is well."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return errno.ENOSYS
    failed = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags)
    return ctypes.get_errno() if failed else 0
