"""A mean teacher: the average is a second network, ready for a forward pass after each update.

    torchrun --standalone --nproc_per_node 2 examples/teacher.py

Few points have labels; on the others the student follows the teacher (Tarvainen and Valpola,
arXiv 1703.01780). Both networks are sharded in the same way, so each rank averages what it holds.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, mse_loss

from dist_ema import ShardedEMA, Warmup


def two_moons(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (size,), generator=generator)
    angle = torch.pi * torch.rand(size, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(label[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x)
    return x + 0.1 * torch.randn(size, 2, generator=generator), label


def network(device: torch.device) -> nn.Module:
    net = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    ).to(device)
    for layer in net[:-1:2]:
        fully_shard(layer)
    return fully_shard(net)


def main() -> None:
    dist.init_process_group()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    student, teacher = network(device), network(device).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-2)
    ema = ShardedEMA(student, Warmup(0.95), into=teacher)  # the teacher starts as the student

    labelled = [tensor.to(device) for tensor in two_moons(16, seed=1)]
    for step in range(150):
        torch.manual_seed(num_ranks * step + rank)
        x = two_moons(64, seed=1000 + num_ranks * step + rank)[0].to(device)
        with torch.no_grad():
            wanted = teacher(x + 0.2 * torch.randn_like(x)).softmax(1)
        found = student(torch.cat([labelled[0], x + 0.2 * torch.randn_like(x)]))
        consistency = mse_loss(found[16:].softmax(1), wanted)
        (cross_entropy(found[:16], labelled[1]) + min(step / 10, 5) * consistency).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    x, label = (tensor.to(device) for tensor in two_moons(2000, seed=2))
    with torch.no_grad():
        right = [(net(x).argmax(1) == label).float().mean().item() for net in (student, teacher)]
    if rank == 0:
        print(f"16 labels, accuracy: student {right[0]:.3f}, teacher {right[1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
