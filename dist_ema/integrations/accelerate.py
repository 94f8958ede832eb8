"""An average under accelerate: `register(accelerator, ema)` after `accelerator.prepare(...)`."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from dist_ema.core.errors import CheckpointError
from dist_ema.core.names import unwrap
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.base import load_from


def register(
    accelerator: Accelerator,
    ema: ShardedEMA,
    *,
    name: str = "ema",
    optimizer: AcceleratedOptimizer | None = None,
) -> None:
    """Let an average count real steps only, and be part of accelerate's checkpoints. Local.

    `ema.update()` then does nothing where gradients only accumulate or the optimizer skipped its
    step; call it before the next `accumulate` block opens. With fp16 and a fused optimizer,
    accelerate does not report a skipped step, which counts. `accelerator.save_state(path)` calls
    `ema.save(path/name)`, and `load_state` loads it or raises a `CheckpointError`: both become
    collective. Only a weak reference to the average is kept; `free_memory()` frees its name.

    Args:
        accelerator: the one whose `prepare` returned the averaged model.
        name: directory in each checkpoint; each registered average needs its own.
        optimizer: the prepared optimizer whose steps count. None: a step counts if none skipped it.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator is a {type(accelerator).__name__}, wanted an Accelerator")
    if not isinstance(ema, ShardedEMA):
        wanted = "a ShardedEMA of what prepare() returned"
        raise TypeError(f"ema is a {type(ema).__name__}, wanted {wanted}")
    if not isinstance(optimizer, AcceleratedOptimizer | None):
        wanted = "what accelerator.prepare() returned"
        raise ValueError(f"optimizer is a {type(optimizer).__name__}, wanted {wanted}")
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"name is {name!r}, wanted that of a directory in each checkpoint")
    if isinstance(ema.gate, _Registration):
        which = "this" if ema.gate.accelerator is accelerator else "another"
        raise ValueError(
            f"this average is registered as {ema.gate.name!r} with {which} accelerator already; "
            "register each ShardedEMA once, with the accelerator that prepared its model"
        )
    model, models = unwrap(ema.model), accelerator._models
    prepared = next((m for m in models if unwrap(m) is model), None)
    if models and prepared is None:
        raise ValueError(
            f"ema averages a {type(model).__name__} that this accelerator has not prepared; it has "
            f"prepared: {', '.join(type(unwrap(m)).__name__ for m in models)}; average what "
            "prepare() returned, and register with that accelerator"
        )
    for hook in list(accelerator._save_model_state_pre_hook.values()):
        other = getattr(hook, "__self__", None)
        if isinstance(other, _Registration) and other.name == name:
            gc.collect()  # an average without references may remain in a cycle
            if other.ema() is not None and other.is_held():
                raise ValueError(
                    f"an average is registered as {name!r} with this accelerator already; give "
                    "each its own name=, or drop that one and call accelerator.free_memory() before"
                )
            other.remove()
    ema.gate = _Registration(accelerator, ema, name, optimizer, prepared)


class _Registration:
    """The gate of an average and its hooks in an accelerator, which hold the average weakly."""

    def __init__(
        self, accelerator: Accelerator, ema: ShardedEMA, name: str, optimizer: Any, prepared: Any
    ) -> None:
        self.accelerator, self.name, self.optimizer = accelerator, name, optimizer
        self.ema, self.group = weakref.ref(ema), ema.group
        self.model = None if prepared is None else weakref.ref(prepared)
        self.hooks = (
            accelerator.register_save_state_pre_hook(self.save),
            accelerator.register_load_state_pre_hook(self.load),
        )

    def __call__(self) -> bool:
        """Whether an optimizer step has just happened."""
        skipped = self.accelerator.optimizer_step_was_skipped
        if self.optimizer is not None:
            skipped = self.optimizer.step_was_skipped
        return self.accelerator.sync_gradients and not skipped

    def is_held(self) -> bool:
        """Whether the accelerator has not released the model."""
        models = self.accelerator._models
        return self.model is None or any(model is self.model() for model in models)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if (ema := self.ema()) is not None:
            ema.gate = None

    def save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        if (ema := self._average()) is not None:
            ema.save(Path(output_dir) / self.name)

    def load(self, models: list[Any], input_dir: str) -> None:
        path, ema = Path(input_dir) / self.name, self._average()
        if ema is not None and not load_from(ema, path):
            raise CheckpointError(
                f"{path}: this checkpoint was saved without the average; load the state before "
                "register(), call ema.reset() to start from the loaded weights, then register()"
            )

    def _average(self) -> ShardedEMA | None:
        """The average, if every rank still has it. Collective: every rank calls it."""
        ema = self.ema()
        if not self.group.any(ema is None):
            return ema
        if self.is_held():
            text = f"the average registered as {self.name!r} is in no checkpoint any more: nobody "
            text += "holds it; keep the ShardedEMA for as long as the model is trained"
            warnings.warn(text, stacklevel=4)  # the caller of save_state() or load_state()
        return None
