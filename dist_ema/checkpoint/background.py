"""Saves that go on while training does: the thread, what ranks tell one another, and the end.

[Note: letters]
While a save is written in the background, the training that goes on may be inside any collective
on any process group, or have destroyed them all. So the threads of a save use none. All planning
is done before, on the calling thread. What remains to be told is how each rank fared and what its
files hash to. It goes through files in a directory beside the checkpoint's, which is on a file
system that all ranks share, or there would be no checkpoint.

While ranks still meet, each rank creates the files that it will tell through, with room for an
error message, so that a full disk or a missing permission does not keep a rank from telling. It
tells by writing to such a file and renaming it, from `.rank-3` to `rank-3`. Rank 0 waits for each
rank, commits or gives up, and tells which in `outcome`; the others wait for that.

Each rank holds a lock on its file while it takes part. The kernel drops the lock when the process
ends, and that is how the others notice. It is a POSIX record lock: forked children do not inherit
it, and NFS has it. Ranks try the locks out while they meet; a rank whose lock another rank does not
see, because their hosts do not share locks, is given up only when nothing grows for `timeout`.
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

from dist_ema.checkpoint.directory import becomes_visible, remove
from dist_ema.checkpoint.manifest import CheckpointError

TIMEOUT_S = 300.0  # without progress, until a rank is given up
_LONGER_FOR_RANK_0_S = 30.0  # which tells the others when it has given a rank up
_PROBE_EVERY_S = 1.0  # whether processes live; longer for many ranks
_RESERVED_BYTES = 8192  # of each file for letters
_ENDED = "ended before it had written its part: the process is gone, or could not report"
_LONGEST_PROBLEM = _RESERVED_BYTES // 12 - 20  # characters, which JSON may write as 12 bytes each
_ACKNOWLEDGE_S = 60.0  # for all ranks to read how the save ended
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.5
_LOOKS = 30  # at the files that grow, before a stall is one: there may be thousands


class Handle:
    """A save in the background."""

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        self.path = path
        self._problem: Exception | None = None
        self._told = False  # whether somebody asked how it ended
        # No daemon: the interpreter waits for it before it ends.
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"save {path}")

    def __repr__(self) -> str:
        return f"<save of {self.path}, {'done' if self.done() else 'under way'}>"

    def done(self) -> bool:
        """Whether the save has ended, well or not. Local."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is in its place. Local: any rank may call it, or none.

        Raises:
            CheckpointError: it could not be written; the one that was there before is there still.
                On every rank that asks.
            TimeoutError: it is not written yet.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.path}: is not written after {timeout} s")
        self._told = True
        if self._problem is not None:
            raise self._problem

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._problem = error


_last: Handle | None = None


def start(path: Path, work: Callable[[], None]) -> Handle:
    """Begin a save in the background; `settle` has been called."""
    global _last
    _last = handle = Handle(path, work)
    handle._thread.start()
    return handle


def settle() -> None:
    """Wait for the save under way in this process, and warn if it failed and nobody asked. Local.

    There is never more than one: another would read and write beside it.
    """
    handle = _last
    if handle is None:
        return
    handle._thread.join()
    problem = _unheard(handle)
    if problem is not None:
        warnings.warn(f"an earlier save in the background failed: {problem}", stacklevel=4)


def _unheard(handle: Handle) -> Exception | None:
    if handle._told or handle._problem is None:
        return None
    handle._told = True
    return handle._problem


@atexit.register
def _say_what_was_lost() -> None:
    """Runs after the interpreter has waited for the thread."""
    problem = None if _last is None else _unheard(_last)
    if problem is not None and _last is not None:
        sys.stderr.write(f"dist_ema: the save of {_last.path} is lost: {problem}\n")


