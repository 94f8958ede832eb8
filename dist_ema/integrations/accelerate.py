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
from dist_ema.core.names import Models, as_module, unwrap
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
    collective. Only a weak reference to the average is kept; after `free_memory()`, its name can be
    registered again. accelerate logs what you pass to `accelerator.log`: `ema.decay`,
    `ema.drift()`.

    Args:
        accelerator: the one whose `prepare` returned the averaged model or models.
        name: directory in each checkpoint; each registered average needs its own.
        optimizer: the prepared optimizer whose steps count. None: a step counts if none skipped it.
    """
    for label, value, kind, wanted in (
        ("accelerator", accelerator, Accelerator, "an Accelerator"),
        ("ema", ema, ShardedEMA, "a ShardedEMA of what prepare() returned"),
        ("optimizer", optimizer, AcceleratedOptimizer | None, "what prepare() returned"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{label} is a {type(value).__name__}, wanted {wanted}")
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"name is {name!r}, wanted that of a directory in each checkpoint")
    if isinstance(ema.gate, _Registration):
        raise ValueError(
            f"this average is registered as {ema.gate.name!r} already; register each ShardedEMA "
            "once, with the accelerator that prepared its model"
        )
    model, known = as_module(ema.model), {id(unwrap(m)): m for m in accelerator._models}
    averaged = [unwrap(m) for m in (model.children() if isinstance(model, Models) else [model])]
    if missing := [m for m in averaged if id(m) not in known] if known else []:
        raise ValueError(
            f"ema averages a {type(missing[0]).__name__} that this accelerator has not prepared; "
            f"it has prepared: {', '.join(type(unwrap(m)).__name__ for m in known.values())}; "
            "average what prepare() returned, and register with that accelerator"
        )
    registered: dict[str, _Registration] = vars(accelerator).setdefault("_dist_ema", {})
    if (other := registered.get(name)) is not None:
        gc.collect()  # an average without references may remain in a cycle
        if other.ema() is not None and other.is_held():
            raise ValueError(
                f"an average is registered as {name!r} with this accelerator already; give each "
                "its own name=, or delete that one and call accelerator.free_memory() first"
            )
        for hook in other.hooks:
            hook.remove()
        if (old := other.ema()) is not None:
            old.gate = None
    ema.gate = registered[name] = _Registration(accelerator, ema, name, optimizer)
    ema.gate.models = [weakref.ref(known[id(m)]) for m in averaged if known]


class _Registration:
    """The gate of an average and its hooks in an accelerator, which hold the average weakly."""

    def __init__(self, accelerator: Accelerator, ema: ShardedEMA, name: str, optimizer: Any):
        self.accelerator, self.name, self.optimizer = accelerator, name, optimizer
        self.ema, self.group = weakref.ref(ema), ema.group
        self.models: list[weakref.ref[Any]] = []  # as the accelerator has prepared them
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
        """Whether the accelerator has not released the models."""
        kept = [id(model) for model in self.accelerator._models]
        return all(id(model()) in kept for model in self.models)

    def save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        if (ema := self._average("accelerator.save_state()")) is not None:
            ema.save(Path(output_dir) / self.name)

    def load(self, models: list[Any], input_dir: str) -> None:
        path = Path(input_dir) / self.name
        ema = self._average("accelerator.load_state()")
        if ema is not None and not load_from(ema, path):
            raise CheckpointError(
                f"{path}: this checkpoint was saved without the average; load the state before "
                "register(), call ema.reset() to start from the loaded weights, then register()"
            )

    def _average(self, call: str) -> ShardedEMA | None:
        """The average, if every rank has it; else warns the caller of the hook. Collective."""
        ema = self.ema()
        with self.group.together(call):  # where ranks that do not make the call are named
            pass
        if not self.group.any(ema is None):
            return ema
        if self.is_held():
            text = "is in no checkpoint any more: nobody holds it; keep the ShardedEMA"
            warnings.warn(f"the average registered as {self.name!r} {text}", stacklevel=4)
        return None
