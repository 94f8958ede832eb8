"""Asynchronous saves: the thread that writes, and the status files through which ranks agree.

[Note: status files]
While a save is written in the background, training may be inside a collective of any process group,
or have destroyed all groups. So the threads of a save use none. All planning happens before, on the
calling thread. What remains is whether each rank succeeded, and the checksums of its files. They go
through files in a directory next to the checkpoint's, on the file system that all ranks share.

Before the thread starts, each rank creates its status file, with space reserved for an error
message, so that a full disk or a missing permission cannot prevent a report. A rank reports by
writing the file and renaming it from `.rank-3` to `rank-3`. Rank 0 waits for every rank, commits or
gives up, and reports the result in `outcome`; the others wait for it.

Each rank holds a lock on its file while it takes part. The kernel releases the lock when the
process ends, and so the others notice. It is a POSIX record lock: forked children do not inherit
it, and NFS supports it. Before the thread starts, ranks check which locks they see. A rank whose
lock is not visible, because hosts do not share locks, is given up when no file grows for `timeout`.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dist_ema.checkpoint.directory import becomes_visible, remove
from dist_ema.core.errors import CheckpointError

TIMEOUT_S = 300.0  # without progress, until a rank is given up
_EXTRA_FOR_RANK_0_S = 30.0  # for rank 0 to tell the others that it gave up a rank
_PROBE_EVERY_S = 1.0  # whether processes live; longer for many ranks
_RESERVED_BYTES = 8192  # of each status file
_LONGEST_PROBLEM = _RESERVED_BYTES // 12 - 20  # characters; JSON writes one as up to 12 bytes
_ACKNOWLEDGE_S = 60.0  # for all ranks to read the outcome
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.5
_NUM_LOOKS = 30  # at the growing files, per timeout: there may be thousands
_ENDED = "ended before it had written its part: the process is gone, or could not report"


class Handle:
    """An asynchronous save."""

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        self.path = path
        self._problem: Exception | None = None
        self._is_known = False  # whether the caller has learned how the save ended
        # Not a daemon: the interpreter waits for the thread before it exits.
        self._thread = _SaveThread(target=self._run, args=(work,), name=f"save {path}")
        self._thread.start()

    def __repr__(self) -> str:
        return f"<save of {self.path}, {'done' if self.done() else 'in progress'}>"

    def done(self) -> bool:
        """Whether the save has ended, successfully or not. Local."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is in its place. Local: any rank may call it, or none.

        Raises:
            CheckpointError: it could not be written; an earlier checkpoint is unchanged. On every
                rank that calls.
            TimeoutError: it is not written after `timeout` seconds.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.path}: is not written after {timeout} s")
        self._is_known = True
        if self._problem is not None:
            raise self._problem

    def new_problem(self) -> Exception | None:
        """The error of a save that has ended, if nobody has learned of it yet."""
        problem = None if self._is_known else self._problem
        self._is_known = True
        return problem

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._problem = error
            atexit.register(self._print_problem)  # runs after the interpreter has waited

    def _print_problem(self) -> None:
        if (problem := self.new_problem()) is not None:
            sys.stderr.write(f"dist_ema: the save of {self.path} is lost: {problem}\n")


class _SaveThread(threading.Thread):
    """The thread of an asynchronous save, found by its type."""


class BackgroundSaves:
    """The asynchronous saves of one `ShardedEMA`, and the memory for copies of its values."""

    def __init__(self) -> None:
        self._last: Handle | None = None
        # Reused: allocating new memory costs several times as much as copying to it.
        self._staging: torch.Tensor | None = None

    def start(self, path: Path, work: Callable[[], None]) -> Handle:
        """Start a save, after `wait`."""
        self._last = Handle(path, work)
        return self._last

    def wait(self) -> None:
        """Wait for saves in progress in this process; warn if one failed without notice. Local."""
        for thread in threading.enumerate():
            if isinstance(thread, _SaveThread):
                thread.join()
        if self._last is not None and (problem := self._last.new_problem()) is not None:
            warnings.warn(f"an earlier asynchronous save failed: {problem}", stacklevel=4)

    def staging(self, nbytes: int, pinned: bool) -> torch.Tensor:
        """At least so many bytes of host memory, the same as in the call before if possible."""
        staging = self._staging
        if staging is None or staging.numel() < nbytes or (pinned and not staging.is_pinned()):
            self._staging = None  # freed before the next allocation
            staging = self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return staging


