"""A trainer in the shape of torchtitan's, with the average in its asynchronous checkpoint.

    torchrun --standalone --nproc_per_node 4 examples/torchtitan_like.py 2      # pipeline stages
    torchrun --standalone --nproc_per_node 4 examples/torchtitan_like.py 4 2    # two on each rank

Each goes on where the one before it stopped. Weights, optimizers, average and step counter are one
request of torch.distributed.checkpoint. The average that torchtitan itself has saved is loaded by
`ema.load("checkpoint/step-1000")`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pipeline import Pipeline
from torch import nn
from torch.distributed.checkpoint import state_dict as named

from dist_ema import HalfLife, ShardedEMA


class Optimizers:
    """An optimizer for each part of the model, with one state dict that has the weights' names."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.pairs = [(part, torch.optim.AdamW(part.parameters(), lr=1e-2)) for part in parts]
        self.options = named.StateDictOptions(flatten_optimizer_state_dict=True)

    def step(self) -> None:
        for _, optimizer in self.pairs:
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        states = [named.get_optimizer_state_dict(*p, options=self.options) for p in self.pairs]
        return {key: value for state in states for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for pair in self.pairs:
            named.set_optimizer_state_dict(*pair, optim_state_dict=state, options=self.options)


class Trainer:
    def __init__(self, num_stages: int, per_rank: int, folder: Path) -> None:
        self.pipeline, self.folder = Pipeline(num_stages, per_rank), folder
        self.model_parts = self.pipeline.parts
        self.optimizers = Optimizers(self.model_parts)
        self.ema = ShardedEMA(self.model_parts, HalfLife(fraction=0.05))
        self.step, self.saving = 0, None
        self.group = dist.new_group(backend="gloo")  # for saves in the background

    def states(self) -> dict[str, Any]:
        weights = {k: v for part in self.model_parts for k, v in part.state_dict().items()}
        return {**weights, "optimizer": self.optimizers, "ema": self.ema, "train_state": self}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def load(self) -> None:
        if steps := [int(p.parent.name[5:]) for p in self.folder.glob("step-*/.metadata")]:
            dcp.load(self.states(), checkpoint_id=self.folder / f"step-{max(steps)}")

    def save(self) -> None:
        path = self.folder / f"step-{self.step}"
        self.wait()  # for the last one
        self.saving = dcp.async_save(self.states(), checkpoint_id=path, process_group=self.group)

    def wait(self) -> None:
        if self.saving is not None:
            self.saving.result()

    def train(self, num_steps: int) -> None:
        last = self.step + num_steps
        while self.step < last:
            self.step += 1
            self.pipeline.run(self.step)
            self.optimizers.step()
            self.ema.update()
            if self.step % 10 == 0:
                self.save()
        self.wait()


def main(num_stages: str, per_rank: str = "1", folder: str = "runs/torchtitan_like") -> None:
    trainer = Trainer(int(num_stages), int(per_rank), Path(folder))
    trainer.load()
    start = trainer.step
    trainer.train(num_steps=20)
    raw = trainer.pipeline.run(10**6, 512, train=False)
    with trainer.ema.average_parameters():
        averaged = trainer.pipeline.run(10**6, 512, train=False)
    trainer.ema.export(trainer.folder / "model")
    if trainer.pipeline.is_last and trainer.pipeline.seed == 0:
        print(
            f"steps {start} to {trainer.step}, the average stands at {trainer.ema.step}, ", end=""
        )
        print(f"test loss: raw {raw:.4f}, averaged {averaged:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["1"])
