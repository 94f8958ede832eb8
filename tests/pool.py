"""Persistent gloo workers that run a test body on every rank.

[Note: worker pool]
A pool is one process per rank, kept alive from test to test, because importing torch and building
the process group costs seconds and a body costs milliseconds. Workers come from a fork server that
has torch imported already, so that a fresh pool after a failure is cheap too. Each rank has its own
pipe: a worker that dies closes it, which is seen at once.

A body is named, not sent: the worker imports its module, so only the arguments are pickled.
`NO_GROUP` ranks means one worker without a process group.

torch keeps the process groups of sharded tensors, each with three threads, of which one wakes a
hundred times a second; a pool whose workers have many is replaced.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

NO_GROUP = 0
TIMEOUT_S = 120.0
GRACE_S = 1.0  # how long the other ranks may go on after the first one has failed
COLLECTIVE_TIMEOUT = timedelta(seconds=30)
LOG_TAIL_CHARS = 6000
MAX_THREADS = 64

# One thread a worker: there are more workers than cores. deepspeed picks its accelerator when it is
# imported, and must not look for a GPU; the Hugging Face libraries must not look for a network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "MASTER_ADDR": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
}
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "pytest",
    "accelerate",
    "deepspeed.runtime.zero.muon.original_muon",  # all of it, and with that the compiler
    "diffusers",
    "lightning",
    "matplotlib.figure",
    "peft",
    "transformers",
]


class RankFailure(AssertionError):
    """A body failed, died or hung on one or more ranks; the message has each rank's traceback."""

    crashed = False  # the first rank to fail was killed by a signal


class Task(NamedTuple):
    """A test body and its arguments."""

    module: str
    function: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """How the body ended on one rank. `at` is CLOCK_MONOTONIC, comparable between processes."""

    outcome: str  # "passed", "skipped" or "failed"
    text: str
    at: float
    num_threads: int = 0  # of the worker, afterwards
    signaled: bool = False  # the worker died of a signal


class WorkerPool:
    """One worker per rank; unusable after the first failure."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.crowded = False
        self._directory = tempfile.TemporaryDirectory(prefix="pool-")
        self._pipes: list[Connection] = []
        self._workers = []
        with fork_server() as context:
            for rank in range(max(num_ranks, 1)):
                here, there = context.Pipe()
                worker = context.Process(
                    target=_serve, args=(rank, num_ranks, self._directory.name, there), daemon=True
                )
                worker.start()
                there.close()
                self._pipes.append(here)
                self._workers.append(worker)

    @property
    def usable(self) -> bool:
        return bool(self._workers)

    def run(self, task: Task, timeout_s: float = TIMEOUT_S) -> str | None:
        """Run the body on every rank. Returns the reason if every rank skipped it, else None.

        Raises RankFailure, after which the pool is gone.
        """
        # Pickled once and before any rank has the task: an argument that cannot be pickled must not
        # leave some ranks with a task and others without.
        message = ForkingPickler.dumps(task)
        reports: dict[int, Report] = {}
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(message)
                except OSError:
                    reports[rank] = self._death(rank, time.monotonic())
            hung = self._collect(reports, timeout_s)
            outcomes = {report.outcome for report in reports.values()}
            self.crowded = any(report.num_threads > MAX_THREADS for report in reports.values())
            if not hung and outcomes == {"passed"}:
                return None
            if not hung and outcomes == {"skipped"}:
                return reports[0].text
            failure = RankFailure(self._describe(reports, hung))
            failed = [report for report in reports.values() if report.outcome == "failed"]
            failure.crashed = bool(failed) and min(failed, key=lambda report: report.at).signaled
        except BaseException:
            self.close()
            raise
        self.close()
        raise failure

    def close(self) -> None:
        """Kill the workers: they hold nothing that must be written, and gloo may hang at exit."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes = [], []
        self._directory.cleanup()

    def _collect(self, reports: dict[int, Report], timeout_s: float) -> list[int]:
        """Fill in the reports as they come; returns the ranks that are still running at the end."""
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in reports}
        deadline = time.monotonic() + timeout_s
        graced = False
        while ranks:
            if not graced and any(report.outcome == "failed" for report in reports.values()):
                deadline, graced = min(deadline, time.monotonic() + GRACE_S), True
            now = time.monotonic()
            if now >= deadline:
                break
            for pipe in wait(list(ranks), deadline - now):
                rank = ranks.pop(pipe)
                try:
                    reports[rank] = pipe.recv()
                except (EOFError, OSError):
                    # At the earliest: a rank that lost its peer may tell of that sooner.
                    reports[rank] = self._death(rank, now)
        hung = sorted(ranks.values())
        for rank in hung:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)  # makes it print its stack to its log
        if hung:
            time.sleep(0.2)
        return hung

    def _death(self, rank: int, at: float) -> Report:
        self._workers[rank].join(5)
        exitcode = self._workers[rank].exitcode
        text = f"the process died, exit code {exitcode}\n"
        return Report("failed", text, at, signaled=(exitcode or 0) < 0)

    def _describe(self, reports: dict[int, Report], hung: list[int]) -> str:
        """The ranks that failed in the order in which they did, then what the others were doing."""
        lines = []
        for rank, report in sorted(reports.items(), key=lambda item: item[1].at):
            if report.outcome == "failed":
                lines.append(f"--- rank {rank} of {self.num_ranks} ---\n{report.text}")
                lines.append(self._log(rank))
        for rank in hung:
            lines.append(f"--- rank {rank} of {self.num_ranks}: still running, killed ---\n")
            lines.append(self._log(rank))
        skipped = sorted(rank for rank, report in reports.items() if report.outcome == "skipped")
        if skipped:
            lines.append(f"--- ranks {skipped} skipped, which only all ranks together may do ---\n")
        return "\n" + "".join(lines)

    def _log(self, rank: int) -> str:
        text = (Path(self._directory.name) / f"rank{rank}.log").read_text(errors="replace")
        return f"[output of rank {rank}]\n{text[-LOG_TAIL_CHARS:]}\n" if text.strip() else ""


