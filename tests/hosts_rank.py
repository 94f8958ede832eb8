"""What the ranks do on the two hosts of tests/test_hosts.py, which compares what is written here.

Every rank writes its results to `shared/rank-N.json`; rank 0 writes whole tensors to
`shared/LABEL.safetensors`.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema.checkpoint import directory as files
from tests.net import TRAINABLE, Net, batch_of_tokens, loss_of

DECAY = 0.9
STEPS = 3
MESHES = {"fsdp2": ((4,), ("shard",)), "hsdp": ((2, 2), ("replicate", "shard"))}
PATIENCE_S = 5.0  # for a new name; 30 s in the library
ROUNDS = 4  # with a file system that fails now and then
FAIL_EVERY = 149  # changes, on each host


class Training:
    def __init__(self, engine: str, shared: Path) -> None:
        torch.manual_seed(0)
        self.engine, self.shared, self.steps = engine, shared, 0
        self.net = Net()
        mesh = init_device_mesh("cpu", MESHES[engine][0], mesh_dim_names=MESHES[engine][1])
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
        # Small steps: on the CPU, torch 2.8 adds up the gradients of ranks instead of averaging.
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 1e-4)
        self.ema = ShardedEMA(self.net, decay=DECAY)

    def step(self) -> None:
        loss_of(self.net(batch_of_tokens(10 * self.steps + dist.get_rank()))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.steps += 1

    def keep(self, what: str, tensors: dict[str, Tensor] | None = None) -> None:
        """Write tensors, or the average, for the test."""
        tensors = self.ema.gather_state_dict() if tensors is None else tensors
        if dist.get_rank() == 0:
            path = self.shared / f"{self.engine}-{what}.safetensors"
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)

    def run(self, directory: Path) -> None:
        """Train, save, forget, load, export, and compute with the average."""
        for number in range(STEPS + 1):
            if number > 0:
                self.step()
            whole = {name: p.full_tensor() for name, p in self.net.named_parameters()}
            self.keep(f"weights-{number}", whole)
        path = directory / self.engine
        self.ema.save(path / "ema")
        self.keep("saved")
        self.ema.reset()
        self.ema.load(path / "ema")
        self.keep("loaded")
        self.ema.save(path / "background", asynchronous=True).result()
        self.ema.load(path / "background")
        self.keep("background")
        for method in ("auto", "direct", "rank0"):
            self.ema.export(path / method, method=method)
        with self.ema.average_parameters(), torch.no_grad():
            logits = self.net.eval()(batch_of_tokens(0))
        self.keep("logits", {"logits": logits})


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    files.VISIBLE_WITHIN_S = PATIENCE_S
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    result: dict[str, Any] = {"host": socket.gethostname()}
    shared, slow, bad = (directory / name for name in ("shared", "slow", "bad_network"))
    is_slow = os.path.ismount(slow)
    bad.touch()
    dist.barrier()
    start = time.monotonic()
    Training("hsdp", shared).run(shared)
    result["seconds"] = time.monotonic() - start
    dist.barrier()
    bad.unlink(missing_ok=True)
    training = Training("fsdp2", shared)
    training.run(slow if is_slow else shared)
    if is_slow:
        result["outcomes"] = failing_file_system(training, slow, directory / "faults")
    part = shared / f"rank-{dist.get_rank()}.part"
    part.write_text(json.dumps(result))
    part.rename(part.with_suffix(".json"))
    time.sleep(3600)  # the test ends all processes


def failing_file_system(training: Training, slow: Path, faults: Path) -> list[dict[str, str]]:
    """Save and export over and over; the file system fails once in a while."""
    outcomes, path, out = [], slow / "failing-ema", slow / "failing-export"
    reader = ShardedEMA(training.net, decay=DECAY)
    training.ema.save(path)
    training.ema.export(out)
    saved = exported = training.ema.gather_state_dict()
    for _ in range(ROUNDS):
        training.step()
        new = training.ema.gather_state_dict()
        with_faults(faults, str(FAIL_EVERY))
        outcome = {
            "save": error_of(lambda: training.ema.save(path)),
            "export": error_of(lambda: training.ema.export(out, method="direct")),
            "load": error_of(lambda: reader.load(path)),
        }
        with_faults(faults, "")
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


def with_faults(faults: Path, every: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        faults.write_text(every)
    dist.barrier()


def which(read: dict[str, Tensor], **states: dict[str, Tensor]) -> str:
    """The name of the state that is read, on rank 0."""
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
