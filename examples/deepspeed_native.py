r"""DeepSpeed without accelerate: the engine's fp32 masters are averaged, not its bf16 copies.

    torchrun --standalone --nproc_per_node 2 examples/deepspeed_native.py \
        launch/deepspeed/zero2.json

Without a GPU: `DS_ACCELERATOR=cpu torchrun ...`. The engine tells which steps took effect, so
`update()` may be called after every micro-batch.
"""

import os
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dist_ema import HalfLife, ShardedEMA


def noisy_sines(size: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x[:, :4].sin().sum(1, keepdim=True)
    return x, y + noise * torch.randn(size, 1, generator=generator)


def main(config_path: str, directory: str = "runs/deepspeed_native") -> None:
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_path)
    ema = ShardedEMA(engine, HalfLife(steps=10))  # the engine, not the model

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (tensor.to(engine.device) for tensor in batch)
        return mse_loss(engine(x.to(torch.bfloat16)).float(), y)

    size, num_batches = engine.train_micro_batch_size_per_gpu(), 160
    for i in range(num_batches):
        seed = dist.get_world_size() * i + dist.get_rank()
        engine.backward(loss(noisy_sines(size, seed, noise=0.5)))
        engine.step()
        ema.update()

    test = noisy_sines(2048, seed=2**40, noise=0.0)
    with torch.no_grad():
        raw = loss(test).item()
        with ema.average_parameters():
            averaged = loss(test).item()
    ema.save(f"{directory}/ema")
    ema.export(f"{directory}/model", dtype=torch.bfloat16)
    if dist.get_rank() == 0:
        print(f"test loss: raw {raw:.4f}, averaged {averaged:.4f}")
        print(
            f"{num_batches} micro-batches, {ema.step} optimizer steps; averaged are {ema.source}s"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