class StatusFiles:
    """Status files of the ranks of one save; see [Note: status files]."""

    def __init__(
        self, directory: Path, written: Path, rank: int, size: int, timeout: float
    ) -> None:
        """Create this rank's file. Local; then every rank calls `meet`.

        Args:
            directory: of the status files.
            written: the directory that ranks write to, whose growth is progress.
            timeout: seconds without progress until a rank is given up.

        Raises:
            OSError: the files cannot be created.
        """
        self._directory, self._written = directory, written
        self._rank, self._size, self._timeout = rank, size, timeout
        self._drafts: dict[str, int] = {}  # file descriptors of what is not reported yet
        self._visible: set[int] = set()  # ranks whose locks this rank sees
        try:
            for name in [f"rank-{rank}"] + ["outcome"] * (rank == 0):
                self._drafts[name] = _reserve(directory / f".{name}")
        except BaseException:
            self.close()
            raise

    def meet(self) -> None:
        """Check that the files of the other ranks are visible, and whether their locks are. Local.

        Raises:
            CheckpointError: another rank's file does not appear here.
        """
        others = range(1, self._size) if self._rank == 0 else [0]
        wanted = {f".rank-{rank}" for rank in others}
        if not becomes_visible(lambda: wanted.issubset(os.listdir(self._directory))):
            absent = sorted(wanted.difference(os.listdir(self._directory)))
            raise CheckpointError(
                f"{self._directory}: this rank does not see {', '.join(absent[:5])}"
            )
        self._visible = {rank for rank in others if self._is_locked(rank) is True}

    def close(self) -> None:
        """Release the locks."""
        while self._drafts:
            os.close(self._drafts.popitem()[1])

    def report(self, content: Any) -> None:
        """Report to rank 0.

        Raises:
            CheckpointError: rank 0 does not wait any more.
        """
        try:
            self._send(f"rank-{self._rank}", content)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._written}: rank 0 gave the save up before this rank had written"
            ) from error

    def reports(self) -> list[Any]:
        """On rank 0: the reports of ranks 1, 2, ...; None for one that is unreadable.

        The report of a process that ended, or made no progress, states that as its problem.
        """
        reports: dict[int, Any] = {}
        progress, probe_at = _Progress(self._written, self._timeout), 0.0
        while missing := self._missing(reports):
            if time.monotonic() >= probe_at:
                ended = [rank for rank in missing if self._has_ended(rank)]
                for rank in set(self._missing(reports)).intersection(ended):
                    reports[rank] = _problem(_ENDED)
                probe_at = time.monotonic() + _PROBE_EVERY_S + len(missing) / 100
            elif progress.has_stalled(len(missing)):
                text = f"has made no progress for {self._timeout:g} s (timeout=)"
                reports |= {rank: _problem(text) for rank in self._missing(reports)}
        return [reports[rank] for rank in sorted(reports)]

    def conclude(self, problem: str | None) -> None:
        """On rank 0: report the outcome to every rank, and remove the status files."""
        try:
            self._send("outcome", {"problem": problem})
        except OSError:  # the others see that the directory is gone, and look for the checkpoint
            remove(self._directory)
        wait, now = _SHORTEST_WAIT_S, time.monotonic()
        deadline, probe_at = now + min(_ACKNOWLEDGE_S, self._timeout), now + _PROBE_EVERY_S
        ended: set[int] = set()
        # Ranks without a report are not waited for.
        while (waiting := self._ranks("rank-") - ended) and time.monotonic() < deadline:
            if time.monotonic() >= probe_at:
                ended |= {rank for rank in waiting if self._has_ended(rank)}
                probe_at = time.monotonic() + _PROBE_EVERY_S
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT_S)
        remove(self._directory)
        self.close()

    def outcome(self, is_in_place: Callable[[], bool]) -> str | None:
        """On other ranks: wait for the outcome; None for success.

        Args:
            is_in_place: whether the checkpoint is visible, called if rank 0 reports nothing.
        """
        limit_s = self._timeout + min(self._timeout, _EXTRA_FOR_RANK_0_S)
        progress, probe_at = _Progress(self._written, limit_s), 0.0
        gone_since: float | None = None
        failure: str | None = None
        while True:
            content = self._read("outcome")
            if content is not None:
                (self._directory / f"rank-{self._rank}").unlink(missing_ok=True)
                self.close()
                problem = content["problem"]
                return None if problem is None else str(problem)
            if failure is None and not self._directory.exists():
                gone_since = gone_since or time.monotonic()
                if is_in_place() or time.monotonic() - gone_since > _ACKNOWLEDGE_S:
                    failure = "rank 0 gave the save up"
            if failure is not None:
                own, left = f"rank-{self._rank}", f"left-{self._rank}"
                with suppress(OSError):  # if rank 0 continues after all, it gives up
                    os.rename(self._directory / own, self._directory / left)
                self.close()
                return None if is_in_place() else failure
            if time.monotonic() >= probe_at:
                if self._has_ended(0):  # the outcome is read once more
                    failure = "rank 0: the process ended before the checkpoint was complete"
                probe_at = time.monotonic() + _PROBE_EVERY_S
            elif progress.has_stalled(gone_since):
                failure = f"rank 0: has made no progress for {limit_s:g} s (timeout=)"

    def _missing(self, reports: dict[int, Any]) -> list[int]:
        """Read new reports; the ranks that have not reported."""
        for rank in self._ranks("rank-").difference(reports):
            reports[rank] = self._read(f"rank-{rank}")
        for rank in self._ranks("left-"):
            reports[rank] = _problem("gave the save up, having waited too long for rank 0")
        return [rank for rank in range(1, self._size) if rank not in reports]

    def _ranks(self, prefix: str) -> set[int]:
        with suppress(FileNotFoundError):
            names = os.listdir(self._directory)
            numbers = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
            return {int(number) for number in numbers if number.isdigit()}
        return set()

    def _has_ended(self, rank: int) -> bool:
        """Whether a process has ended; False if its lock is not visible here."""
        return rank in self._visible and self._is_locked(rank) is False

    def _is_locked(self, rank: int) -> bool | None:
        """Whether another process holds the lock of a rank's file; None if that is unknown."""
        for name in (f".rank-{rank}", f"rank-{rank}"):
            with suppress(OSError):
                fd = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    return True
                finally:
                    os.close(fd)
                return False
        return None

    def _send(self, name: str, content: dict[str, Any]) -> None:
        try:
            _overwrite(self._drafts[name], content)
        except OSError as error:  # a full disk: the reserved space is left
            problem = content["problem"] or f"{error.strerror} (writing its report)"
            _overwrite(self._drafts[name], _problem(problem[:_LONGEST_PROBLEM]))
        os.rename(self._directory / f".{name}", self._directory / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._directory / name).read_text())
        except (OSError, ValueError):
            return None


