"""What the ranks do on the two hosts of tests/test_hosts.py.

Every rank checks what it gathers, and writes its results to `shared/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_ema import ShardedEMA
from dist_ema.checkpoint import directory as files
from tests.grid import named
from tests.net import TRAINABLE
from tests.runs import DECAY, Run, same, start
from tests.worlds import WORLDS, evaluate, from_rank_0

STEPS = 3
PATIENCE_S = 3.0  # for a new name; 30 s in the library
ROUNDS = 4  # with a file system that fails now and then
FAIL_EVERY = 149  # changes, on each host


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    files.VISIBLE_WITHIN_S = PATIENCE_S
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    result: dict[str, Any] = {"host": socket.gethostname()}
    shared, slow, bad = (directory / name for name in ("shared", "slow", "bad_network"))
    bad.touch()
    dist.barrier()
    begun = time.monotonic()
    train("hsdp", shared)
    result["seconds"] = time.monotonic() - begun
    dist.barrier()
    bad.unlink(missing_ok=True)
    is_slow = os.path.ismount(slow)
    run = train("fsdp2", slow if is_slow else shared)
    if is_slow:
        result["outcomes"] = failing_file_system(run, slow, directory / "faults")
    part = shared / f"rank-{dist.get_rank()}.part"
    part.write_text(json.dumps(result))
    part.rename(part.with_suffix(".json"))
    time.sleep(3600)  # the test ends all processes


def train(engine: str, directory: Path) -> Run:
    """Train, compute with the average, save, forget, load and export it in all ways."""
    [world] = named(WORLDS, engine)
    run, path = start(world).train(STEPS), directory / engine
    run.check()
    ema, saved = run.ema, run.ema.gather_state_dict()
    twin = world.plain_twin(from_rank_0(saved))
    torch.testing.assert_close(run.averaged_logits(), evaluate(twin), **world.forward_tolerance)
    ema.save(path / "ema")
    ema.reset()
    ema.load(path / "ema")
    same(ema.gather_state_dict(), saved)
    ema.save(path / "background", asynchronous=True).result()
    ema.reset()
    ema.load(path / "background")
    same(ema.gather_state_dict(), saved)
    for method in ("auto", "direct", "rank0"):
        ema.export(path / method, method=method)
    if dist.get_rank() == 0:
        save_file({name: tensor.clone() for name, tensor in saved.items()}, path / "wanted")
    return run


def failing_file_system(run: Run, slow: Path, faults: Path) -> list[dict[str, str]]:
    """Save and export over and over; the file system fails once in a while."""
    outcomes, path, out = [], slow / "failing-ema", slow / "failing-export"
    reader = ShardedEMA(run.training.model, DECAY)
    run.ema.save(path)
    run.ema.export(out)
    saved = exported = run.ema.gather_state_dict()
    for _ in range(ROUNDS):
        run.train_unrecorded()
        new = run.ema.gather_state_dict()
        set_faults(faults, str(FAIL_EVERY))
        outcome = {
            "save": error_of(lambda: run.ema.save(path)),
            "export": error_of(lambda: run.ema.export(out, method="direct")),
            "load": error_of(lambda: reader.load(path)),
        }
        set_faults(faults, "")
        reader.load(path)
        read = reader.gather_state_dict()
        outcome["saved"] = which(read, old=saved, new=new)
        saved = read
        if dist.get_rank() == 0:
            read = load_file(out / "model.safetensors")
            outcome["exported"] = which(read, old=exported, new=new)
            exported = read
        outcomes.append(outcome)
    return outcomes


def set_faults(faults: Path, every: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        faults.write_text(every)
    dist.barrier()


def which(read: dict[str, Tensor], **states: dict[str, Tensor]) -> str:
    """The name of the state that was read, on rank 0."""
    for name, state in reversed(states.items()):
        if not state or all(torch.equal(read[fqn], state[fqn]) for fqn in TRAINABLE):
            return name
    return "neither"


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
