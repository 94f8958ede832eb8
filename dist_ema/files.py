"""Directories that appear whole or not at all.

[Note: siblings]
A directory `NAME` is written as `.NAME.tmp-xxxxxxxx` beside it and exchanged with what stands
there; what stood there is then removed under that name. Where the file system cannot exchange two
names, the old directory is `.NAME.old-xxxxxxxx` for the moment between two renames. Whatever a
killed process left of these is put right by `clear_stale`, and read by `find`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15

SEEN_WITHIN_S = 30.0  # a network file system may show a new name that late on another host


@contextmanager
def replaced_directory(path: Path, keep: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Give an empty sibling to write to, and put it in the place of `path` if the block succeeds.

    At any instant `path` is the old directory or the new one (on file systems that cannot exchange
    two names there is a moment when it is neither, and the old one stands beside it). If the block
    raises, `path` is as it was and the sibling is gone.

    Args:
        path: directory; its parents are made.
        keep: which entries of the old directory, by name, go over to the new one as they are.
    """
    path = target(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is no directory")
    refuse_working_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_stale(path)
    new = sibling(path, "tmp")
    new.mkdir()
    try:
        if path.exists():
            new.chmod(stat.S_IMODE(path.stat().st_mode))
        yield new
        for entry in new.iterdir():
            if entry.is_file():
                sync(entry)
        put_in_place(new, path, keep)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


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
    """Remove what killed writers of this path left beside it; put the old one back if it is all.

    What another process is writing is left alone if it holds the lock of `locked_sibling`. A
    directory is renamed before it is emptied, so that its writer, if there is one that holds no
    lock, fails instead of putting an empty directory in the place of a checkpoint.
    """
    if not path.exists() and (old := _latest_old(path)) is not None:
        os.rename(old, path)
    for entry in _siblings(path, "tmp|old|mail|trash"):
        if _is_locked(entry):
            continue
        trash = sibling(path, "trash")
        try:
            os.rename(entry, trash)
        except OSError:  # another process has renamed it
            continue
        shutil.rmtree(trash, ignore_errors=True)


def locked_sibling(path: Path, kind: str) -> tuple[Path, int]:
    """Make a sibling that `clear_stale` of other processes leaves alone.

    Returns:
        The directory, and the file descriptor that holds its lock. The kernel releases the lock
        when this process ends; `release` does it earlier.
    """
    while True:
        directory = sibling(path, kind)
        directory.mkdir()
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # removed by another process before it was locked
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # being removed, or a file system without locks
            pass
        if directory.exists():
            return directory, fd
        os.close(fd)


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


def put_in_place(new: Path, path: Path, keep: Callable[[str], bool] | None = None) -> None:
    """Let a sibling take the place of a path, in one step where the system can; durable after.

    What is in it must be on disk already. `keep` is as for `replaced_directory`.
    """
    seen: set[str] = set()
    if keep is not None and path.exists():
        for entry in path.iterdir():
            seen.add(entry.name)
            if keep(entry.name) and not (new / entry.name).exists():
                _carry(entry, new / entry.name)
    sync(new)
    try:
        os.rename(new, path)  # replaces an empty directory as well
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _exchange(new, path):
            old = new
        else:
            old = sibling(path, "old")
            os.rename(path, old)
            try:
                os.rename(new, path)
            except OSError:
                os.rename(old, path)
                raise
        try:
            late = [] if keep is None else [e for e in old.iterdir() if e.name not in seen]
            for entry in late:
                # What somebody else wrote there while the others were carried over.
                if not (path / entry.name).exists():
                    os.rename(entry, path / entry.name)
        except FileNotFoundError:  # another process that saves to this path has cleared it away
            pass
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def _siblings(path: Path, kinds: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{path.name}.") + rf"({kinds})-[0-9a-f]{{8}}")
    try:
        entries = list(path.parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if pattern.fullmatch(entry.name)]


def _latest_old(path: Path) -> Path | None:
    return max(_siblings(path, "old"), key=lambda entry: entry.stat().st_ctime, default=None)


def _carry(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
        sync(Path(target))


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return int(result) == 0