class Letters:
    """What the ranks of one save tell one another, through files alone; see [Note: letters]."""

    def __init__(self, box: Path, written: Path, rank: int, size: int, timeout: float) -> None:
        """Create what this rank will tell through. Local; then every rank calls `meet`.

        Args:
            box: a directory for letters.
            written: the one that grows while ranks write.
            timeout: seconds without progress until a rank is given up.

        Raises:
            OSError: the files cannot be created.
        """
        self._box, self._written = box, written
        self._rank, self._size, self._timeout = rank, size, timeout
        self._drafts: dict[str, int] = {}  # file descriptors of what is not told yet
        self._others: set[int] = set()  # ranks whose locks this rank sees
        try:
            for name in [f"rank-{rank}"] + ["outcome"] * (rank == 0):
                self._drafts[name] = _reserve(box / f".{name}")
        except BaseException:
            self.close()
            raise

    def meet(self) -> None:
        """Find the files of the ranks to hear of, and whether their locks are seen. Local.

        Raises:
            CheckpointError: another rank's file does not appear here.
        """
        others = range(1, self._size) if self._rank == 0 else [0]
        wanted = {f".rank-{rank}" for rank in others}
        if not becomes_visible(lambda: wanted.issubset(os.listdir(self._box))):
            absent = sorted(wanted.difference(os.listdir(self._box)))
            raise CheckpointError(f"{self._box}: this rank does not see {', '.join(absent[:5])}")
        self._others = {rank for rank in others if self._is_locked(rank) is True}

    def close(self) -> None:
        """Take part no more: release the lock."""
        while self._drafts:
            os.close(self._drafts.popitem()[1])

    def report(self, content: Any) -> None:
        """Tell rank 0 how this rank fared.

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
        """On rank 0: what each other rank reported, by rank from 1 on; None if it is unreadable.

        A process that ended, or is not heard of, is reported as a problem of its rank.
        """
        told: dict[int, Any] = {}
        watch, probe_at = _Watch(self._written, self._timeout), 0.0
        while missing := self._missing(told):
            if time.monotonic() >= probe_at:
                ended = [rank for rank in missing if self._has_ended(rank)]
                for rank in set(self._missing(told)).intersection(ended):
                    told[rank] = _problem(_ENDED)
                probe_at = time.monotonic() + _PROBE_EVERY_S + len(missing) / 100
            elif watch.stalled(len(missing)):
                text = f"has made no progress for {self._timeout:g} s (timeout=)"
                told |= {rank: _problem(text) for rank in self._missing(told)}
        return [told[rank] for rank in sorted(told)]

    def conclude(self, problem: str | None) -> None:
        """On rank 0: tell every rank how the save ended, and clear the letters away."""
        try:
            self._send("outcome", {"problem": problem})
        except OSError:  # the others see that the letters are gone, and look for the checkpoint
            remove(self._box)
        wait, now = _SHORTEST_WAIT_S, time.monotonic()
        deadline, probe_at = now + min(_ACKNOWLEDGE_S, self._timeout), now + _PROBE_EVERY_S
        ended: set[int] = set()
        # A rank that made no progress has not reported, and is not waited for.
        while (waiting := self._numbers("rank-") - ended) and time.monotonic() < deadline:
            if time.monotonic() >= probe_at:
                ended |= {rank for rank in waiting if self._has_ended(rank)}
                probe_at = time.monotonic() + _PROBE_EVERY_S
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT_S)
        remove(self._box)
        self.close()

    def outcome(self, is_in_place: Callable[[], bool]) -> str | None:
        """On the others: wait for how the save ended; None if well.

        Args:
            is_in_place: whether the checkpoint can be seen, asked where rank 0 tells nothing.
        """
        limit_s = self._timeout + min(self._timeout, _LONGER_FOR_RANK_0_S)
        watch, probe_at = _Watch(self._written, limit_s), 0.0
        gone_since: float | None = None
        lost: str | None = None
        while True:
            content = self._read("outcome")
            if content is not None:
                (self._box / f"rank-{self._rank}").unlink(missing_ok=True)
                self.close()
                problem = content["problem"]
                return None if problem is None else str(problem)
            if lost is None and not self._box.exists():
                gone_since = gone_since or time.monotonic()
                if is_in_place() or time.monotonic() - gone_since > _ACKNOWLEDGE_S:
                    lost = "rank 0 gave the save up"
            if lost is not None:
                with suppress(OSError):  # should rank 0 go on after all, it gives up
                    os.rename(self._box / f"rank-{self._rank}", self._box / f"left-{self._rank}")
                self.close()
                return None if is_in_place() else lost
            if time.monotonic() >= probe_at:
                if self._has_ended(0):  # the outcome is read once more
                    lost = "rank 0: the process ended before the checkpoint was complete"
                probe_at = time.monotonic() + _PROBE_EVERY_S
            elif watch.stalled(gone_since):
                lost = f"rank 0: has made no progress for {limit_s:g} s (timeout=)"

    def _missing(self, told: dict[int, Any]) -> list[int]:
        """Take in what has arrived; the ranks that have not reported."""
        for rank in self._numbers("rank-").difference(told):
            told[rank] = self._read(f"rank-{rank}")
        for rank in self._numbers("left-"):
            told[rank] = _problem("gave the save up, having waited too long for rank 0")
        return [rank for rank in range(1, self._size) if rank not in told]

    def _numbers(self, start: str) -> set[int]:
        with suppress(FileNotFoundError):
            rests = [n.removeprefix(start) for n in os.listdir(self._box) if n.startswith(start)]
            return {int(rest) for rest in rests if rest.isdigit()}
        return set()

    def _has_ended(self, rank: int) -> bool:
        """Whether a process is gone; False if its lock cannot tell."""
        return rank in self._others and self._is_locked(rank) is False

    def _is_locked(self, rank: int) -> bool | None:
        """Whether another process holds the lock of a rank's file; None if that cannot be seen."""
        for name in (f".rank-{rank}", f"rank-{rank}"):
            with suppress(OSError):
                fd = os.open(self._box / name, os.O_RDONLY | os.O_CLOEXEC)
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
        except OSError as error:  # a full disk: what was reserved is there
            problem = content["problem"] or f"{error.strerror} (writing its report)"
            _overwrite(self._drafts[name], _problem(problem[:_LONGEST_PROBLEM]))
        os.rename(self._box / f".{name}", self._box / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._box / name).read_text())
        except (OSError, ValueError):
            return None