class PoolKeeper:
    """Hands out pools and keeps one alive at a time."""

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None
        self._may_repeat = True

    def run(self, task: Task, num_ranks: int, timeout_s: float = TIMEOUT_S) -> str | None:
        """As `WorkerPool.run`; the first crash (of a thread of gloo, say) is a warning, and the
        body runs again, with an empty temporary directory.
        """
        try:
            return self.get(num_ranks).run(task, timeout_s)
        except RankFailure as error:
            if not (error.crashed and self._may_repeat):
                raise
            self._may_repeat = False
            warnings.warn(f"run once more after a crash:\n{error}", stacklevel=2)
        if "tmp_path" in task.arguments:
            shutil.rmtree(task.arguments["tmp_path"])
            task.arguments["tmp_path"].mkdir()
        return self.get(num_ranks).run(task, timeout_s)

    def get(self, num_ranks: int) -> WorkerPool:
        pool = self._pool
        if pool is None or not pool.usable or pool.crowded or pool.num_ranks != num_ranks:
            self.close()
            self._pool = pool = WorkerPool(num_ranks)
        return pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


@contextlib.contextmanager
def fork_server() -> Iterator[ForkServerContext]:
    """To start processes from. It starts with the first one, and keeps that one's environment."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        yield context


def _serve(rank: int, num_ranks: int, directory: str, pipe: Connection) -> None:
    """The life of a worker: join the group, then one task after the other until the pipe closes."""
    redirect_output(f"{directory}/rank{rank}.log")
    leave_out_what_is_slow()
    log_crashes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of some shells
    torch.set_num_threads(1)
    if num_ranks != NO_GROUP:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{directory}/store", num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = pipe.recv()
            os.ftruncate(1, 0)
            pipe.send(_report(task))


def log_crashes() -> None:
    """Write the stacks of all threads to the log after a crash, or when asked to by a signal.

    Whatever took these signals since: Lightning "restores" handlers that Python does not know of.
    """
    faulthandler.disable()
    faulthandler.enable(2)
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.register(signal.SIGUSR1, 2)


def leave_out_what_is_slow() -> None:
    """For a process of the fork server: what takes long and has no part in what is tested."""
    # A process that is killed loses no page of a file, only a machine does.
    os.fsync = os.fdatasync = lambda fd: None
    # DeepSpeed collects garbage a dozen times for each engine, through all that is imported.
    gc.freeze()
    # It compiles shared memory collectives, which only inference calls: a minute in a new .venv.
    if importlib.util.find_spec("deepspeed") is not None:
        importlib.import_module("deepspeed.ops").__compatible_ops__ = defaultdict(bool)


def redirect_output(path: str) -> None:
    """Send both streams to one file. Append mode, so that it can be emptied before each task."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _report(task: Task) -> Report:
    outcome, text = _outcome(task)
    return Report(outcome, text, time.monotonic(), len(os.listdir("/proc/self/task")))


def _outcome(task: Task) -> tuple[str, str]:
    try:
        _reset_state()
        body = getattr(importlib.import_module(task.module), task.function)
        with warnings.catch_warnings():
            # A warning that no test asked for is a failure; other libraries may warn.
            warnings.filterwarnings("error", module=r"(dist_ema|tests)(\.|$)")
            # torch's own, where the garbage collector runs at a bad moment; seen in 2.8.
            warnings.filterwarnings("ignore", "Deallocating Tensor that still has live PyObject")
            body(**task.arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException:
        return "failed", traceback.format_exc()
    finally:  # pytest does so in its own process only
        for argument in task.arguments.values():
            if isinstance(argument, pytest.MonkeyPatch):
                argument.undo()
    return "passed", ""


_LINEAR = torch.nn.functional.linear


def _reset_state() -> None:
    """What a test must not inherit from the one before it."""
    log_crashes()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_grad_enabled(True)
    # ZeRO-3 puts a function of its own in this place, and leaves it there.
    torch.nn.functional.linear = _LINEAR
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
