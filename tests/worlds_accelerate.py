"""Trainings under accelerate, one for each engine that it drives, on the workers of the pool.

[Note: accelerate without a GPU]
accelerate shards with FSDP only where it finds accelerators: on CPU it would fall back to DDP in
silence. The session for FSDP tells it that there are several devices whose name is "cpu"; all that
comes after is its own code. What it keeps in the process and its environment is undone at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.net import Net, batch_of_tokens, loss_of
from tests.worlds import Ddp, Engine, Fsdp2, Plain, evaluate, rank
from tests.worlds_deepspeed import BF16, Zero, configuration, library
from tests.worlds_fsdp1 import Fsdp1

ENGINES: dict[str, Engine] = {
    "alone": Plain(),
    "ddp": Ddp(),
    "fsdp1": Fsdp1(),
    "fsdp2": Fsdp2(),
    "zero2": Zero(stage=2, **BF16),
    "zero3": Zero(stage=3, **BF16),
}


CUT_BY = {
    "alone": "PlainEngine",
    "ddp": "PlainEngine",
    "fsdp1": "Fsdp1Engine",
    "fsdp2": "DTensorEngine",
    "zero2": "ZeroEngine",
    "zero3": "ZeroEngine",
}


class Session:
    """A `Net` in training under an accelerator, as a user would hold it."""

    def __init__(self, kind: str, accelerator: Any, seed: int, fused: bool) -> None:
        self.engine, self.accelerator = ENGINES[kind], accelerator
        torch.manual_seed(seed)
        self.net = Net()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        if kind == "fsdp1":
            # accelerate 1.15 does not load the state of a fresh optimizer there; this one has none.
            optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=fused)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(self.net, optimizer)

    def micro_step(self, i: int, scale: float = 1.0) -> None:
        """One batch of this rank: a step of the optimizer if accelerate finds that it is time."""
        self.model.train()
        with self.accelerator.accumulate(self.model):
            loss = loss_of(self.model(batch_of_tokens(100 + 10 * i + rank())))
            self.accelerator.backward(scale * loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def full_weights(self) -> dict[str, Tensor]:
        """Copies of all parameters, whole, as the engine itself reads them. Collective."""
        self.engine.settle(self)
        return self.engine.full_weights(self)

    def evaluate(self) -> Tensor:
        return evaluate(self.model).float()


@contextmanager
def several_devices_named_cpu() -> Iterator[None]:
    """While an accelerator is built in it; see [Note: accelerate without a GPU]."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    several = ("gloo", DistributedType.MULTI_GPU)
    with mock.patch.object(PartialState, "_prepare_backend", lambda *_: several):
        yield


@contextmanager
def accelerated(
    kind: str,
    *,
    accumulate: int = 1,
    seed: int = 0,
    scales: bool = False,
    fused: bool = False,
    **options: Any,
) -> Iterator[Session]:
    """A session, and as if accelerate had never been used once it ends.

    Args:
        scales: whether gradients are scaled as for fp16, which accelerate does on a GPU only.
        fused: whether the optimizer is.
        options: of `Accelerator`.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    options |= {"gradient_accumulation_steps": accumulate}
    with mock.patch.dict(os.environ):
        try:
            if kind.startswith("fsdp"):
                with several_devices_named_cpu():
                    accelerator = Accelerator(fsdp_plugin=_fsdp_plugin(kind), **options)
            elif kind.startswith("zero"):
                library()
                options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
                bf16 = {"enabled": True, "check_grad_overflow": True}
                steps = {"gradient_accumulation_steps": accumulate}
                config = configuration(int(kind[-1]), bf16=bf16, **steps)
                options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
                accelerator = Accelerator(mixed_precision="bf16", **options)
            else:
                accelerator = Accelerator(cpu=True, **options)
            if scales:
                accelerator.scaler = torch.amp.GradScaler("cpu")
            yield Session(kind, accelerator, seed, fused)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def _fsdp_plugin(kind: str) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=int(kind[-1]),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
        **({"use_orig_params": True} if kind == "fsdp1" else {}),
    )
