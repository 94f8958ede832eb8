"""An average under accelerate: only real steps count, and its checkpoints hold the average.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = ShardedEMA(model, decay=0.9999)
    register(accelerator, ema)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
    accelerator.save_state("run/checkpoint")

[Note: real steps]
A DeepSpeed engine counts its applied steps, which `update()` reads. Elsewhere a step is real if
accelerate synchronized gradients and the optimizer did not skip. Both flags hold until the next
`accumulate` block, so `update()` may be called inside the block or after it. Two limits:

- With fp16 and a fused optimizer, accelerate does not report a step that overflowed. The weights
  do not change then, and the average counts one step more.
- Without `accelerator.accumulate`, accelerate synchronizes gradients in every iteration. Call
  `update()` only after `optimizer.step()` then.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.core.names import is_instance, unwrap
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.base import is_there

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


def register(
    accelerator: Accelerator,
    ema: ShardedEMA,
    *,
    name: str = "ema",
    optimizer: AcceleratedOptimizer | None = None,
) -> None:
    """Let an average count real steps only, and be part of accelerate's checkpoints.

    `ema.update()` does nothing from now on in iterations that only accumulate gradients or whose
    step was skipped, see [Note: real steps]. `accelerator.save_state(path)` writes the average to
    `path/name` as `ema.save` does; `accelerator.load_state(path)` reads it on any number of
    processes.

    Only a weak reference to the average is kept: without another one, checkpoints do not contain
    it, with a warning. After `accelerator.free_memory()` the name is free again, so that a function
    under `find_executable_batch_size` can register the average of each try.

    `register` is local. `save_state` and `load_state` become collective: every rank calls them, on
    a shared file system. They raise what `ShardedEMA.save` and `ShardedEMA.load` raise, and a
    `CheckpointError` if the checkpoint has no average.

    Args:
        accelerator: the one whose `prepare` returned the averaged model.
        name: directory in each checkpoint; each registered average needs its own.
        optimizer: the prepared optimizer of this model, where one accelerator trains several
            models. None: a step that any optimizer skips does not count.

    Raises:
        TypeError: `accelerator` or `ema` is something else.
        ValueError: `name` is taken or is not a directory name; `ema` is registered already;
            `optimizer` or the model was not prepared by this accelerator.
    """
    if not is_instance(accelerator, "accelerate.accelerator", "Accelerator"):
        raise TypeError(f"accelerator is a {type(accelerator).__name__}, wanted an Accelerator")
    if not isinstance(ema, ShardedEMA):
        raise TypeError(
            f"ema is a {type(ema).__name__}, wanted a ShardedEMA of what prepare() returned"
        )
    if optimizer is not None and not hasattr(optimizer, "step_was_skipped"):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, wanted what accelerator.prepare() returned"
        )
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
            if other.is_active():
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
        self.prepared = None if prepared is None else weakref.ref(prepared)
        self.hooks = (
            accelerator.register_save_state_pre_hook(self.save),
            accelerator.register_load_state_pre_hook(self.load),
        )

    def __call__(self) -> bool:
        """Whether an optimizer step has just happened."""
        if self.optimizer is None:
            skipped = self.accelerator.optimizer_step_was_skipped
        else:
            skipped = self.optimizer.step_was_skipped
        return self.accelerator.sync_gradients and not skipped

    def is_active(self) -> bool:
        """Whether the average exists and the accelerator has not released its model."""
        return self.ema() is not None and (self.prepared is None or self._is_held())

    def _is_held(self) -> bool:
        return self.prepared is not None and any(
            model is self.prepared() for model in self.accelerator._models
        )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if (ema := self.ema()) is not None:
            ema.gate = None

    def save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        if (ema := self._average()) is not None:
            ema.save(Path(output_dir) / self.name)

    def load(self, models: list[Any], input_dir: str) -> None:
        if (ema := self._average()) is not None:
            if not is_there(ema, path := Path(input_dir) / self.name):
                raise CheckpointError(
                    f"{path}: this checkpoint was saved without the average; load the state before "
                    "register(), call ema.reset() to start from the loaded weights, then register()"
                )
            ema.load(path)

    def _average(self) -> ShardedEMA | None:
        """The average, if every rank still has it. Collective: every rank calls it."""
        ema = self.ema()
        if not self.group.any(ema is None):
            return ema
        if self._is_held():
            warnings.warn(
                f"the average that was registered as {self.name!r} is in no checkpoint any more: "
                "nobody holds it; keep the ShardedEMA for as long as the model is trained",
                stacklevel=4,  # the caller of save_state() or load_state()
            )
        return None
