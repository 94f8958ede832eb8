"""Runs a body on ranks of its own: a process each, on the CPU with gloo or on CUDA with NCCL."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if TYPE_CHECKING:
    from tests.benchmarks.models import Shapes
    from tests.benchmarks.report import Row
    from tests.benchmarks.sizes import Sizes


@dataclass(frozen=True)
class Here:
    """The rank that a body runs on."""

    rank: int
    size: int
    device: torch.device

    def turns(self) -> Iterator[None]:
        """Once on each rank, while the others wait: all of the machine's bandwidth for one."""
        for rank in range(self.size):
            dist.barrier()
            if rank == self.rank:
                yield
        dist.barrier()

    def barrier(self) -> None:
        dist.barrier()

    def all_gather(self, obj: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj)
        return out


Body = Callable[..., Any]  # called with Here, then the arguments


class NotEnoughDevices(Exception):
    """There are fewer GPUs than ranks."""


def on_ranks(body: Body, num_ranks: int, *arguments: Any, device: str) -> list[Any]:
    """What a body of a module returns on each rank of a process group that is made for it.

    Each rank has an equal share of the cores as threads.

    Raises:
        NotEnoughDevices: CUDA is asked for and has fewer devices than that.
    """
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        raise NotEnoughDevices(f"needs {num_ranks} GPUs, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        mp.spawn(_rank, (num_ranks, directory, device, body, arguments), nprocs=num_ranks)
        results = [Path(directory, f"{rank}") for rank in range(num_ranks)]
        return [pickle.loads(path.read_bytes()) for path in results]


def alone(body: Callable[..., Any], *arguments: Any, num_threads: int = 1) -> Any:
    """What a body returns in a process without a process group."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        mp.spawn(_process, (directory, body, arguments, num_threads), nprocs=1)
        return pickle.loads(Path(directory, "0").read_bytes())


def _rank(
    rank: int, num_ranks: int, directory: str, device: str, body: Body, arguments: tuple[Any, ...]
) -> None:
    _be_quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
    )
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", rank)
        torch.cuda.set_device(where)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    # Both: objects and lengths travel between CPUs.
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.FileStore(f"{directory}/store", num_ranks),
        rank=rank,
        world_size=num_ranks,
    )
    result = body(Here(rank, num_ranks, where), *arguments)
    Path(directory, f"{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    # Without the teardown of the group, which may hang or abort after all is done.
    os._exit(0)


def _process(
    _: int, directory: str, body: Callable[..., Any], arguments: tuple[Any, ...], num_threads: int
) -> None:
    _be_quiet()
    torch.set_num_threads(num_threads)
    Path(directory, "0").write_bytes(pickle.dumps(body(*arguments)))


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def rows_of(
    measure: Body, cases: Sequence[tuple[str, Shapes]], device: str, sizes: Sizes, rounds: int
) -> list[Row]:
    """What rank 0 measured in each case, in their order.

    Plain models run on one rank, all others on several. Cases share their processes, except that
    a stage of DeepSpeed has some of its own: its engines are not freed while the process lives.
    """
    groups: dict[str, list[tuple[str, Shapes]]] = {}
    for case in cases:
        engine = case[0]
        own = engine == "plain" or engine.startswith("zero")
        groups.setdefault(engine if own else "torch", []).append(case)
    rows: list[Row] = []
    for name, group in groups.items():
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            rows += [{"engine": name, "weights": "not run: deepspeed is not installed"}]
            continue
        num_ranks = 1 if name == "plain" else sizes.ranks_of(device)
        sys.stderr.write(f"{measure.__module__}: {name} on {num_ranks} ranks\n")
        try:
            rows += on_ranks(_cases, num_ranks, measure, group, rounds, device=device)[0]
        except NotEnoughDevices as error:
            rows += [{"engine": name, "weights": f"not run: {error}"}]
    return rows


def _cases(
    here: Here, measure: Body, cases: Sequence[tuple[str, Shapes]], rounds: int
) -> list[Row]:
    rows: list[Row] = []
    for engine, shapes in cases:
        rows += measure(here, engine, shapes, rounds)
        gc.collect()
    return rows
