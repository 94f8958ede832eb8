"""What users of other averages reach for, and what it is called here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_SHOW = "`with ema.average_parameters():` lets the model compute with the average, then restores it"
_IN_SHARDS = (
    f"the average is kept in shards, not as a second model. {_SHOW}; `ema.copy_to(module)` writes "
    "it into a plain module; `ema.gather_state_dict()` gathers it on rank 0"
)
_ONE_BY_ONE = (
    "a rank holds pieces of the averaged tensors. `ema.gather_tensors()` gathers them whole, one "
    f"by one; {_SHOW}"
)
_SWAP = f"{_SHOW}; `ema.copy_to()` makes the average the live weights for good"

# By attribute: of torch's AveragedModel, diffusers' EMAModel, torch-ema, ema-pytorch and timm, and
# of the class with `shadow`, `apply_shadow()` and `restore()` that so many projects have.
_HINTS = {
    "module": _IN_SHARDS,
    "ema_model": _IN_SHARDS,
    "model": _IN_SHARDS,
    "shadow_params": _ONE_BY_ONE,
    "shadow": _ONE_BY_ONE,
    "parameters": _ONE_BY_ONE,
    "named_parameters": _ONE_BY_ONE,
    "store": _SWAP,
    "restore": _SWAP,
    "apply_shadow": _SWAP,
    "collected_params": _SWAP,
    "temp_stored_params": _SWAP,
    "eval": f"{_SHOW}; call `model.eval()` as ever",
    "forward": f"{_SHOW}; call `model(...)` in the block",
    "update_parameters": "`ema.update()` takes in the weights of the model that it was built with",
    "n_averaged": "`ema.num_updates` counts them",
    "optimization_step": "`ema.step` counts them",
    "cur_decay_value": "`ema.decay` is the decay last applied",
    "get_decay": "`ema.decay` is the decay last applied; a schedule gives those to come",
    "save_pretrained": "`ema.export(path)` writes what `from_pretrained` reads; `ema.save(path)` "
    "what a run resumes from",
    "from_pretrained": "build it with the model, then `ema.load(path)` takes an export too",
    "to": "the average lies beside the weights, or in host memory with device='cpu' at first",
}


def no_attribute(owner: object, name: str) -> AttributeError:
    """The error of a name that is not there, telling the right call if another average has it."""
    hint = f": {_HINTS[name]}" if name in _HINTS else ""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}{hint}"
    return AttributeError(text, name=name, obj=owner)


def no_module(model: Any) -> TypeError:
    """The error of something else than a module in its place."""
    told = (
        f"model is a {type(model).__name__}, wanted the torch.nn.Module that is trained (wrapped "
        "or not)"
    )
    # A generator is not looked into: it would be used up.
    items = [] if isinstance(model, Iterator) else model
    if isinstance(items, list | tuple) and all(isinstance(item, Tensor) for item in items):
        told += (
            ", not its parameters: only the model tells how they are cut and tied. For "
            "diffusers' EMAModel(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay), start_step=1), and update() for step(parameters); for torch-ema's "
            "ExponentialMovingAverage(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay)), and update() for update(parameters)"
        )
    return TypeError(told)
