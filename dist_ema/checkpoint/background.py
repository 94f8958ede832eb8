"""Asynchronous saves: the thread that writes, and the status files through which ranks agree.

[Note: status files]
While a save is written in the background, training may be inside a collective of any process group,
or have destroyed all groups. So the threads of a save use none. All planning happens before, on the
calling thread. What remains is whether each rank succeeded, and the checksums of its files. They go
through files in a directory next to the checkpoint's, on the file system that all ranks share.

Before the thread starts, each rank creates its status file, with space reserved for an error
message, so that a full disk or a missing permission cannot prevent a report. A rank reports by
writing the file and renaming it from `.dist_ema.rank-3` to `dist_ema.rank-3`. Rank 0 waits for
every rank, commits or gives up, and reports how that ended in its own file; the others wait for it,
and remove theirs when they have read it.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ema.checkpoint.directory import becomes_visible
from dist_ema.core.errors import CheckpointError

if TYPE_CHECKING:  # the command line reads checkpoints without it
    import torch

TIMEOUT_S = 300.0  # without progress, after which a rank is given up
_EXTRA_FOR_RANK_0_S = 30.0  # for rank 0 to tell the others that it gave up a rank
_PROBE_EVERY_S = 1.0  # interval of checks that processes live; longer for many ranks
_RESERVED_BYTES = 8192  # of each status file
_LONGEST_PROBLEM = _RESERVED_BYTES // 12 - 20  # characters; JSON writes one as up to 12 bytes
_ACKNOWLEDGE_S = 60.0  # without another rank that has read the outcome
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.5
_ALIGNMENT = 16  # of copies
_NUM_LOOKS = 30  # at the growing files, per timeout: there may be thousands
_NAME = "dist_ema.rank-"  # of status files, before the rank; hidden until the rank reports
_ENDED = "ended before the save was complete: the process is gone, gave up, or cannot report"


class Handle(threading.Thread):
    """An asynchronous save."""

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        # Not a daemon: the interpreter waits for the thread before it exits.
        super().__init__(target=work, name=f"save {path}", daemon=False)
        self.path = path
        self._problem: Exception | None = None
        self._is_known = False  # whether the caller has learned how the save ended
        self.start()
        if not threading.main_thread().is_alive():  # the interpreter no longer waits
            self.join()
            self._print_problem()

    def __repr__(self) -> str:
        return f"<save of {self.path}, {'done' if self.done() else 'in progress'}>"

    def done(self) -> bool:
        """Whether the save has ended, successfully or not. Local."""
        return not self.is_alive()

    def result(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is in its place. Local: any rank may call it, or none.

        Raises:
            CheckpointError: it could not be written; an earlier checkpoint is unchanged. On every
                rank that calls.
            TimeoutError: it is not written after `timeout` seconds.
        """
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"{self.path}: is not written after {timeout} s")
        self._is_known = True
        if self._problem is not None:
            raise self._problem

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            self._problem = error
            atexit.register(self._print_problem)  # runs after the interpreter has waited

    def new_problem(self) -> Exception | None:
        """The error of a save that has ended, if nobody has learned of it yet."""
        problem = None if self._is_known else self._problem
        self._is_known = True
        return problem

    def _print_problem(self) -> None:
        if (problem := self.new_problem()) is not None:
            sys.stderr.write(f"dist_ema: the save of {self.path} is lost: {problem}\n")


class BackgroundSaves:
    """The asynchronous saves of one `ShardedEMA`, and the memory for copies of its values."""

    def __init__(self) -> None:
        self.last: Handle | None = None
        # Reused: allocating new memory costs several times as much as copying to it.
        self._staging: torch.Tensor | None = None

    def wait(self) -> None:
        """Wait for saves in progress in this process; warn if one failed without notice. Local."""
        for thread in threading.enumerate():
            if isinstance(thread, Handle):
                thread.join()
        if self.last is not None and (problem := self.last.new_problem()) is not None:
            warnings.warn(f"an earlier asynchronous save failed: {problem}", stacklevel=4)

    def staging(self, sizes: Sequence[int], pinned: bool) -> list[torch.Tensor]:
        """Host memory of these numbers of bytes, the same as in the call before if it fits."""
        import torch

        aligned = [-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in sizes]
        staging = self._staging
        if staging is None or staging.numel() < sum(aligned) or pinned > staging.is_pinned():
            self._staging = None  # freed before the next allocation
            kind: Any = {"dtype": torch.uint8, "device": "cpu", "pin_memory": pinned}
            staging = torch.empty(sum(aligned), **kind)
            self._staging = staging
        rooms = staging[: sum(aligned)].split(aligned)
        return [room[:nbytes] for room, nbytes in zip(rooms, sizes, strict=True)]


