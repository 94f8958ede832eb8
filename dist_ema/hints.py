"""What users of other averages reach for, and what it is called here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
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
    "ema": _IN_SHARDS,
    "averaged_model": _IN_SHARDS,
    "shadow_params": _ONE_BY_ONE,
    "shadow": _ONE_BY_ONE,
    "state": _ONE_BY_ONE,
    "parameters": _ONE_BY_ONE,
    "named_parameters": _ONE_BY_ONE,
    "store": _SWAP,
    "restore": _SWAP,
    "apply_shadow": _SWAP,
    "collected_params": _SWAP,
    "temp_stored_params": _SWAP,
    "eval": f"{_SHOW}; call `model.eval()` as ever",
    "forward": f"{_SHOW}; call `model(...)` in the block",
    "set": "`ema.load(path)` reads an average; `ema.reset()` starts from the live weights",
    "copy_params_from_model_to_ema": "`ema.reset()` starts from the live weights",
    "copy_params_from_ema_to_model": _SWAP,
    "update_bn": "`from dist_ema import update_bn`; `update_bn(loader, ema.model)` in the block of "
    "`with ema.average_parameters():`",
    "num_averaged": "`ema.num_updates` counts them",
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


# Endings of files that `torch.save` writes.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")

# By keyword of the constructor: of the same libraries.
_KEYWORDS = {
    "use_buffers": 'buffers="average"',
    "include_online_model": "nothing: the model that is trained is never copied or saved",
    "beta": "decay",
    "momentum": "decay=1 - momentum",
    "half_life": "decay=HalfLife(steps)",
    "halflife": "decay=HalfLife(steps)",
    "smoothing": "decay",
    "avg_fn": "multi_avg_fn, which takes lists of tensors",
    "use_ema_warmup": "decay=Warmup(decay, inv_gamma, power)",
    "use_warmup": "decay=Warmup(decay, inv_gamma, power)",
    "use_num_updates": "decay=Warmup(decay)",
    "inv_gamma": "decay=Warmup(decay, inv_gamma, power)",
    "power": "decay=Warmup(decay, inv_gamma, power)",
    "min_decay": "decay=lambda t, delta: max(min_decay, schedule(t, delta))",
    "min_value": "decay=lambda t, delta: max(min_value, schedule(t, delta))",
    "update_after_step": "start_step=update_after_step + 1",
    "update_every_n_steps": "update_every",
    "update_interval": "update_every, in steps",
    "ema_model": "into=, for a second module that becomes the average",
    "model_cls": "nothing: pass the model; export() writes its config",
    "foreach": "nothing: weights are always updated together",
}


def no_keyword(names: Iterable[str]) -> TypeError:
    """The error of keywords that the constructor does not take, naming the right one if known."""
    told = [f"{n!r} ({_KEYWORDS[n]} here)" if n in _KEYWORDS else repr(n) for n in names]
    return TypeError(f"ShardedEMA() got unexpected keyword arguments: {', '.join(told)}")


def no_call() -> TypeError:
    """The error of calling the average as a module."""
    return TypeError(f"an average is not called: {_HINTS['forward']}")


def no_name(name: object, names: list[str]) -> ValueError:
    """The error of something in the place of an average's name."""
    if isinstance(name, str):
        return ValueError(f"no average is named {name!r}; there is {names}")
    return ValueError(
        f"name is a {type(name).__name__}, wanted the name of an average, one of {names}; neither "
        "parameters nor a model are passed: the average knows the model that it was built with"
    )


def no_safetensors(path: Path) -> str:
    """What to do with a file that `torch.save` wrote."""
    return (
        f"{path}: is a pickle file by its name, which is not read since a pickle can run code. "
        f"Convert it once: state = torch.load({str(path)!r}, weights_only=True), take the averaged "
        "state dict out of it (often state['state_dict_ema'] or state['ema']), and write "
        "safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "
        "'ema.safetensors'); then ema.load('ema.safetensors', step=...)"
    )


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
