"""Hints for users of other averages: what their attributes, arguments and calls are named here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")  # suffixes of files of `torch.save`

_SWAP = "`with ema.average_parameters():` lets the model compute with the average, then restores it"
_COPY = f"{_SWAP}; `ema.copy_to()` makes the average the live weights permanently"
_MODULE = (
    f"the average is kept in shards, not as a second model. {_SWAP}; `ema.copy_to(module)` writes "
    "it into a plain module; `ema.gather_state_dict()` gathers it on rank 0"
)
_TENSORS = (
    "a rank holds only parts of the averaged tensors. `ema.gather_tensors()` gathers whole tensors "
    f"one by one; {_SWAP}"
)
# Attributes of torch's AveragedModel, diffusers' EMAModel, torch-ema, ema-pytorch and timm, and of
# the class with `shadow`, `apply_shadow()` and `restore()` that many projects have.
_ATTRIBUTES = {
    **dict.fromkeys(("module", "ema_model", "ema", "averaged_model"), _MODULE),
    **dict.fromkeys(
        ("shadow_params", "shadow", "state", "parameters", "named_parameters"), _TENSORS
    ),
    **dict.fromkeys(("store", "restore", "apply_shadow", "collected_params"), _COPY),
    **dict.fromkeys(("temp_stored_params", "copy_params_from_ema_to_model"), _COPY),
    "eval": f"{_SWAP}; call `model.eval()` as usual",
    "forward": f"{_SWAP}; call `model(...)` in the block",
    "set": "`ema.load(path)` reads an average; `ema.reset()` starts from the live weights",
    "copy_params_from_model_to_ema": "`ema.reset()` starts from the live weights",
    "update_bn": "`from dist_ema import update_bn`; `update_bn(loader, ema.model)` in the block of "
    "`with ema.average_parameters():`",
    "update_parameters": "`ema.update()` averages the weights of the model it was built with",
    **dict.fromkeys(("num_averaged", "n_averaged"), "`ema.num_updates` counts updates"),
    "optimization_step": "`ema.step` counts optimizer steps",
    **dict.fromkeys(("cur_decay_value", "get_decay"), "`ema.decay` is the last decay applied"),
    "save_pretrained": "`ema.export(path)` writes what `from_pretrained` reads; `ema.save(path)` "
    "what a run resumes from",
    "from_pretrained": "build it with the model, then `ema.load(path)` reads an export too",
    "to": "the average is beside the weights, or in host memory if built with device='cpu'",
}
# Arguments of the constructors of the same libraries.
_ARGUMENTS = {
    "use_buffers": 'buffers="average"',
    "include_online_model": "nothing: the trained model is never copied or saved",
    **dict.fromkeys(("beta", "smoothing"), "decay"),
    "momentum": "decay=1 - momentum",
    **dict.fromkeys(("half_life", "halflife"), "decay=HalfLife(steps)"),
    "avg_fn": "multi_avg_fn, which takes lists of tensors",
    **dict.fromkeys(
        ("use_ema_warmup", "use_warmup", "inv_gamma", "power"),
        "decay=Warmup(decay, inv_gamma, power)",
    ),
    "use_num_updates": "decay=Warmup(decay)",
    "min_decay": "decay=lambda t, delta: max(min_decay, schedule(t, delta))",
    "min_value": "decay=lambda t, delta: max(min_value, schedule(t, delta))",
    "update_after_step": "start_step=update_after_step + 1",
    **dict.fromkeys(("update_every_n_steps", "update_interval"), "update_every, in steps"),
    "ema_model": "into=, for a second module that becomes the average",
    "model_cls": "nothing: pass the model; export() writes its config",
    "foreach": "nothing: weights are always updated in groups",
}

# Weights of averages of checkpoints in Megatron-LM, LAWA and others.
MERGE_WEIGHTS = {
    "minus-sqrt": "1-sqrt",
    **dict.fromkeys(("mean", "average", "swa", "lawa", "pma"), "uniform"),
}
_PICKLED = re.compile(r"(bf16_)?zero_pp_rank_.*|global_step\d+|zero_to_fp32\.py")


def no_attribute(owner: object, name: str) -> AttributeError:
    """The error for an attribute that does not exist, with a hint if another library has it."""
    hint = f": {_ATTRIBUTES[name]}" if name in _ATTRIBUTES else ""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}{hint}"
    return AttributeError(text, name=name, obj=owner)


def no_keyword(names: Iterable[str]) -> TypeError:
    """The error for unknown arguments of the constructor, with hints."""
    listed = [f"{n!r} ({_ARGUMENTS[n]} here)" if n in _ARGUMENTS else repr(n) for n in names]
    return TypeError(f"ShardedEMA() got unexpected keyword arguments: {', '.join(listed)}")


def no_call() -> TypeError:
    """The error for calling the average as a module."""
    return TypeError(f"an average is not called: {_ATTRIBUTES['forward']}")


def no_name(name: object, names: list[str]) -> ValueError:
    """The error for a value that is not the name of an average."""
    if isinstance(name, str):
        return ValueError(f"no average is named {name!r}; there is {names}")
    return ValueError(
        f"name is a {type(name).__name__}, wanted the name of an average, one of {names}; do not "
        "pass parameters or a model: the average knows the model that it was built with"
    )


def no_safetensors(path: Path) -> str:
    """The error for a file that `torch.save` wrote."""
    return (
        f"{path}: is a pickle file by its name. It is not read, since a pickle can run code. "
        f"Convert it once: state = torch.load({str(path)!r}, weights_only=True), take the averaged "
        "state dict out of it (often state['state_dict_ema'] or state['ema']), and write "
        "safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "
        "'ema.safetensors'); then ema.load('ema.safetensors', step=...)"
    )


def no_pickles(path: Path) -> str | None:
    """The error for a checkpoint of pickles, which are not read; None if it has no known names."""
    if path.is_file() and path.suffix in PICKLES:
        return (
            f"{path}: is a pickle file by its name. It is not read, since a pickle can run code; "
            "convert it once with torch.load(..., weights_only=True) and "
            "safetensors.torch.save_file"
        )
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    if any(map(_PICKLED.fullmatch, names)):
        return (
            f"{path}: is a checkpoint of DeepSpeed ZeRO. Its files are pickles, which are not "
            "read, since they can run code. Convert it once, with the script that DeepSpeed wrote: "
            "python zero_to_fp32.py --safe_serialization . OUT"
        )
    if any(name.endswith(PICKLES) for name in names):
        return (
            f"{path}: has pickle files, which are not read, since a pickle can run code; convert "
            "them once, with from_pretrained() and save_pretrained() for example"
        )
    return None


def no_module(model: Any) -> TypeError:
    """The error for a model that is not a module."""
    text = (
        f"model is a {type(model).__name__}, wanted the torch.nn.Module that is trained (wrapped "
        "or not)"
    )
    items = [] if isinstance(model, Iterator) else model  # iterating would exhaust a generator
    if isinstance(items, list | tuple) and all(isinstance(item, Tensor) for item in items):
        text += (
            ", not its parameters: only the model knows how they are sharded and tied. For "
            "diffusers' EMAModel(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay), start_step=1), and update() for step(parameters); for torch-ema's "
            "ExponentialMovingAverage(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay)), and update() for update(parameters)"
        )
    return TypeError(text)