class StatusFiles:
    """Status files of the ranks of one save; see [Note: status files]."""

    def __init__(
        self, written: Path, directory: Path, rank: int, size: int, timeout: float
    ) -> None:
        """Create this rank's file. Local; then every rank calls `meet`.

        Args:
            written: the directory that ranks write to, whose growth is progress.
            directory: of the status files.
        """
        self._written, self._directory, self._timeout = written, directory, timeout
        self._rank, self._others = rank, set(range(1, size)) if rank == 0 else {0}
        self._visible: set[int] = set()  # ranks whose locks this rank sees
        self._fd: int | None = _reserve(directory / f".{_NAME}{rank}")

    def meet(self) -> None:
        """Raise unless the files of other ranks are visible; find out whether locks are. Local."""
        if not becomes_visible(lambda: self._others <= self._ranks(f".{_NAME}")):
            absent = sorted(self._others - self._ranks(f".{_NAME}"))
            raise CheckpointError(
                f"{self._directory}: this rank does not see the files of ranks {absent[:5]}"
            )
        self._visible = {rank for rank in self._others if not self._has_ended(rank)}

    def close(self) -> None:
        """Release the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def report(self, content: Mapping[str, Any]) -> None:
        """Report to rank 0; raise CheckpointError if it does not wait any more."""
        try:
            self._send(content)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._written}: rank 0 gave the save up before this rank had written"
            ) from error

    def reports(self) -> list[Any]:
        """On rank 0: the reports of ranks 1, 2, ...; None for one that is unreadable.

        The report of a rank that ended, gave up or made no progress states that as its problem.
        """
        reports: dict[int, Any] = {}

        def missing() -> set[int]:
            for rank in self._ranks(_NAME) - reports.keys():
                reports[rank] = self._read(rank)
            return self._others - reports.keys()

        given_up = self._wait(missing, self._timeout)
        given_up |= dict.fromkeys(reports.keys() - self._ranks(_NAME), _ENDED)
        for rank, text in given_up.items():
            reports[rank] = {"problem": text, "report": None}
        return [reports[rank] for rank in sorted(reports)]

    def conclude(self, problem: str | None) -> None:
        """On rank 0: report how the save ended, and wait until the ranks that reported know."""
        with suppress(OSError):  # they see that the directory is removed, and look for themselves
            self._send({"problem": problem})
            self._wait(lambda: self._ranks(_NAME) - {0}, min(_ACKNOWLEDGE_S, self._timeout))

    def outcome(self, is_in_place: Callable[[], bool]) -> str | None:
        """On other ranks: wait until rank 0 reports, or look for the checkpoint. None: success."""

        def missing() -> set[int]:
            is_awaited = self._read(0) is None and self._directory.exists()
            return {0} if is_awaited else set()

        extra_s = min(self._timeout, _EXTRA_FOR_RANK_0_S)
        given_up = self._wait(missing, self._timeout + extra_s)
        content = self._read(0)
        # Rank 0 waits for this. If it continues after all, it sees that this rank gave up.
        with suppress(OSError):
            (self._directory / f"{_NAME}{self._rank}").unlink()
        if content is not None:
            return None if content["problem"] is None else str(content["problem"])
        if not given_up:
            return None if becomes_visible(is_in_place) else "rank 0 gave the save up"
        return None if is_in_place() else f"rank 0: {given_up[0]}"

    def _wait(self, missing: Callable[[], set[int]], limit_s: float) -> dict[int, str]:
        """Wait for missing ranks, until no rank arrives and no file grows for `limit_s`.

        Returns:
            For each rank that is still missing, why it is given up.
        """
        given_up: dict[int, str] = {}
        state: tuple[int, int] | None = None
        changed = looked = time.monotonic()
        probe_at, wait = 0.0, _SHORTEST_WAIT_S
        while waiting := missing() - given_up.keys():
            now = time.monotonic()
            if now >= probe_at:
                ended = {rank for rank in waiting & self._visible if self._has_ended(rank)}
                given_up |= dict.fromkeys(ended & missing(), _ENDED) if ended else {}
                probe_at = time.monotonic() + _PROBE_EVERY_S + len(waiting) / 100
            elif now - looked > limit_s / _NUM_LOOKS:
                looked, before = now, state
                state = len(waiting), _bytes_below(self._written)
                if state != before:
                    changed = now
                elif now - changed > limit_s:
                    text = f"has made no progress for {limit_s:g} s (timeout=)"
                    given_up |= dict.fromkeys(missing() - given_up.keys(), text)
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT_S)
        return given_up

    def _ranks(self, prefix: str) -> set[int]:
        """The ranks that have a file of this name."""
        with suppress(FileNotFoundError):
            names = os.listdir(self._directory)
            return {int(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
        return set()

    def _has_ended(self, rank: int) -> bool:
        """Whether no process holds the lock of a rank's file, or there is no such file."""
        for name in (f".{_NAME}{rank}", f"{_NAME}{rank}"):
            try:
                with open(self._directory / name, "rb") as file:
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
            except FileNotFoundError:
                continue
            except OSError:  # it is locked, or the file system has no locks
                return False
        return True

    def _send(self, content: Mapping[str, Any]) -> None:
        """Write this rank's file and let the others see it."""
        assert self._fd is not None
        try:
            _overwrite(self._fd, content)
        except OSError as error:  # a full disk: the reserved space is left
            problem = content["problem"] or f"{error.strerror} (writing its report)"
            _overwrite(self._fd, {"problem": problem[:_LONGEST_PROBLEM], "report": None})
        name = f"{_NAME}{self._rank}"
        os.rename(self._directory / f".{name}", self._directory / name)

    def _read(self, rank: int) -> Any:
        try:
            return json.loads((self._directory / f"{_NAME}{rank}").read_text())
        except (OSError, ValueError):
            return None


def _reserve(path: Path) -> int:
    """Create and lock a status file with reserved space. Returns its file descriptor.

    This process must not open the file again: closing it would release the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
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


def _bytes_below(directory: Path) -> int:
    """The sizes of all files below a directory plus their blocks, which grow during a sync."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                status = os.stat(os.path.join(parent, name))
                total += status.st_size + 512 * status.st_blocks
    return total
