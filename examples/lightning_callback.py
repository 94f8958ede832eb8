"""Lightning: one callback averages, validates with the average, saves and resumes it.

python examples/lightning_callback.py     two processes; Lightning starts the second itself
"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from dist_ema import HalfLife
from dist_ema.integrations.lightning import EMACallback


def noisy_sines(size: int, seed: int, noise: float) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = x[:, :4].sin().sum(1, keepdim=True)
    return TensorDataset(x, y + noise * torch.randn(size, 1, generator=generator))


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def trainer(directory: str, **options: object) -> Trainer:
    return Trainer(
        default_root_dir=directory,
        strategy="ddp",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def main(directory: str) -> None:
    torch.manual_seed(0)
    train = DataLoader(noisy_sines(6400, seed=1, noise=0.5), batch_size=32, shuffle=True)
    test = DataLoader(noisy_sines(2048, seed=2, noise=0.0), batch_size=256)
    model, average = Regression(), EMACallback(HalfLife(steps=10))

    first = trainer(directory, max_epochs=1, callbacks=[average])
    first.fit(model, train, test)
    averaged = first.callback_metrics["loss"]
    first.save_checkpoint(f"{directory}/last.ckpt")  # the live weights and the average
    raw = trainer(directory).validate(model, test, verbose=False)[0]["loss"]

    again = trainer(directory, max_epochs=2, callbacks=[resumed := EMACallback(HalfLife(steps=10))])
    again.fit(Regression(), train, test, ckpt_path=f"{directory}/last.ckpt")
    if first.is_global_zero:
        print(f"test loss after epoch 1: raw {raw:.4f}, averaged {averaged:.4f}")
        loss = again.callback_metrics["loss"]
        print(f"resumed at step {average.ema.step}, now {resumed.ema.step}: averaged {loss:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/lightning"])
