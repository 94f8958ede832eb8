"""Lightning Trainers over the tiny net, in workers whose process group exists already."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, Dataset

from tests.net import FROZEN, Net, batch_of_tokens, loss_of
from tests.oracle import Oracle
from tests.worlds import rank

NUM_BATCHES = 8  # of an epoch, on each rank
VALIDATION = 500  # number of the first batch of the validation, of which each rank has two


class Tokens(Dataset):
    """Batches that differ by number."""

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Tensor:
        return batch_of_tokens(self._numbers[i])


class Module(LightningModule):
    """A `Net` under automatic optimization; sharded if the strategy has a mesh."""

    def __init__(self, *, seed: int = 0, **net: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net(**net)
        self.sharded = False

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or self.sharded:
            return
        self.sharded = True
        if mesh["tensor_parallel"].size() > 1:
            plan = {"l1": ColwiseParallel(), "l2": RowwiseParallel()}
            for block in self.net.blocks:
                parallelize_module(block, mesh["tensor_parallel"], plan)
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.net(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", loss_of(self.net(batch)), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch)
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        # foreach mixes tensors of several meshes in one call, which DTensor refuses.
        return torch.optim.AdamW(trainable, lr=1e-2, foreach=False)

    def full_weights(self) -> dict[str, Tensor]:
        """Copies of all parameters, whole. Collective."""
        for module in self.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.named_parameters()
        }


class Record(Callback):
    """Full weights at the start, and after every batch in which the module says it stepped."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append(pl_module.full_weights())
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.weights.append(pl_module.full_weights())

    def oracle(self, decay: float) -> Oracle:
        """The float64 average of the weights that train."""
        frozen = {f"net.{name}" for name in FROZEN}
        weights = [{k: v for k, v in w.items() if k not in frozen} for w in self.weights]
        oracle = Oracle(weights[0], decay)
        for now in weights[1:]:
            oracle.update(now)
        return oracle


@dataclass(frozen=True, kw_only=True)
class Under:
    """One strategy, as a row of the tests' table."""

    name: str
    num_ranks: int
    strategy: str  # "ddp", "model_parallel" or "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    model_parallel: int = 1  # neighbouring ranks that see the same data
    net: Mapping[str, Any] = field(default_factory=dict)

    def trainer(self, path: Path, *callbacks: Callback, **options: Any) -> Trainer:
        strategy: Any = "auto"
        if self.strategy == "ddp":
            strategy = DDPStrategy(process_group_backend="gloo", **self.options)
        elif self.strategy == "model_parallel":
            strategy = ModelParallelStrategy(process_group_backend="gloo", **self.options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trainer(
                default_root_dir=path,
                accelerator="cpu",
                strategy=strategy,
                devices=max(self.num_ranks, 1),
                callbacks=list(callbacks),
                enable_progress_bar=False,
                enable_model_summary=False,
                # Lightning's own deals batches out in another order after resuming.
                use_distributed_sampler=False,
                **{"max_epochs": 1, "enable_checkpointing": False, "logger": False, **options},
            )

    def module(self, *, seed: int = 0) -> Module:
        return Module(seed=seed, **self.net)

    def batches(self, num: int = NUM_BATCHES, *, first: int = 100) -> Any:
        """This rank's own."""
        start = first + num * (rank() // self.model_parallel)
        return DataLoader(Tokens(range(start, start + num)), batch_size=None)

    def validation(self) -> Any:
        return self.batches(2, first=VALIDATION)

    def plain_loss(self, state: Mapping[str, Tensor]) -> Tensor:
        """The loss of a plain net with these weights, over the validation of all ranks."""
        net = self.plain(state)
        num_batches = 2 * max(self.num_ranks, 1) // self.model_parallel
        numbers = range(VALIDATION, VALIDATION + num_batches)
        with torch.no_grad():
            return torch.stack([loss_of(net(batch_of_tokens(n))) for n in numbers]).mean()

    def plain(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The bare net with the weights of a state dict of `Module`."""
        net = Net(**self.net)
        net.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
        return net.eval()


SHARDED = {"data_parallel_size": 2, "tensor_parallel_size": 1}
FULL = {"save_distributed_checkpoint": False}
TP_NET = {"hidden": 10}

STRATEGIES = [
    Under(name="alone", num_ranks=0, strategy="auto", net={"scalar_dims": 0}),
    Under(name="ddp", num_ranks=2, strategy="ddp", net={"scalar_dims": 0}),
    Under(name="fsdp2", num_ranks=2, strategy="model_parallel", options=SHARDED),
    Under(name="fsdp2_full", num_ranks=2, strategy="model_parallel", options={**SHARDED, **FULL}),
    Under(
        name="fsdp2_tp",
        num_ranks=4,
        strategy="model_parallel",
        options={"data_parallel_size": 2, "tensor_parallel_size": 2},
        model_parallel=2,
        net=TP_NET,
    ),
]


def under(*names: str) -> pytest.MarkDecorator:
    """Run the body, which takes `under`, with each of these strategies, all of them if none."""
    rows = [row for row in STRATEGIES if row.name in names or not names]
    params = [pytest.param(row, row.num_ranks, id=row.name) for row in rows]
    return pytest.mark.parametrize(("under", "num_ranks"), params)
