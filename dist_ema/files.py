"""Directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15


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
    path = path.resolve() if path.is_symlink() else path.absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is no directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    new.mkdir()
    try:
        yield new
        if keep is not None and path.exists():
            for entry in path.iterdir():
                if keep(entry.name) and not (new / entry.name).exists():
                    _carry(entry, new / entry.name)
        for file in new.iterdir():
            if file.is_file():
                sync(file)
        sync(new)
        _put_in_place(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def _put_in_place(new: Path, path: Path) -> None:
    try:
        os.rename(new, path)  # replaces an empty directory as well
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _exchange(new, path):
            old = new
        else:
            old = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
            os.rename(path, old)
            os.rename(new, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return int(result) == 0
