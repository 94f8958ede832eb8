"""Choose the width of the average after the run, from files that were saved in it.

    torchrun --standalone --nproc_per_node 2 examples/posthoc_sweep.py

The run keeps power-function averages of two widths and saves them 16 times; afterwards the average
of any other width is made of those files (arXiv 2312.02696), here by rank 0. The command line makes
them too: dist-ema synthesize --sweep 0.05:0.25:0.05 --out runs/swept runs/posthoc/saved-*
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from dist_ema import PowerFunction, ShardedEMA, synthesize

KEPT = {"narrow": PowerFunction(sigma_rel=0.05), "wide": PowerFunction(sigma_rel=0.10)}


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
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    model.append(nn.Linear(64, 1))
    fully_shard(model.to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ema = ShardedEMA(model, KEPT)

    saved = []
    for step in range(1, 321):
        x, y = noisy_sines(32, seed=dist.get_world_size() * step + rank, noise=0.5)
        mse_loss(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if step % 20 == 0:
            saved.append(f"{directory}/saved-{step:06}")
            ema.save(saved[-1])

    x, y = noisy_sines(2048, seed=2**40, noise=0.0)

    @torch.no_grad()
    def test_loss() -> float:
        return mse_loss(model(x.to(device)), y.to(device)).item()

    raw, losses = test_loss(), {}
    for width in (0.04, 0.05, 0.07, 0.1, 0.15, 0.2):
        if rank == 0:  # the work of one process, in bounded memory
            print(synthesize(saved, sigma_rel=width, out=f"{directory}/{width}"))
        dist.barrier()
        made = ShardedEMA(model, PowerFunction(sigma_rel=width))
        made.load(f"{directory}/{width}")
        with made.average_parameters():
            losses[width] = test_loss()
    if rank == 0:
        for width, loss in losses.items():
            print(f"sigma_rel {width}: test loss {loss:.4f}")
        best = min(losses, key=losses.get)
        print(f"test loss: raw {raw:.4f}, averaged {losses[best]:.4f}")
        print(f"now run: dist-ema export {directory}/{best} {directory}/model")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/posthoc"])
