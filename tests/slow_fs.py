"""A file system as a bad network file system is, over a directory of a good one.

Names that another host made are seen only `late_s` after the first look for them, every n-th change
fails with EIO while a file says so, and two names cannot be exchanged. Each host mounts its own,
over the one directory. Needs libfuse (Debian: libfuse3-3) and the package mfusepy.

    python -m tests.slow_fs DIRECTORY MOUNTPOINT LATE_S FAULTS
"""

from __future__ import annotations

import errno
import os
import sys
import time
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

    def _made_here(self, path: str) -> None:
        self._first_looked_for[os.path.basename(path), os.lstat(self._real(path)).st_ino] = -1e9

    def _change(self) -> None:
        """Fail every n-th time, where n stands in the file of faults."""
        try:
            every = int(self._faults.read_text())
        except (OSError, ValueError):
            return
        self._changes += 1
        if self._changes % every == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

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
        self._change()
        fd = os.open(self._real(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        self._made_here(path)
        return fd

    def open(self, path: str, flags: int) -> int:
        return os.open(self._real(path), flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._change()
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._change()
        os.truncate(self._real(path) if fh is None else fh, length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._change()
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return self.fsync(path, datasync, fh)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        self._change()
        os.mkdir(self._real(path), mode)
        self._made_here(path)
        return 0

    def rename(self, old: str, new: str) -> int:
        self._change()
        os.rename(self._real(old), self._real(new))
        self._made_here(new)
        return 0

    def link(self, target: str, source: str) -> int:
        self._change()
        os.link(self._real(source), self._real(target))
        self._made_here(target)
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._real(path))
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._real(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        status = os.statvfs(self._real(path))
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree")
        return {name: getattr(status, name) for name in names}


class Mount(mfusepy.FUSE):
    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        """As most network file systems do; mfusepy itself ignores the flags."""
        return -errno.EINVAL if flags else self.rename_fuse_2(old, new)


def main() -> None:
    root, mountpoint, late_s, faults = sys.argv[1:]
    Mount(
        SlowFS(root, float(late_s), Path(faults)),
        mountpoint,
        foreground=True,
        nothreads=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
    )


if __name__ == "__main__":
    main()
