"""FSDP2 and tensor parallelism on a 2-D mesh: data-parallel pairs of tensor-parallel pairs.

    torchrun --standalone --nproc_per_node 4 examples/fsdp2_tp.py

A weight is cut along both axes of the mesh, or along one and repeated along the other; then the
ranks that hold the same part of it average a slice each.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import parallel
from torch.nn.functional import gelu, mse_loss

from dist_ema import HalfLife, ShardedEMA


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


def noisy_sines(size: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x[:, :4].sin().sum(1, keepdim=True)
    return x, y + noise * torch.randn(size, 1, generator=generator)


def main(directory: str) -> None:
    dist.init_process_group()
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    num_pairs = dist.get_world_size() // 2
    mesh = init_device_mesh(device.type, (num_pairs, 2), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), Block(32, 64), nn.Linear(32, 1)).to(device)
    plan = {"1.up": parallel.ColwiseParallel(), "1.down": parallel.RowwiseParallel()}
    fully_shard(parallel.parallelize_module(model, mesh["tp"], plan)[1], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    # foreach would mix weights of the two meshes in one call, which DTensor refuses.
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, foreach=False)
    ema = ShardedEMA(model, HalfLife(steps=10))  # when the model is as it will be trained

    for step in range(100):
        x, y = noisy_sines(32, seed=num_pairs * step + mesh["dp"].get_local_rank(), noise=0.5)
        mse_loss(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    x, y = noisy_sines(2048, seed=2**40, noise=0.0)
    with torch.no_grad():
        raw = mse_loss(model(x.to(device)), y.to(device)).item()
        with ema.average_parameters():
            averaged = mse_loss(model(x.to(device)), y.to(device)).item()
    ema.save(directory)
    held = torch.tensor([float(ema.nbytes)], device=device)
    dist.all_reduce(held)
    if dist.get_rank() == 0:
        print(f"test loss: raw {raw:.4f}, averaged {averaged:.4f}")
        numel = sum(p.numel() for p in model.parameters())
        print(f"{numel} weights; all ranks together hold {int(held)} bytes of average")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/fsdp2_tp/ema"])
