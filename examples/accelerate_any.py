"""accelerate, in whatever it is configured for: the average follows real steps and its checkpoints.

    accelerate launch --config_file launch/accelerate/fsdp2-gpu.yaml examples/accelerate_any.py

Without a GPU: as cpu-2.yaml, zero2-cpu.yaml and zero3-cpu.yaml say. `update()` is called for every
batch, and acts after real steps: one in four batches, or as DeepSpeed's own configuration has it.
"""

import sys

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from dist_ema import HalfLife, ShardedEMA
from dist_ema.integrations.accelerate import register


def noisy_sines(size: int, seed: int, noise: float) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x[:, :4].sin().sum(1, keepdim=True)
    return TensorDataset(x, y + noise * torch.randn(size, 1, generator=generator))


def main(directory: str) -> None:
    # On CPU, unless told the backend, accelerate takes every rank of DeepSpeed's for rank 0 of 1.
    handlers = [] if torch.accelerator.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(gradient_accumulation_steps=4, kwargs_handlers=handlers)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
    )
    loader = DataLoader(noisy_sines(3840, seed=1, noise=0.5), batch_size=8, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = ShardedEMA(model, HalfLife(steps=10))  # of what prepare() returned
    register(accelerator, ema)
    dtype = next(model.parameters()).dtype  # DeepSpeed's is bf16, and it takes nothing else

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(model(x.to(dtype)).float(), y)

    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss(x, y))
            optimizer.step()
            optimizer.zero_grad()
        ema.update()

    test = noisy_sines(2048, seed=2, noise=0.0)
    x, y = (tensor.to(accelerator.device) for tensor in test.tensors)

    @torch.no_grad()
    def test_loss() -> float:
        return loss(x, y).item()

    raw = test_loss()
    with ema.average_parameters():
        averaged = test_loss()
    accelerator.save_state(f"{directory}/state")  # with the average, in state/ema
    ema.reset()
    accelerator.load_state(f"{directory}/state")
    with ema.average_parameters():
        loaded = test_loss()
    ema.export(f"{directory}/model")
    accelerator.print(f"{len(loader)} batches on each of {accelerator.num_processes} processes")
    accelerator.print(f"{ema.step} steps; test loss: raw {raw:.4f}, averaged {averaged:.4f}")
    accelerator.print(f"loaded again: {loaded:.4f}; everything is in {directory}")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/accelerate"])
