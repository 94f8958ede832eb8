"""Kills saves or exports at random moments and checks that nothing is lost.

Each round forks one or two ranks that write to one path over and over (saves in the foreground or
the background, exports by every rank or by rank 0), and kills all of them or one with SIGKILL after
a random while. Then what is at the path must be whole, and be the last that was finished or the one
under way; the next one must leave nothing beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.checkpoint import directory as files
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.group import Group
from tests.cuts import blank, infos, parts_of, state_of

TENSORS = infos({"a": (300, 700), "b": (1000,), "c": (64, 3, 3, 3), "d": ()})
INDEX = "model.safetensors.index.json"
EXPORTS = [("100KB", None), ("5GB", None), ("5GB", torch.float64), ("500KB", None)]
LONGEST_S = 0.25  # of a round after its first save: some ten saves


def values_of(step: int) -> dict[str, torch.Tensor]:
    return {t.fqn: torch.full(t.shape, float(step)) for t in TENSORS}


def write_save(path: Path, step: int, ranks: Group, mode: str = "foreground") -> None:
    averages = {"ema": parts_of("flat", TENSORS, values_of(step), ranks)}
    options = {"asynchronous": mode == "background"}
    handle = save(path, averages, TENSORS, state_of(step=step), ranks, **options)
    if handle is not None:
        handle.result()


def read_save(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    parts = blank("rows", TENSORS, Group.alone())
    state = load(path, {"ema": parts}, TENSORS, Group.alone())
    return state["step"], {part.meta.fqn: part.tensor for part in parts}


def write_export(path: Path, step: int, ranks: Group, mode: str = "direct") -> None:
    size, dtype = EXPORTS[step % len(EXPORTS)]
    model = nn.ParameterDict(values_of(step))
    ShardedEMA(model).export(path, method=mode, max_shard_size=size, dtype=dtype)


def read_export(path: Path) -> tuple[int, dict[str, torch.Tensor]]:
    visible = {file.name for file in path.iterdir() if file.is_file() and file.name[0] != "."}
    file_of = {t.fqn: "model.safetensors" for t in TENSORS}
    if INDEX in visible:
        file_of = json.loads((path / INDEX).read_text())["weight_map"]
    assert visible - {INDEX} == set(file_of.values())
    state = {n: t for file in {*file_of.values()} for n, t in load_file(path / file).items()}
    assert state.keys() == file_of.keys()
    return int(state["d"]), state


class Writer(NamedTuple):
    write: Callable[..., None]
    read: Callable[[Path], tuple[int, dict[str, torch.Tensor]]]
    modes: tuple[str, str]

    def step_at(self, path: Path) -> int:
        """The step of what is at a path, all of which must be of that step."""
        step, state = self.read(path)
        assert state.keys() == {t.fqn for t in TENSORS}
        for fqn, tensor in state.items():
            assert bool((tensor == step).all()), f"{fqn}: not of step {step}"
        return step


WRITERS = {
    "save": Writer(write_save, read_save, ("foreground", "background")),
    "export": Writer(write_export, read_export, ("direct", "rank0")),
}


def start_child(body: Callable[[], object]) -> int:
    """Run in a forked process, which ends with status 0 unless the body raises."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def play(writer: Writer, path: Path, step: int, size: int, mode: str, kills_all: bool) -> int:
    """One round. Returns the last step that was finished for certain."""
    (reading, writing), parent = os.pipe(), os.getpid()
    store = Path(f"{path}.store-{step}")

    def write_until_killed(rank: int) -> None:
        os.close(reading)
        if not kills_all:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the survivors complain
        if size > 1:
            address = f"file://{store}"
            dist.init_process_group("gloo", rank=rank, world_size=size, init_method=address)
        for number in itertools.count(step + 1):
            assert os.getppid() == parent
            writer.write(path, number, Group(), mode)
            if rank == 0:
                os.write(writing, number.to_bytes(8, "little"))

    children = [start_child(lambda rank=rank: write_until_killed(rank)) for rank in range(size)]
    os.close(writing)
    finished = int.from_bytes(os.read(reading, 8) or step.to_bytes(8, "little"), "little")
    time.sleep(random.uniform(0, LONGEST_S * size))
    for pid in random.sample(children, size):
        os.kill(pid, signal.SIGKILL)
        time.sleep(0 if kills_all else 0.05)
    for pid in children:
        os.waitpid(pid, 0)
    while data := os.read(reading, 8):
        finished = int.from_bytes(data, "little")
    os.close(reading)
    store.unlink(missing_ok=True)
    return finished


def run(what: str, kills: int) -> None:
    """All rounds, in a process without a process group."""
    random.seed(0)
    writer, rename = WRITERS[what], os.rename

    def slowly(old: str, new: str) -> None:
        rename(old, new)
        time.sleep(0.02)

    with tempfile.TemporaryDirectory() as directory:
        path, step = Path(directory) / "ema", 0
        writer.write(path, step, Group.alone())
        for kill in range(kills):
            size, mode = 1 + kill % 2, writer.modes[kill // 2 % 2]
            kills_all = size == 1 or kill // 4 % 2 == 0
            with contextlib.ExitStack() as patches:
                if kill % 8 in (6, 7):  # on a file system that cannot exchange two names
                    patches.enter_context(mock.patch.object(files, "_exchange", lambda a, b: False))
                    patches.enter_context(mock.patch.object(os, "rename", slowly))
                last = play(writer, path, step, size, mode, kills_all)
                step = writer.step_at(path)
            assert step in (last, last + 1), f"read {step}, {last} was finished"
            if kill % 3 == 0:
                step += 1
                writer.write(path, step, Group.alone())
                left = [p.name for p in path.parent.iterdir()]
                assert left == [path.name] and not list(path.glob(".export-*")), left
                assert writer.step_at(path) == step
