"""An average under accelerate: real steps count, and its checkpoints carry the average.

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

[Note: what a real step is]
Under DeepSpeed its engine counts the steps that it applied, which `update()` reads by itself.
Elsewhere accelerate tells: gradients were synchronised in this iteration, and the optimizer did not
skip its step. Both stay as they are until the next `accumulate` block opens, so `update()` may be
called in the block after `optimizer.step()`, or after it. What accelerate does not know:

- With fp16 and a fused optimizer, a step that overflows is not reported as skipped (the fused
  kernel itself leaves the weights alone). The average then takes the unchanged weights in once
  more, and counts a step. With any other optimizer such a step is not counted.
- Gradients that are accumulated without `accelerator.accumulate` are synchronised in every
  iteration; call `update()` only after `optimizer.step()` then.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ema.core.names import is_instance, unwrap
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.beside import load_beside

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

_REMEDY = (
    "load the state before register(), call ema.reset() to start from the loaded weights, and "
    "register() then"
)


@dataclass(frozen=True)
class _Registration:
    """Refers weakly to what it is about, so that `free_memory()` does free the average's model."""

    ema: weakref.ref[ShardedEMA]
    prepared: weakref.ref[Any] | None  # what accelerate held of the model then
    hooks: tuple[Any, ...]

    def is_over(self, accelerator: Accelerator) -> bool:
        """Whether nobody has the average any more, or accelerate has let go of its model."""
        if self.ema() is None:
            return True
        return self.prepared is not None and not _holds(accelerator, self.prepared)

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if (ema := self.ema()) is not None:
            ema._gate = None


_registered: weakref.WeakKeyDictionary[Any, dict[str, _Registration]] = weakref.WeakKeyDictionary()


def register(
    accelerator: Accelerator,
    ema: ShardedEMA,
    *,
    name: str = "ema",
    optimizer: AcceleratedOptimizer | None = None,
) -> None:
    """Let an average count real steps only, and be part of accelerate's checkpoints.

    From now on `ema.update()` does nothing in iterations that only accumulate gradients and in
    those whose step was skipped (see [Note: what a real step is]). `accelerator.save_state(path)`
    writes the average to `path/name`, each rank what it owns, as `ema.save` does: replaced at one
    instant if it is there already, and gone with the directory when `total_limit` removes it.
    `accelerator.load_state(path)` reads it back, whatever the number of processes.

    A registration is over when `accelerator.free_memory()` has let go of the model, and the name
    is free again then: a function under `find_executable_batch_size` registers the average of each
    try. It holds the average no longer than the caller does: keep the average, or a checkpoint will
    have none, with a warning.

    `register` itself is local. `save_state` and `load_state` become collective where they are not:
    every rank calls them, and sees one file system.

    Args:
        accelerator: the one whose `prepare` returned the model that is averaged.
        name: of the directory in each checkpoint; another for each average that is registered.
        optimizer: the prepared optimizer of this model, where several models are trained with one
            accelerator; None: a step skipped by any optimizer does not count.

    Raises:
        TypeError: `accelerator` or `ema` is something else.
        ValueError: `name` is taken, or names no directory; `ema` is registered already, with this
            accelerator or another; `optimizer` was not prepared, or the model was not while others
            were.

    `load_state` raises `CheckpointError` if the checkpoint has no average, and `save_state` and
    `load_state` raise what `ShardedEMA.save` and `ShardedEMA.load` do.
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
    own = unwrap(ema._average.model)
    prepared = next((weakref.ref(m) for m in accelerator._models if unwrap(m) is own), None)
    if prepared is None and accelerator._models:
        theirs = ", ".join(type(unwrap(m)).__name__ for m in accelerator._models)
        raise ValueError(
            f"ema averages a {type(own).__name__} that this accelerator has not prepared; it has "
            f"prepared: {theirs}; average what prepare() returned, and register with that "
            "accelerator"
        )
    names = _registered.setdefault(accelerator, {})
    _refuse_again(accelerator, ema)
    if name in names:
        gc.collect()  # an average that nobody has any more may be left in a cycle
        if not names[name].is_over(accelerator):
            raise ValueError(
                f"an average is registered as {name!r} with this accelerator already; give each "
                "its own name=, or let go of that one and call accelerator.free_memory() before"
            )
        names.pop(name).release()
    owner, ranks = weakref.ref(ema), ema._group

    def stepped() -> bool:
        if not accelerator.sync_gradients:
            return False
        if optimizer is not None:
            return not optimizer.step_was_skipped
        return not accelerator.optimizer_step_was_skipped

    def averaged() -> ShardedEMA | None:
        """The average, if every rank still has it. Collective: every rank calls it."""
        ema = owner()
        if not ranks.any(ema is None):
            return ema
        if prepared is not None and _holds(accelerator, prepared):
            warnings.warn(
                f"the average that was registered as {name!r} is in no checkpoint any more: nobody "
                "holds it; keep the ShardedEMA for as long as the model is trained",
                stacklevel=4,  # who calls save_state() or load_state()
            )
        return None

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if (ema := averaged()) is not None:
            ema.save(Path(output_dir) / name)

    def load(models: list[Any], input_dir: str) -> None:
        if (ema := averaged()) is not None:
            load_beside(ema, Path(input_dir) / name, _REMEDY)

    ema._gate = stepped
    hooks = (
        accelerator.register_save_state_pre_hook(save),
        accelerator.register_load_state_pre_hook(load),
    )
    names[name] = _Registration(owner, prepared, hooks)


def _holds(accelerator: Accelerator, model: weakref.ref[Any]) -> bool:
    """Whether accelerate has not let go of a model that it prepared."""
    return any(m is model() for m in accelerator._models)


def _refuse_again(accelerator: Accelerator, ema: ShardedEMA) -> None:
    """Raise if an average is registered already."""
    for other, registrations in _registered.items():
        for name, registration in registrations.items():
            if registration.ema() is ema:
                whose = "this" if other is accelerator else "another"
                raise ValueError(
                    f"this average is registered as {name!r} with {whose} accelerator already; "
                    "register each ShardedEMA once, with the accelerator that prepared its model"
                )
