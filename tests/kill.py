"""Kills saves or exports at random moments and checks that nothing is lost.

    python -m tests.kill --kills 200
    python -m tests.kill --kills 200 --what export

Each round forks one or two ranks that write to one path over and over (saves in the foreground or
the background, exports by every rank or by rank 0), and kills all of them or one with SIGKILL after
a random while. Then what is at the path must be whole, and be the last that was finished or the one
under way; the next one must leave nothing beside it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


def save_step(path: Path, step: int, ranks: Group, mode: str = "foreground") -> None:
    values = {t.fqn: torch.full(t.shape, float(step)) for t in TENSORS}
    parts = parts_of("flat", TENSORS, values, ranks)
    asynchronous = mode == "background"
    handle = save(
        path, {"ema": parts}, TENSORS, state_of(step=step), ranks, asynchronous=asynchronous
    )
    if handle is not None:
        handle.result()


def read_save(path: Path) -> int:
    """The step of the average at a path, all of which must be of that step."""
    parts = blank("rows", TENSORS, Group.alone())
    step = load(path, {"ema": parts}, TENSORS, Group.alone())["step"]
    for part in parts:
        assert bool((part.view == step).all()), f"{part.meta.fqn}: not of step {step}"
    return step


def export_step(path: Path, step: int, ranks: Group, mode: str = "direct") -> None:
    model = nn.ParameterDict({t.fqn: torch.full(t.shape, float(step)) for t in TENSORS})
    size, dtype = EXPORTS[step % len(EXPORTS)]
    ShardedEMA(model).export(path, method=mode, max_shard_size=size, dtype=dtype)


def read_export(path: Path) -> int:
    """The step of an export, all of which must be of that step."""
    visible = {file.name for file in path.iterdir() if file.is_file() and file.name[0] != "."}
    names = {"model.safetensors"}
    if INDEX in visible:
        index = json.loads((path / INDEX).read_text())["weight_map"]
        names = set(index.values())
        assert index.keys() == {t.fqn for t in TENSORS}
    assert visible - {INDEX} == names
    state = {n: t for file in names for n, t in load_file(path / file).items()}
    assert state.keys() == {t.fqn for t in TENSORS}
    step = int(state["d"])
    for fqn, tensor in state.items():
        assert bool((tensor == step).all()), f"{fqn}: not of step {step}"
    return step


class Writer(NamedTuple):
    write: Callable[..., None]
    read: Callable[[Path], int]
    modes: tuple[str, str]


WRITERS = {
    "save": Writer(save_step, read_save, ("foreground", "background")),
    "export": Writer(export_step, read_export, ("direct", "rank0")),
}


def rank_main(
    writer: Writer, rank: int, size: int, path: Path, step: int, mode: str, told: int
) -> None:
    """Write until killed; rank 0 tells each step that is finished."""
    ranks = Group()
    if size > 1:
        dist.init_process_group(
            "gloo", rank=rank, world_size=size, init_method=f"file://{path}.store-{step}"
        )
        ranks = Group()
    while True:
        step += 1
        writer.write(path, step, ranks, mode)
        if rank == 0:
            os.write(told, step.to_bytes(8, "little"))


def play(
    writer: Writer, path: Path, step: int, size: int, mode: str, victims: str, longest_s: float
) -> int:
    """One round. Returns the last step that was finished for certain."""
    reading, told = os.pipe()
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                devnull = os.open(os.devnull, os.O_WRONLY)
                if victims == "one":
                    os.dup2(devnull, 2)  # the survivors complain
                rank_main(writer, rank, size, path, step, mode, told)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(pid)
    os.close(told)
    finished = int.from_bytes(os.read(reading, 8) or step.to_bytes(8, "little"), "little")
    time.sleep(random.uniform(0, longest_s))
    first = children if victims == "all" else [random.choice(children)]
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    if victims == "one":
        time.sleep(0.05)
        for pid in set(children) - set(first):
            os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    while data := os.read(reading, 8):
        finished = int.from_bytes(data, "little")
    os.close(reading)
    for store in path.parent.glob(f"{path.name}.store-*"):
        store.unlink()
    return finished


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--what", choices=WRITERS, default="save")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    writer = WRITERS[options.what]
    torch.set_num_threads(1)
    found: collections.Counter[str] = collections.Counter()
    exchange, rename = files._exchange, os.rename

    def slowly(old, new):
        rename(old, new)
        time.sleep(0.02)

    with tempfile.TemporaryDirectory() as directory:
        path, step = Path(directory) / "ema", 0
        writer.write(path, step, Group.alone())
        for kill in range(options.kills):
            size, mode = 1 + kill % 2, writer.modes[kill // 2 % 2]
            victims = ("all", "one")[kill // 4 % 2] if size > 1 else "all"
            # Every eighth round on a file system that could not exchange two names.
            files._exchange = (lambda a, b: False) if kill % 8 in (6, 7) else exchange
            os.rename = slowly if kill % 8 in (6, 7) else rename
            last = play(writer, path, step, size, mode, victims, LONGEST_S * (1 + (size > 1)))
            debris = sorted(p.name for p in path.parent.iterdir() if p != path)
            debris += sorted(p.name for p in path.glob(".export-*"))
            step = writer.read(path)
            assert step in (last, last + 1), f"read {step}, {last} was finished"
            found["the last finished" if step == last else "the one under way"] += 1
            found["with debris"] += bool(debris)
            found["put aside"] += any(".old-" in name for name in debris) and not path.exists()
            files._exchange, os.rename = exchange, rename
            if kill % 3 == 0:
                step += 1
                writer.write(path, step, Group.alone())
                left = [p.name for p in path.parent.iterdir()]
                assert left == [path.name] and not list(path.glob(".export-*")), left
                assert writer.read(path) == step
    print(f"{options.kills} kills: {dict(found)}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