def _problem(text: str) -> dict[str, Any]:
    return {"problem": text, "report": None}


def _reserve(path: Path) -> int:
    """Create a file with room for a letter, and lock it. Returns its file descriptor.

    The file must not be opened again in this process: closing it would drop the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(fd, 0, _RESERVED_BYTES)
        except OSError:  # not on every file system
            os.pwrite(fd, bytes(_RESERVED_BYTES), 0)
        with suppress(OSError):  # no locks here: others do not see it, and know
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


class _Watch:
    """Waits a little longer each time, and sees when nothing has changed for too long."""

    def __init__(self, written: Path, limit_s: float) -> None:
        self._written, self._limit_s = written, limit_s
        self._seen: tuple[object, int] | None = None
        self._changed = self._looked = time.monotonic()
        self._wait = _SHORTEST_WAIT_S

    def stalled(self, state: object) -> bool:
        """Whether neither `state` nor what is written has changed; sleeps if it is not yet so."""
        now = time.monotonic()
        if now - self._looked > self._limit_s / _LOOKS:
            self._looked = now
            seen = (state, _bytes_below(self._written))
            if seen != self._seen:
                self._seen, self._changed = seen, now
            elif now - self._changed > self._limit_s:
                return True
        time.sleep(self._wait)
        self._wait = min(1.5 * self._wait, _LONGEST_WAIT_S)
        return False


def _bytes_below(directory: Path) -> int:
    """The bytes in all files below a directory and those on disk, 0 if it is gone."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.stat(os.path.join(place, name))
                total += found.st_size + 512 * found.st_blocks  # which grow while others sync
            except OSError:
                continue
    return total