def _problem(text: str) -> dict[str, Any]:
    return {"problem": text, "report": None}


def _reserve(path: Path) -> int:
    """Create and lock a status file with reserved space. Returns its file descriptor.

    This process must not open the file again: closing it would release the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(fd, 0, _RESERVED_BYTES)
        except OSError:  # not supported by every file system
            os.pwrite(fd, bytes(_RESERVED_BYTES), 0)
        with suppress(OSError):  # no locks here: other ranks notice in `meet`
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _overwrite(fd: int, content: object) -> None:
    data, at = json.dumps(content).encode(), 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], at)
    os.ftruncate(fd, len(data))
    os.fsync(fd)


class _Progress:
    """Waits a little longer each time, and detects that nothing has changed for too long."""

    def __init__(self, written: Path, limit_s: float) -> None:
        self._written, self._limit_s = written, limit_s
        self._last: tuple[object, int] | None = None
        self._changed = self._looked = time.monotonic()
        self._wait = _SHORTEST_WAIT_S

    def has_stalled(self, state: object) -> bool:
        """Whether `state` and the written files have not changed for too long; else sleeps."""
        now = time.monotonic()
        if now - self._looked > self._limit_s / _NUM_LOOKS:
            self._looked = now
            current = (state, _bytes_below(self._written))
            if current != self._last:
                self._last, self._changed = current, now
            elif now - self._changed > self._limit_s:
                return True
        time.sleep(self._wait)
        self._wait = min(1.5 * self._wait, _LONGEST_WAIT_S)
        return False


def _bytes_below(directory: Path) -> int:
    """The sizes of all files below a directory plus their blocks, which grow during a sync."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                status = os.stat(os.path.join(parent, name))
                total += status.st_size + 512 * status.st_blocks
    return total
