"""Times saves and loads of two ranks beside `cp` and torch's own storage.

    python -m tests.checkpoint_speed --directory /a/disk [--gigabytes 1] [--rounds 5]

Each line has the median and the best time over the rounds, all ranks together, files synced, and
the processor time of rank 0 in the best round. What is read is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from dist_ema.checkpoint.dcp import state_dict
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, Fragment, FragmentMeta, TensorMeta
from tests.cuts import state_of

SIDE = 2048  # of each tensor: 16 MB
SIZE = 2


class Bench:
    def __init__(self, rank: int, directory: Path, gigabytes: float, rounds: int) -> None:
        self.rank, self.directory, self.rounds = rank, directory, rounds
        self.ranks = Group()
        count = round(gigabytes * 2**30 / (4 * SIDE * SIDE))
        self.nbytes = count * 4 * SIDE * SIDE
        shape = (SIDE, SIDE)
        self.tensors = [
            TensorMeta(f"layers.{i}.weight", (), shape, torch.float32) for i in range(count)
        ]
        half = SIDE // SIZE
        rows, columns = Box((rank * half, 0), (half, SIDE)), Box((0, rank * half), (SIDE, half))
        self.rows, self.other_rows = self.parts(rows), self.parts(rows)
        self.columns = self.parts(columns)

    def parts(self, box: Box) -> list[Fragment]:
        run = torch.randn(len(self.tensors) * box.numel).split(box.numel)
        return [
            Fragment(FragmentMeta(t.fqn, t.shape, box), values)
            for t, values in zip(self.tensors, run, strict=True)
        ]

    def clear(self, name: str) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(self.directory / name, ignore_errors=True)
            os.sync()
        dist.barrier()

    def time(self, what: str, act: Callable[[], object], clear: str = "") -> float:
        taken = []
        for _ in range(self.rounds):
            if clear:
                self.clear(clear)
            dist.barrier()
            start, processor = time.perf_counter(), time.process_time()
            act()
            processor = time.process_time() - processor
            dist.barrier()
            taken.append((time.perf_counter() - start, processor))
        best, processor = min(taken)
        median = statistics.median(seconds for seconds, _ in taken)
        if self.rank == 0:
            print(
                f"{what:42s} median {median:6.2f} s   best {best:6.2f} s "
                f"{self.nbytes / best / 1e9:6.2f} GB/s   processor {processor:5.2f} s",
                flush=True,
            )
        return median

    def run(self) -> None:
        own, theirs, copy = (self.directory / name for name in ("own", "torch", "copy"))
        state, ranks = state_of(), self.ranks

        def write(asynchronous: bool = False) -> object:
            rows = {"ema": self.rows}
            return save(own, rows, self.tensors, state, ranks, asynchronous=asynchronous)

        def copy_files() -> None:
            copy.mkdir(exist_ok=True)
            mine = f"shard-0000{self.rank + 1}*"
            command = f"cp {own}/{mine} {copy} && sync {copy}/{mine}"
            subprocess.run(command, shell=True, check=True)

        def read(parts: list[Fragment]) -> None:
            load(own, {"ema": parts}, self.tensors, ranks)

        def boxed(fragments: list[Fragment]) -> dict[str, Any]:
            return state_dict({"ema": fragments}, self.tensors, {})["averages"]["ema"]

        def torch_write() -> None:
            dcp.save(boxed(self.rows), storage_writer=dcp.FileSystemWriter(theirs))

        def torch_read(parts: list[Fragment]) -> None:
            dcp.load(boxed(parts), storage_reader=dcp.FileSystemReader(theirs))

        once = self.time("save", write, clear="own")
        self.time("save over the last one", write)
        self.time("torch FileSystemWriter", torch_write, clear="torch")
        self.time("cp and sync, a process for each rank", copy_files, clear="copy")
        self.time("load, cut as saved", lambda: read(self.other_rows))
        self.time("torch FileSystemReader, cut as saved", lambda: torch_read(self.other_rows))
        self.time("load, rows to columns", lambda: read(self.columns))
        self.time("torch FileSystemReader, rows to columns", lambda: torch_read(self.columns))
        blocked, ended = [], []
        for _ in range(self.rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            handle = write(asynchronous=True)
            blocked.append(time.perf_counter() - start)
            handle.result()
            ended.append(time.perf_counter() - start)
        if self.rank == 0:
            middle = statistics.median(blocked[1:])
            print(
                f"save in the background blocks {middle:.2f} s ({middle / once:.0%} of a save; "
                f"{blocked[0]:.2f} s the first time), ends after {statistics.median(ended):.2f} s"
            )


def main(rank: int, directory: str, gigabytes: float, rounds: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=SIZE, init_method=f"file://{directory}/store"
    )
    Bench(rank, Path(directory), gigabytes, rounds).run()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("/tmp"))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        mp.spawn(main, (directory, options.gigabytes, options.rounds), nprocs=SIZE)
