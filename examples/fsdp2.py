"""FSDP2: a network under `fully_shard`, its raw weights against their average.

    torchrun --standalone --nproc_per_node 2 examples/fsdp2.py

Each rank averages the shards that it holds, beside them; training communicates no more than it did.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from dist_ema import HalfLife, ShardedEMA


def noisy_sines(size: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x[:, :4].sin().sum(1, keepdim=True)
    return x, y + noise * torch.randn(size, 1, generator=generator)


def main(directory: str) -> None:
    dist.init_process_group()
    rank = dist.get_rank()
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
    ).to(device)
    for layer in model[:-1:2]:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    ema = ShardedEMA(model, HalfLife(steps=10))  # when the model is as it will be trained

    for step in range(120):
        x, y = noisy_sines(32, seed=dist.get_world_size() * step + rank, noise=0.5)
        mse_loss(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    x, y = noisy_sines(2048, seed=2**40, noise=0.0)

    @torch.no_grad()
    def test_loss() -> float:
        return mse_loss(model(x.to(device)), y.to(device)).item()

    raw = test_loss()
    with ema.average_parameters():
        averaged = test_loss()
    ema.save(f"{directory}/ema")  # sharded, to go on from
    ema.export(f"{directory}/model")  # model.safetensors, whole
    if rank == 0:
        print(f"test loss: raw {raw:.4f}, averaged {averaged:.4f}")
        print(f"the average takes {ema.nbytes} bytes on rank 0; saved in {directory}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/fsdp2"])
