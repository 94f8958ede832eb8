"""Replacing several files of a directory at one instant, while others use the directory.

[Note: replacing files]
New files are written to a hidden directory inside the target, `.export-xxxxxxxx/new`, the stage.
When they are complete and on disk, they take their places:

- If one file differs from what is there, it is renamed over the old one.
- Otherwise every name that changes first becomes a symbolic link into the stage, to `now/NAME`.
  `now` is itself a link, to `old`, which has a hard link to each file that was there: nothing has
  changed for readers. Then `now` is replaced by a link to `new`. This one rename is the commit: it
  changes the configuration, the index and all weights together, for any reader. Then each file is
  renamed from the stage over its link.

A process that is killed leaves links that lead to the old files or to the new ones, all of them to
the same set. The next export turns them into plain files and removes the stage. A stage holds a
lock (`flock`) while its process lives, so that stages of live exports are never removed; the lock
`.export-lock` lets one process at a time change names. Two exports to one directory follow each
other, and the later one stays.

No other file of the directory is moved, linked, opened or deleted.

On a file system without links, files are renamed one by one. The old ones are put aside first, so
that a process that is killed within these renames leaves a directory that cannot be loaded, but
never a mixture of two exports; the old files are then in `.export-xxxxxxxx/old`. On a file system
without `flock`, exports to one directory must not run at the same time, and a stage counts as
abandoned after a day.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dist_ema.checkpoint.directory import sync, target

_STAGE = re.compile(r"\.export-[0-9a-f]{8}")
_LOCKED_WITHIN_S = 60.0
_ABANDONED_AFTER_S = 86400.0  # where locks cannot tell
_COMPARED_BYTES = 1 << 20  # larger files are replaced without a look


@contextmanager
def replaced_files(directory: Path, find_stale: Callable[[], set[str]]) -> Iterator[Path]:
    """Give an empty directory to write to; its files replace those of `directory` if all is well.

    Readers of `directory` see all of the old files or all of the new ones; see
    [Note: replacing files]. If the block raises, `directory` is as it was.

    Args:
        directory: made if it does not exist, with its parents.
        find_stale: called while no other export changes names; says which files of `directory`
            have no new version and are to be removed. May raise: then nothing is replaced.

    Raises:
        OSError: `directory` is a file, or the file system refuses.
    """
    directory = target(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is not a directory")
    is_new = not directory.exists()
    stage = directory / f".export-{uuid.uuid4().hex[:8]}"
    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                _clear_abandoned(directory)
                (stage / "new").mkdir(parents=True)
                lock = _lock(stage / "lock")
                if lock is not None:
                    held.callback(os.close, lock[0])
            yield stage / "new"
            for entry in (stage / "new").iterdir():
                sync(entry)
            sync(stage / "new")
            with _locked(directory):
                _commit(directory, stage, find_stale())
        finally:
            if stage.exists():
                _settle(directory, stage)
                shutil.rmtree(stage, ignore_errors=True)
            if is_new:
                with suppress(OSError):  # not empty, unless the export failed
                    directory.rmdir()


def _commit(directory: Path, stage: Path, removed: set[str]) -> None:
    new = {entry.name for entry in (stage / "new").iterdir()}
    changed = {name for name in new if not _is_same(directory / name, stage / "new" / name)}
    names = sorted(changed | removed, key=_commit_order)
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a directory; an export writes a file")
    if len(names) == 1 and not removed:
        os.replace(stage / "new" / names[0], directory / names[0])
    elif _keep_old(directory, stage, names):
        _link_names(directory, stage, names)
        _point(stage, "new")
        _settle(directory, stage)
    else:
        _replace_in_turn(directory, stage, names)
    sync(directory)
    _clear_abandoned(directory, is_replaced=True)


def _commit_order(name: str) -> tuple[bool, bool, str]:
    """Weights after configurations, and an index after the weights."""
    return ".index." in name, name.endswith(".safetensors"), name


def _is_same(old: Path, new: Path) -> bool:
    if not old.is_file() or new.stat().st_size > _COMPARED_BYTES:
        return False
    return filecmp.cmp(old, new, shallow=False)


def _keep_old(directory: Path, stage: Path, names: Sequence[str]) -> bool:
    """Link the old files into the stage; False where the file system has no such links."""
    try:
        (stage / "old").mkdir()
        for name in names:
            place = directory / name
            if place.is_symlink():
                os.symlink(os.path.realpath(place), stage / "old" / name)
            elif place.exists():
                os.link(place, stage / "old" / name)
        _point(stage, "old")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        shutil.rmtree(stage / "old")
        return False
    return True


def _point(stage: Path, name: str) -> None:
    """Let `now` lead to the old or the new files."""
    os.symlink(name, stage / "link")
    os.replace(stage / "link", stage / "now")
    sync(stage)


def _link_names(directory: Path, stage: Path, names: Sequence[str]) -> None:
    for name in names:
        os.symlink(_link_text(stage, name), stage / "link")
        os.replace(stage / "link", directory / name)
    sync(directory)


def _link_text(stage: Path, name: str) -> str:
    return f"{stage.name}/now/{name}"


def _settle(directory: Path, stage: Path) -> None:
    """Put the file that each link into a stage leads to in the place of the link."""
    for entry in list(directory.iterdir()):
        if _leads_to(entry, _link_text(stage, entry.name)):
            try:
                os.rename(stage / "now" / entry.name, entry)
            except FileNotFoundError:
                entry.unlink()
    sync(directory)


def _leads_to(entry: Path, text: str) -> bool:
    """Whether a name is a link of this text; another export may change its own names meanwhile."""
    try:
        return os.readlink(entry) == text
    except OSError:  # no link, or no longer there
        return False


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
    """Remove the stages of killed processes; what their links lead to stays, as plain files.

    A stage that holds the only copy of the old files stays until new ones are in their places.
    """
    for stage in list(directory.iterdir()):
        if not _STAGE.fullmatch(stage.name) or not _is_abandoned(stage):
            continue
        _settle(directory, stage)
        has_only_copy = (stage / "old").exists() and not (stage / "now").is_symlink()
        if is_replaced or not has_only_copy:
            shutil.rmtree(stage, ignore_errors=True)


def _is_abandoned(stage: Path) -> bool:
    try:
        lock = _lock(stage / "lock")
    except OSError:  # removed meanwhile, or another user's
        return False
    if lock is None:
        return False
    fd, is_sure = lock
    os.close(fd)
    return is_sure or time.time() - stage.stat().st_mtime > _ABANDONED_AFTER_S


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Be the only process that changes names in the directory."""
    file = directory / ".export-lock"
    until = time.monotonic() + _LOCKED_WITHIN_S
    # Whoever held the lock before has removed the file: then it must be made anew.
    while (lock := _lock(file)) is None or not _is_at(lock[0], file):
        if lock is not None:
            os.close(lock[0])
        if time.monotonic() > until:
            raise TimeoutError(f"{file}: another export has held it for {_LOCKED_WITHIN_S:.0f} s")
        time.sleep(0.01)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(lock[0])


def _lock(file: Path) -> tuple[int, bool] | None:
    """Lock a file, which is made if needed, until its descriptor is closed.

    Returns:
        The descriptor, and False where the file system has no locks; None if another holds it.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        return fd, False
    return fd, True


def _is_at(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except FileNotFoundError:
        return False
