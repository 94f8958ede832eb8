"""An average that goes on under another engine, on another number of ranks, bit for bit.

    torchrun --standalone --nproc_per_node 4 examples/resume_elsewhere.py fsdp2
    torchrun --standalone --nproc_per_node 2 examples/resume_elsewhere.py ddp
    python examples/resume_elsewhere.py plain

Each goes on where the one before it stopped. The average saves itself; what is trained is saved by
torch.distributed.checkpoint.
"""

import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import PowerFunction, ShardedEMA

WRAPPERS = {"plain": lambda model: model, "ddp": DistributedDataParallel, "fsdp2": fully_shard}


def digest(ema: ShardedEMA) -> str:
    """Of every bit of the average, on rank 0."""
    found = hashlib.sha256()
    for fqn, tensor in ema.gather_tensors():
        found.update(fqn.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def main(engine: str, directory: str = "runs/resume_elsewhere") -> None:
    if "RANK" in os.environ:
        dist.init_process_group()
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.GELU(), nn.Linear(33, 1))
    model = WRAPPERS[engine](model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ema = ShardedEMA(model, PowerFunction(sigma_rel=0.1))

    def tell(what: str) -> None:
        found = digest(ema)
        if rank == 0:
            print(f"{engine} on {num_ranks} rank(s) {what} step {ema.step}, average {found}")

    if stopped := sorted(Path(directory).glob("step-*")):
        weights, moments = get_state_dict(model, optimizer)
        states = {"model": weights, "optimizer": moments}
        dcp.load(states, checkpoint_id=stopped[-1] / "training")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        ema.load(stopped[-1] / "ema")
        tell("goes on from")

    for step in range(ema.step, ema.step + 20):
        torch.manual_seed(num_ranks * step + rank)
        x = torch.randn(32, 16)
        (model(x) - x.prod(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    here = Path(directory, f"step-{ema.step:06}")
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=here / "training")
    ema.save(here / "ema")
    tell("stops at")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
