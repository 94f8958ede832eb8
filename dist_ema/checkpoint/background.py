"""Saves that go on while training does: the thread, what ranks tell one another, and the end.

[Note: letters]
While a save is written in the background, the training that goes on may be inside any collective
on any process group, or have destroyed them all. So the threads of a save use none. All planning
is done before, on the calling thread; what is left to tell, that a rank has written its files and
what they hash to, goes through files in a directory beside the checkpoint's, which is on a file
system that all ranks share, or there would be no checkpoint. Rank 0 waits for a letter from each
rank, commits or gives up, and tells which; the others wait for that. A rank that nobody hears of
while nothing grows is given up.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_ema.checkpoint.manifest import CheckpointError

STALL_S = 1800.0  # without a letter, or a byte, until a rank is given up
STALL_AT_EXIT_S = 600.0  # the same when the interpreter waits to end
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
    """What the ranks of one save tell one another, through files alone."""

    def __init__(self, box: Path, written: Path, rank: int, size: int) -> None:
        """`box` is a directory for letters, `written` the one that grows while ranks write."""
        self._box, self._written = box, written
        self._rank, self._size = rank, size

    def report(self, content: Any) -> None:
        """Tell rank 0 how this rank fared.

        Raises:
            CheckpointError: there is nobody to tell any more.
        """
        try:
            self._send(f"rank-{self._rank}", content)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self._written}: rank 0 gave the save up before this rank had written"
            ) from error
        except OSError:  # a full disk may still take a name
            (self._box / f"rank-{self._rank}").touch()

    def reports(self) -> list[Any]:
        """On rank 0: what each other rank reported, by rank from 1 on; None for one that could not.

        Raises:
            CheckpointError: a rank is not heard of.
        """
        told: dict[int, Any] = {}
        watch = _Watch(self._written)
        while len(told) < self._size - 1:
            arrived = set(os.listdir(self._box))
            for rank in range(1, self._size):
                if rank not in told and f"rank-{rank}" in arrived:
                    told[rank] = self._read(f"rank-{rank}")
            missing = [rank for rank in range(1, self._size) if rank not in told]
            if missing and watch.stalled(len(missing)):
                raise CheckpointError(
                    f"{self._written}: ranks {missing} were not heard of for {watch.limit_s:.0f} s"
                )
        return [told[rank] for rank in sorted(told)]

    def conclude(self, problem: str | None) -> None:
        """On rank 0: tell every rank how the save ended, and clear the letters away."""
        try:
            self._send("outcome", {"problem": problem})
        except OSError:  # the others see that the letters are gone, and look for the checkpoint
            shutil.rmtree(self._box, ignore_errors=True)
        deadline = time.monotonic() + _ACKNOWLEDGE_S
        wait = _SHORTEST_WAIT_S
        while any(self._box.glob("rank-*")) and time.monotonic() < deadline:
            time.sleep(wait)
            wait = min(1.5 * wait, _LONGEST_WAIT_S)
        shutil.rmtree(self._box, ignore_errors=True)

    def outcome(self, is_in_place: Callable[[], bool]) -> str | None:
        """On the others: wait for how the save ended; None if well.

        Args:
            is_in_place: whether the checkpoint can be seen, asked where the letters were cleared
                away before this rank looked.
        """
        watch = _Watch(self._written, patience=2)  # rank 0 tells when it has given others up
        gone_since: float | None = None
        while True:
            content = self._read("outcome")
            if content is not None:
                (self._box / f"rank-{self._rank}").unlink(missing_ok=True)
                problem = content["problem"]
                return None if problem is None else str(problem)
            if not self._box.exists():
                if is_in_place():
                    return None
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > _ACKNOWLEDGE_S:
                    return "rank 0 gave the save up"
            if watch.stalled(gone_since):
                return f"rank 0 was not heard of for {watch.limit_s:.0f} s; the save may be lost"

    def _send(self, name: str, content: Any) -> None:
        new = self._box / f".{name}"
        new.write_text(json.dumps(content))
        os.rename(new, self._box / name)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self._box / name).read_text())
        except (OSError, ValueError):
            return None


class _Watch:
    """Waits a little longer each time, and sees when nothing has changed for too long."""

    def __init__(self, written: Path, *, patience: int = 1) -> None:
        self.limit_s = 0.0
        self._written, self._patience = written, patience
        self._seen: tuple[object, int] | None = None
        self._changed = self._looked = time.monotonic()
        self._wait = _SHORTEST_WAIT_S

    def stalled(self, state: object) -> bool:
        """Whether neither `state` nor what is written has changed; sleeps if it is not yet so."""
        # Once the main thread is gone, the interpreter waits for this one.
        limit_s = STALL_S if threading.main_thread().is_alive() else STALL_AT_EXIT_S
        self.limit_s = limit_s * self._patience
        now = time.monotonic()
        if now - self._looked > self.limit_s / _LOOKS:
            self._looked = now
            seen = (state, _bytes_below(self._written))
            if seen != self._seen:
                self._seen, self._changed = seen, now
            elif now - self._changed > self.limit_s:
                return True
        time.sleep(self._wait)
        self._wait = min(1.5 * self._wait, _LONGEST_WAIT_S)
        return False


def _bytes_below(directory: Path) -> int:
    """The bytes in all files below a directory, 0 if it is gone."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total
