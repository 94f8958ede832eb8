"""Showing the average and going back; saving, loading, gathering, exporting: time and memory."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_ema import ShardedEMA
from tests.benchmarks.launch import Here, rows_of
from tests.benchmarks.measure import Clock, peak_memory, ratio
from tests.benchmarks.models import ENGINES, Shapes, updater, wrap
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import Sizes

SWAP_NOTE = """\
One `average_parameters()`: *in* and *out* over a copy of what the rank averages, in the same
round. Where ranks share the weights, also over an all-gather of as many bytes into allocated
memory, by torch's operator and as *messages* between the ranks. *Extra*: the most memory held on
any rank within the block beyond what was held before it (resident memory of the process on a CPU,
allocated memory on CUDA). Medians over rounds, all ranks at once."""
FILES_NOTE = """\
Time of each, all ranks at once, over the faster of *write*: rank 0 writing as many bytes as an fp32
copy of the model has to one file, and syncing it; and *write apart*: each rank writing an equal
part. In the same round; medians over rounds. *Over read*: the same over each rank reading an equal
part into allocated memory. What is read is in the page cache. *Extra*: as above, on rank 0 and on
any rank."""
MEMORY_NOTE = """\
One process. *Average*: `ema.nbytes` over 4 bytes an element. *Extra*: the most memory held during a
call beyond what was held before it, in MB; of `ShardedEMA(model)`, beyond the average as well."""
BLOCK = 4 << 20
FURTHER = ("fsdp2", "zero2")  # with bf16 weights too
SHARING = ("ddp", "zero2")  # each rank has all weights and averages a part
STORED = ("plain", "ddp", "fsdp1", "fsdp2", "zero3")


def run(device: str, sizes: Sizes) -> list[Table]:
    swaps = Table("swap", "In and out of the average", SWAP_NOTE)
    files = Table("files", "Save, load, gather, export", FILES_NOTE)
    bf16 = replace(sizes.swapped, name=f"{sizes.swapped.name} bf16", dtype=torch.bfloat16)
    every = [(engine, sizes.swapped) for engine in ENGINES] + [(engine, bf16) for engine in FURTHER]
    stored = [(engine, sizes.stored) for engine in STORED]
    swaps.rows = rows_of(swap_case, every, device, sizes, sizes.slow_rounds)
    files.rows = rows_of(files_case, stored, device, sizes, 2 * sizes.slow_rounds + 1)
    return [swaps, files]


def run_memory(device: str, sizes: Sizes) -> list[Table]:
    cases = [("plain", sizes.heavy)]
    rows = rows_of(memory_case, cases, device, sizes, sizes.slow_rounds)
    return [Table("memory", "Memory of a large average", MEMORY_NOTE, rows)]


def memory_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    """One row: how much memory the first call of each kind takes in this process."""
    model = wrap(engine, shapes, here)
    held = peak_memory(here.device, reset=True)
    ema = ShardedEMA(model)
    row: dict[str, Any] = {"engine": engine, "weights": shapes.name}
    row |= {"average MB": ema.nbytes / 1e6, "average": ema.nbytes / (4 * shapes.numel)}
    row["extra MB, building"] = (peak_memory(here.device) - held - ema.nbytes) / 1e6

    def swapped() -> None:
        with ema.average_parameters():
            pass

    for name, act in {"an update": updater(ema, model), "a swap": swapped}.items():
        held = peak_memory(here.device, reset=True)
        act()
        row[f"extra MB, {name}"] = (peak_memory(here.device) - held) / 1e6
    return [row]


def swap_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    model = wrap(engine, shapes, here)
    ema = ShardedEMA(model)
    updater(ema, model)()
    values = ema._average.storage.values[0]
    copies = [torch.empty_like(value) for value in values]
    limits: dict[str, Callable[[], object]] = {}
    if engine in SHARING and here.size > 1:
        numel = -(-shapes.numel // here.size)
        parts = torch.empty(here.size, numel, dtype=shapes.dtype, device=here.device)
        own = parts[here.rank].clone()
        limits["all-gather"] = lambda: dist.all_gather_into_tensor(parts.view(-1), own)
        limits["messages"] = lambda: send(own, parts, here)
    taken: dict[str, list[float]] = {name: [] for name in ("copy", "in", "out", *limits)}
    first = extra = 0
    for number in range(rounds + 1):
        block = ema.average_parameters()
        before = peak_memory(here.device, reset=True)
        entering = together(here, block.__enter__)
        leaving = together(here, lambda block=block: block.__exit__(None, None, None))
        peak = peak_memory(here.device) - before
        first, extra = (peak, 0) if number == 0 else (first, max(extra, peak))
        copying = together(here, lambda: torch._foreach_copy_(copies, values))
        sending = [together(here, act) for act in limits.values()]
        if number:  # the first compares replicas, and makes what is made once
            for name, seconds in zip(taken, (copying, entering, leaving, *sending), strict=True):
                taken[name].append(seconds)
    firsts, extras = here.all_gather(first), here.all_gather(extra)
    row = {
        "engine": engine,
        "ranks": here.size,
        "weights": shapes.name,
        "model MB": shapes.numel * shapes.dtype.itemsize / 1e6,
        "in/copy": ratio(taken, "in", "copy"),
        "out/copy": ratio(taken, "out", "copy"),
        "in s": statistics.median(taken["in"]),
        "out s": statistics.median(taken["out"]),
        "extra MB": max(extras) / 1e6,
        "extra MB, first": max(firsts) / 1e6,
    }
    for limit in limits:
        row[f"{limit} s"] = statistics.median(taken[limit])
        row |= {f"{name}/{limit}": ratio(taken, name, limit) for name in ("in", "out")}
    return [row]


def send(own: torch.Tensor, parts: torch.Tensor, here: Here) -> None:
    """An all-gather by point-to-point messages."""
    operations = [
        dist.P2POp(operation, tensor, rank)
        for rank in range(here.size)
        for operation, tensor in ((dist.isend, own), (dist.irecv, parts[rank]))
        if rank != here.rank
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def files_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    model = wrap(engine, shapes, here)
    ema = ShardedEMA(model)
    updater(ema, model)()
    told = [tempfile.mkdtemp(prefix="bench-files-") if here.rank == 0 else ""]
    dist.broadcast_object_list(told, src=0)
    directory = Path(told[0])
    part = 4 * shapes.numel // here.size
    own, room = directory / f"raw-{here.rank}", bytearray(part)
    acts: dict[str, Callable[[], object]] = {
        "write": lambda: write(own, 4 * shapes.numel) if here.rank == 0 else None,
        "write apart": lambda: write(own, part),
        "read": lambda: read(own / "raw", room),
        "save": lambda: ema.save(directory / "ema"),
        "load": lambda: ema.load(directory / "ema"),
        "gather_state_dict": ema.gather_state_dict,
    }
    for method in ("rank0", "direct"):
        acts[f"export {method}"] = lambda method=method: ema.export(
            directory / method, method=method
        )
    taken: dict[str, list[float]] = {name: [] for name in acts}
    extra = dict.fromkeys(acts, 0)
    try:
        for _ in range(rounds):
            for name, act in acts.items():
                before = peak_memory(here.device, reset=True)
                taken[name].append(together(here, act))
                extra[name] = max(extra[name], peak_memory(here.device) - before)
                if here.rank == 0:
                    os.sync()
    finally:
        dist.barrier()
        if here.rank == 0:
            shutil.rmtree(directory)
    every = here.all_gather(extra)
    limit = min(("write", "write apart"), key=lambda name: statistics.median(taken[name]))
    return [
        {
            "engine": engine,
            "ranks": here.size,
            "weights": shapes.name,
            "fp32 MB": 4 * shapes.numel / 1e6,
            "what": name,
            "over write": ratio(taken, name, limit),
            "over read": ratio(taken, name, "read"),
            "s": statistics.median(taken[name]),
            "extra MB rank 0": every[0][name] / 1e6,
            "extra MB any": max(e[name] for e in every) / 1e6,
        }
        for name in acts
    ]


def together(here: Here, act: Callable[[], object]) -> float:
    """Seconds from when all ranks are ready until all are done."""

    def act_and_wait() -> None:
        act()
        Clock(here.device).settle()
        dist.barrier()

    dist.barrier()
    return Clock(torch.device("cpu")).time(act_and_wait)


def write(directory: Path, nbytes: int) -> None:
    """A new file of so many bytes, on disk, in a new directory, which replaces the one before.

    File systems put the files of a new directory elsewhere, which may cost more than to reuse the
    blocks of the last file.
    """
    new = directory.with_name(f"{directory.name}.new")
    new.mkdir()
    block = torch.randn(BLOCK // 4).numpy().data.cast("B")
    with open(new / "raw", "wb", buffering=0) as file:
        for start in range(0, nbytes, BLOCK):
            file.write(block[: min(BLOCK, nbytes - start)])
        os.fsync(file.fileno())
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def read(path: Path, room: bytearray) -> None:
    """Fill a buffer with the start of a file."""
    with open(path, "rb", buffering=0) as file:
        view = memoryview(room)
        for start in range(0, len(room), BLOCK):
            file.readinto(view[start : start + BLOCK])
