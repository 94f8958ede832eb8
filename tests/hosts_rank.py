"""What the ranks do on the two hosts of tests/test_hosts.py, which compares what is written here.

Every rank writes what it found to `shared/rank-N.json`; rank 0 writes whole tensors to
`shared/LABEL.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
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
from tests.hosts import LATE_S, RANKS_PER_HOST
from tests.net import TRAINABLE, Net, batch_of_tokens, loss_of

DIRECTORY = Path(sys.argv[-1])
DECAY = 0.9
STEPS = 3
MESHES = {"fsdp2": ((4,), ("shard",)), "hsdp": ((2, 2), ("replicate", "shard"))}
PATIENCE_S = 5 * LATE_S  # for a new name; 30 s in the library
ROUNDS = 6  # with a file system that fails now and then
FAIL_EVERY = 149  # changes, on each host


class Training:
    def __init__(self, engine: str, label: str) -> None:
        torch.manual_seed(0)
        self.label, self.steps = label, 0
        self.net = Net()
        mesh = init_device_mesh("cpu", MESHES[engine][0], mesh_dim_names=MESHES[engine][1])
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
        # Small steps: on the CPU, torch 2.8 adds up the gradients of ranks instead of averaging.
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 1e-4)
        self.ema = ShardedEMA(self.net, decay=DECAY)
        self.keep_weights()

    def step(self) -> None:
        loss_of(self.net(batch_of_tokens(10 * self.steps + dist.get_rank()))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()
        self.steps += 1
        self.keep_weights()

    def keep_weights(self) -> None:
        whole = {name: p.full_tensor() for name, p in self.net.named_parameters()}
        keep(f"{self.label}-weights-{self.steps}", whole)

    def keep_average(self, what: str) -> None:
        keep(f"{self.label}-{what}", self.ema.gather_state_dict())

    def keep_all_ways(self, directory: Path) -> None:
        """Save, forget, load, export, and compute with the average."""
        self.ema.save(directory / f"{self.label}-ema")
        self.keep_average("saved")
        self.ema.reset()
        self.ema.load(directory / f"{self.label}-ema")
        self.keep_average("loaded")
        self.ema.save(directory / f"{self.label}-background", asynchronous=True).result()
        self.ema.load(directory / f"{self.label}-background")
        self.keep_average("background")
        for method in ("auto", "direct", "rank0"):
            self.ema.export(directory / f"{self.label}-{method}", method=method)
        with self.ema.average_parameters(), torch.no_grad():
            self.net.eval()
            logits = self.net(batch_of_tokens(0))
            self.net.train()
        keep(f"{self.label}-logits", {"logits": logits})


def main() -> None:
    here, shared, slow = (DIRECTORY / name for name in ("here", "shared", "slow"))
    files.VISIBLE_WITHIN_S = PATIENCE_S
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    found: dict[str, Any] = {"host": socket.gethostname()}

    def run(name: str, body: Callable[..., Any], *arguments: Any) -> None:
        start = time.monotonic()
        found[name] = body(*arguments)
        found[f"{name}, seconds"] = time.monotonic() - start
        (shared / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.barrier()

    for engine in MESHES:
        run(f"good network, {engine}", good_network, engine, shared)
    run("one host sees it", one_host_sees_it, here, shared)
    bad = DIRECTORY / "bad_network"
    dist.barrier()
    bad.touch()
    run("bad network", good_network, "hsdp", shared, "bad")
    bad.unlink(missing_ok=True)
    if os.path.ismount(slow):
        run("slow file system", good_network, "fsdp2", slow, "slow")
        run("failing file system", failing_file_system, slow, DIRECTORY / "faults")
    dist.destroy_process_group()


def good_network(engine: str, directory: Path, label: str = "") -> None:
    training = Training(engine, label or engine)
    for _ in range(STEPS):
        training.step()
    training.keep_all_ways(directory)


def one_host_sees_it(here: Path, shared: Path) -> dict[str, Any]:
    """Host 1 has an export of its own, and no checkpoint, where host 0 has one."""
    training, name = Training("fsdp2", "one"), socket.gethostname()
    training.step()
    if is_first_of_host():
        if dist.get_rank() == 0:
            shutil.copytree(shared / "fsdp2-ema", here / "ema")
        else:
            (here / "same-name").mkdir()
            (here / "same-name/model.safetensors").write_bytes(b"of host 1")
    dist.barrier()
    ema, errors = training.ema, {}
    training.keep_average("before")
    errors["load"] = error_of(lambda: ema.load(here / "ema"))
    errors["save"] = error_of(lambda: ema.save(here / "new"))
    errors["save asynchronously"] = error_of(
        lambda: ema.save(here / "new", asynchronous=True).result()
    )
    errors["export directly"] = error_of(lambda: ema.export(here / "direct", method="direct"))
    training.keep_average("after")
    ema.export(here / "auto")
    if is_first_of_host():
        socket.sethostname("node")
    dist.barrier()
    assert socket.gethostname() == "node"
    ema.export(here / "same-name")
    if is_first_of_host():
        socket.sethostname(name)
    dist.barrier()
    return errors


def failing_file_system(slow: Path, faults: Path) -> dict[str, Any]:
    """Save and export over and over; the file system fails once in a while."""
    training, outcomes = Training("fsdp2", "failing"), []
    reader = ShardedEMA(training.net, decay=DECAY)
    path, out = slow / "failing-ema", slow / "failing-export"
    training.ema.save(path)
    training.ema.export(out)
    good = exported = digest_of(training.ema)
    for _ in range(ROUNDS):
        training.step()
        new = digest_of(training.ema)
        dist.barrier()
        if dist.get_rank() == 0:
            faults.write_text(str(FAIL_EVERY))
        dist.barrier()
        save_error = error_of(lambda: training.ema.save(path))
        export_error = error_of(lambda: training.ema.export(out, method="direct"))
        load_error = error_of(lambda: reader.load(path))
        dist.barrier()
        if dist.get_rank() == 0:
            faults.unlink()
        dist.barrier()
        reader.load(path)
        read = digest_of(reader)
        outcomes.append(
            {
                "save": save_error,
                "export": export_error,
                "load": load_error,
                "loaded": "new" if read == new else "old" if read == good else "neither",
            }
        )
        good = read
        if dist.get_rank() == 0:
            state = digest(load_file(out / "model.safetensors"))
            which = "new" if state == new else "old" if state == exported else "neither"
            outcomes[-1]["exported"] = which
            exported = state
    return {"outcomes": outcomes}


def digest_of(ema: ShardedEMA) -> str:
    """The bits of the whole average, on rank 0."""
    state = ema.gather_state_dict()
    return digest(state) if state else ""


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in TRAINABLE)).hexdigest()


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def is_first_of_host() -> bool:
    return dist.get_rank() % RANKS_PER_HOST == 0


def keep(label: str, tensors: dict[str, Tensor]) -> None:
    if dist.get_rank() == 0:
        path = DIRECTORY / f"shared/{label}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main()
