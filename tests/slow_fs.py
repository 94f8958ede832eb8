"""A file system as a bad network file system is, over a directory of a good one.

Names that another host made are seen only `late_s` after the first look for them, every n-th change
fails with EIO while a file says so, and two names cannot be exchanged. Each host mounts its own,
over the one directory. Needs libfuse (Debian: libfuse3-3) and the package mfusepy.

    python -m tests.slow_fs DIRECTORY MOUNTPOINT LATE_S FAULTS
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mfusepy


class SlowFS(mfusepy.Operations):
    use_ns = True

    def __init__(self, root: str, late_s: float, faults: Path) -> None:
        self._root, self._late_s, self._faults = root, late_s, faults
        self._first_looked_for: dict[tuple[str, int], float] = {}
        self._changes = 0

    def _real(self, path: str) -> str:
        return self._root + path

    def _is_seen(self, path: str, inode: int) -> bool:
        now = time.monotonic()
        since = self._first_looked_for.setdefault((os.path.basename(path), inode), now)
        return path == "/" or now - since >= self._late_s

    def _change(self, call: Callable[[], Any] = lambda: 0, made: str | None = None) -> Any:
        """Fail every n-th time, where n stands in the file of faults; `made` is a new name."""
        every = 0
        with contextlib.suppress(OSError, ValueError):
            every = int(self._faults.read_text())
        self._changes += every > 0
        if every and self._changes % every == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        result = call()
        if made is not None:
            inode = os.lstat(self._real(made)).st_ino
            self._first_looked_for[os.path.basename(made), inode] = -1e9
        return 0 if result is None else result

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        status = os.fstat(fh) if fh is not None else os.lstat(self._real(path))
        if fh is None and not self._is_seen(path, status.st_ino):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {f"st_{t}time": getattr(status, f"st_{t}time_ns") for t in "amc"}
        return {name: getattr(status, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        with os.scandir(self._real(path)) as entries:
            return [".", "..", *(e.name for e in entries if self._is_seen(e.name, e.inode()))]

    def create(self, path: str, mode: int, flags: Any = None) -> int:
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self._change(lambda: os.open(self._real(path), how, mode), path)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._real(path), flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return self._change(lambda: os.pwrite(fh, data, offset))

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        return self._change(lambda: os.truncate(self._real(path) if fh is None else fh, length))

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        return self._change()

    fsyncdir = fsync

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        return self._change(lambda: os.mkdir(self._real(path), mode), path)

    def rename(self, old: str, new: str) -> int:
        return self._change(lambda: os.rename(self._real(old), self._real(new)), new)

    def link(self, target: str, source: str) -> int:
        return self._change(lambda: os.link(self._real(source), self._real(target)), target)

    def unlink(self, path: str) -> int:
        return os.unlink(self._real(path)) or 0

    def rmdir(self, path: str) -> int:
        return os.rmdir(self._real(path)) or 0

    def chmod(self, path: str, mode: int) -> int:
        return os.chmod(self._real(path), mode) or 0


class Mount(mfusepy.FUSE):
    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        """As most network file systems do; mfusepy itself ignores the flags."""
        return -errno.EINVAL if flags else self.rename_fuse_2(old, new)


def main() -> None:
    root, mountpoint, late_s, faults = sys.argv[1:]
    timeouts = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), 0)
    fs = SlowFS(root, float(late_s), Path(faults))
    Mount(fs, mountpoint, foreground=True, nothreads=True, **timeouts)


if __name__ == "__main__":
    main()
