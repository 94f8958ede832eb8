"""Self-distillation with LoRA: the teacher is a second adapter on the same frozen base model.

    torchrun --standalone --nproc_per_node 2 examples/adapter_teacher.py

A network that knows one pair of half-moons is adapted to a rotated pair, of which 16 points have
labels; on the others the student follows the teacher. No second model: the teacher's weights, the
average, are as small as the student's. `set_adapter()` chooses with which of the two to compute.
"""

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA, Warmup


def two_moons(size: int, seed: int, turn: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (size,), generator=generator)
    angle = torch.pi * torch.rand(size, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.where(label[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x) - torch.tensor([0.5, 0])
    cos, sin = torch.tensor(turn).cos(), torch.tensor(turn).sin()
    x = x @ torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])
    return x + 0.1 * torch.randn(size, 2, generator=generator), label


def pretrained() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(100):
        x, label = two_moons(64, step, turn=0.0)
        cross_entropy(net(x), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def main() -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"])
    adapters = get_peft_model(pretrained(), config)  # the student, named "default"
    adapters.add_adapter("teacher", config)  # frozen; before the model is wrapped
    model = DistributedDataParallel(adapters)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ema = ShardedEMA(model, Warmup(0.95), into="teacher")  # the teacher starts as the student

    few, labels = two_moons(16, seed=1, turn=0.8)
    for step in range(150):
        torch.manual_seed(num_ranks * step + rank)
        x = two_moons(64, seed=1000 + num_ranks * step + rank, turn=0.8)[0]
        adapters.set_adapter("teacher", inference_mode=True)
        with torch.no_grad():
            wanted = adapters(x + 0.1 * torch.randn_like(x)).softmax(1)
        adapters.set_adapter("default")
        found = model(torch.cat([few, x + 0.1 * torch.randn_like(x)]))
        consistency = mse_loss(found[16:].softmax(1), wanted)
        (cross_entropy(found[:16], labels) + min(step / 10, 5) * consistency).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    x, label = two_moons(2000, seed=2, turn=0.8)
    right = {}
    for name in ("default", "teacher"):
        adapters.set_adapter(name, inference_mode=True)
        right[name] = (adapters(x).argmax(1) == label).float().mean().item()
    if rank == 0:
        print(f"accuracy: student {right['default']:.3f}, teacher {right['teacher']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
