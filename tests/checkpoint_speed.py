"""Times saves and loads against plain writes and reads of the same bytes.

    python -m tests.checkpoint_speed --directory /a/disk [--ranks 2] [--engine fsdp2]

In each round, every case runs once, so that a disk that changes its speed does so for all of them.
A plain write is a `write` of large blocks and an `fsync`, by one process or by each rank; a plain
read fills memory that is in use already. "cold" reads come from the disk, others from the page
cache. Each line has the median and the best time over the rounds, all ranks together, and the ratio
to the better of the plain cases.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA

SIDE = 2048  # of each weight: 16 MB
BLOCK = 16 << 20


class Bench:
    def __init__(self, directory: Path, engine: str, gigabytes: float) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.directory = directory
        count = round(gigabytes * 1e9 / (4 * SIDE * SIDE))
        net: nn.Module = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(count)])
        if engine == "ddp":
            net = DistributedDataParallel(net)
        elif engine == "fsdp2":
            fully_shard(net)
        self.ema = ShardedEMA(net)
        self.nbytes = count * 4 * SIDE * SIDE
        self.data = torch.ones(self.nbytes, dtype=torch.uint8).numpy().data
        self.own = self.data[: self.nbytes // self.size]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def write(self, name: str, data: memoryview) -> None:
        (self.directory / name).mkdir(exist_ok=True)
        with open(self.directory / name / str(self.rank), "wb", buffering=0) as file:
            for start in range(0, len(data), BLOCK):
                file.write(data[start : start + BLOCK])
            os.fsync(file.fileno())

    def read(self, data: memoryview) -> None:
        with open(self.directory / "each" / str(self.rank), "rb", buffering=0) as file:
            for start in range(0, len(data), BLOCK):
                file.readinto(data[start : start + BLOCK])

    def time(self, action: Callable[[], object], clear: str = "", *, cold: bool = False) -> float:
        self.barrier()
        if clear and self.rank == 0:
            shutil.rmtree(self.directory / clear, ignore_errors=True)
            os.sync()
        if cold and self.rank == 0:
            for path in self.directory.glob("*/*"):
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.barrier()
        start = time.perf_counter()
        action()
        self.barrier()
        return time.perf_counter() - start

    def rounds(self, count: int) -> None:
        ema, saved = self.ema, self.directory / "saved"
        taken: dict[str, list[float]] = {}

        def background() -> None:
            handle = ema.save(saved, asynchronous=True)
            taken.setdefault("save, background, blocks", []).append(time.perf_counter() - start)
            assert handle is not None
            handle.result()

        one = self.data if self.rank == 0 else self.data[:0]
        for number in range(count + 1):
            round_: dict[str, float] = {}
            round_["plain write, one process"] = self.time(lambda: self.write("one", one), "one")
            if self.size > 1:
                round_["plain write, each rank"] = self.time(
                    lambda: self.write("each", self.own), "each"
                )
            else:
                self.time(lambda: self.write("each", self.own), "each")
            round_["save"] = self.time(lambda: ema.save(saved), "saved")
            round_["plain read"] = self.time(lambda: self.read(self.own))
            round_["load"] = self.time(lambda: ema.load(saved))
            round_["plain read, cold"] = self.time(lambda: self.read(self.own), cold=True)
            round_["load, cold"] = self.time(lambda: ema.load(saved), cold=True)
            start = time.perf_counter()
            round_["save, background"] = self.time(background)
            if number == 0:
                taken.clear()
                continue
            for name, seconds in round_.items():
                taken.setdefault(name, []).append(seconds)
        if self.rank == 0:
            report(taken, self.nbytes)


def report(taken: dict[str, list[float]], nbytes: int) -> None:
    limits = {"save": "plain write, ", "load": "plain read", "load, cold": "plain read, cold"}
    for name, seconds in taken.items():
        line = f"{name:28s} median {statistics.median(seconds):6.3f} s  best {min(seconds):6.3f} s"
        line += f"  {nbytes / statistics.median(seconds) / 1e9:5.2f} GB/s"
        if name in limits:
            exact = name != "save"
            plain = [
                values
                for key, values in taken.items()
                if (key == limits[name] if exact else key.startswith(limits[name]))
            ]
            median = statistics.median(seconds) / min(map(statistics.median, plain))
            best = min(seconds) / min(map(min, plain))
            ratios = [a / min(b) for a, *b in zip(seconds, *plain, strict=True)]
            line += f"  ratio of medians {median:.2f}, of best {best:.2f},"
            line += f" median of ratios {statistics.median(ratios):.2f}"
        print(line, flush=True)


def main(rank: int, options: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    if options.ranks > 1 or options.engine != "plain":
        dist.init_process_group(
            "gloo", rank=rank, world_size=options.ranks, init_method=f"file://{directory}/store"
        )
    Bench(Path(directory), options.engine, options.gigabytes).rounds(options.rounds)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("/tmp"))
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engine", choices=["plain", "ddp", "fsdp2"], default="plain")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        if arguments.ranks == 1:
            main(0, arguments, temporary)
        else:
            mp.spawn(main, (arguments, temporary), nprocs=arguments.ranks)
