"""`EMAOptions`: the arguments of `ShardedEMA` besides the model, validated.

Below it, hints for users of other averages: what their arguments and attributes are called here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import FindMaster
from dist_ema.core.lerp import MultiAvgFn
from dist_ema.core.names import Modules
from dist_ema.schedule import (
    BEMA,
    Schedule,
    as_schedule,
    averages_of,
    code_hash,
    decay_at,
    to_json,
    uncorrected,
)

DEFAULT_NAME = "ema"
_DEVICES = "'cpu', or None for beside the weights"


class EMAKeywords(TypedDict, total=False):
    """The keyword-only arguments of `ShardedEMA`. A new one is also a field of `EMAOptions`."""

    multi_avg_fn: MultiAvgFn | None
    update_every: int
    start_step: int
    params: str | Callable[[str, nn.Parameter], bool]
    buffers: str | Callable[[str, torch.Tensor], bool]
    replicas: str
    dtype: torch.dtype
    device: torch.device | str | None
    overlap: bool
    masters: FindMaster | None
    into: Modules | str | None
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class EMAOptions:
    """The arguments of `ShardedEMA` besides the model, which documents them."""

    decay: float | Schedule | Mapping[str, float | Schedule] = 0.9999
    multi_avg_fn: MultiAvgFn | None = None
    update_every: int = 1
    start_step: int = 0
    params: str | Callable[[str, nn.Parameter], bool] = "trainable"
    buffers: str | Callable[[str, torch.Tensor], bool] = "copy"
    replicas: str = "split"
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None  # None: beside the weights
    overlap: bool = False
    masters: FindMaster | None = None
    into: Modules | str | None = None
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, *, device: torch.device | str | None = None, **keywords: Any) -> EMAOptions:
        """Options from keyword arguments. The error for an unknown one suggests a known one."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in keywords if name not in names]:
            raise no_keyword(unknown)
        try:
            device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device is {device!r}, wanted {_DEVICES}") from None
        return cls(device=device, **keywords)

    def __post_init__(self) -> None:
        names, dtype, fn = list(self.schedules), self.dtype, self.multi_avg_fn
        for label, least in (("update_every", 1), ("start_step", 0)):
            number = getattr(self, label)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{label} is {number!r}, wanted a whole number >= {least}")
        for label, words in (("params", ("trainable", "all")), ("buffers", ("copy", "average"))):
            value = getattr(self, label)
            if not callable(value) and value not in words:
                wanted = f"{words[0]!r}, {words[1]!r} or a predicate"
                raise ValueError(f"{label} is {value!r}, wanted {wanted}")
        if self.replicas not in ("split", "whole"):
            raise ValueError(f"replicas is {self.replicas!r}, wanted 'split' or 'whole'")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype is {dtype!r}, wanted a floating torch.dtype, 16 bits or more")
        for label in ("multi_avg_fn", "masters"):
            value = getattr(self, label)
            if value is not None and not callable(value):
                raise TypeError(f"{label} is {value!r}, wanted a callable")
        if fn is not None and names != [DEFAULT_NAME]:
            raise ValueError("multi_avg_fn keeps one average; give it without a mapping")
        if self.device is not None and self.device.type != "cpu":
            raise ValueError(f"device is {self.device}, wanted {_DEVICES}")
        if self.into is not None and (self.device is not None or self.overlap):
            raise ValueError("into holds the average: device and overlap have no meaning with it")
        if self.into is not None and len(self.values) > 1:
            raise ValueError("into holds one average, without bias correction; give one decay")

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """The schedule of each average, by its name."""
        if not isinstance(self.decay, Mapping):
            return {DEFAULT_NAME: as_schedule(self.decay)}
        if not self.decay:
            raise ValueError("decay is an empty mapping, wanted at least one name")
        for name in self.decay:  # names of files
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
                raise ValueError(f"{name!r} cannot name an average; use letters, digits, _ . -")
        return {name: as_schedule(value) for name, value in self.decay.items()}

    @cached_property
    def values(self) -> dict[str, str]:
        """The values that are kept, by name, each with the name of the average that it is for.

        A `BEMA` keeps its average and the initial weights.
        """
        values = {
            value: name
            for name, schedule in self.schedules.items()
            for value in (uncorrected(name) if isinstance(schedule, BEMA) else (name,))
        }
        averages = averages_of(self.schedules)
        if taken := [name for name in self.schedules if name not in averages]:
            raise ValueError(f"{taken[0]!r} is the name of a value that a BEMA keeps; use another")
        return values

    def decays(self, since: int) -> tuple[list[float], list[float]]:
        """The decays of an update, `since` steps after the initial copies, up to 0 for a copy.

        Returns:
            the decay of each average, and the decay of each of `values`.
        """
        every, start = self.update_every, self.start_step
        of_averages, of_values = [], []
        for schedule in self.schedules.values():
            corrects = isinstance(schedule, BEMA)  # its t is the step, as in TRL
            t = since + start if corrects else since
            of_averages.append(decay_at(schedule, t, every) if since > 0 else 0.0)
            initial = 1.0 if since > 0 else 0.0  # the initial weights: kept, or copied
            of_values += [of_averages[-1], initial] if corrects else [of_averages[-1]]
        return of_averages, of_values

    def rule(self, name: str) -> dict[str, Any]:
        """How an average is computed, as JSON."""
        rule = cast(Schedule, self.multi_avg_fn or self.schedules[name])
        value = to_json(rule)  # a callable by its name
        return value | {"code": code_hash(rule)} if value["kind"] == "callable" else value

    def arguments(self) -> dict[str, str]:
        """Texts that must be equal on all ranks, for `Group.together`; functions by name only."""
        # Code is not compared: closures may hold values that differ between ranks.
        rules = {name: self.rule(name) | {"code": None} for name in self.schedules}
        texts = {"argument decay": str(rules)}
        for name, value in vars(self).items():
            if name not in ("decay", "schedules", "values", "multi_avg_fn", "process_group"):
                is_text = value is None or isinstance(
                    value, bool | int | str | torch.dtype | torch.device
                )
                texts[f"argument {name}"] = str(value) if is_text else type(value).__name__
        return texts


# Hints.

# Weights of averages of checkpoints in Megatron-LM, LAWA and others.
MERGE_WEIGHTS = {
    "minus-sqrt": "1-sqrt",
    **dict.fromkeys(("mean", "average", "swa", "lawa", "pma"), "uniform"),
}
_ZERO = re.compile(r"(bf16_)?zero_pp_rank_.*|global_step\d+|zero_to_fp32\.py")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")  # suffixes of files of `torch.save`

_SWAP = "`with ema.average_parameters():` lets the model compute with the average, then restores it"
_COPY = f"{_SWAP}; `ema.copy_to()` makes the average the live weights permanently"
_MODULE = (
    f"the average is kept in shards, not as a second model. {_SWAP}; `ema.copy_to(module)` writes "
    "it into a plain module; `ema.gather_state_dict()` gathers it on rank 0"
)
# Attributes of torch's AveragedModel, diffusers' EMAModel, torch-ema, ema-pytorch and timm.
ATTRIBUTES = {
    **dict.fromkeys(("module", "ema_model", "ema"), _MODULE),
    "shadow_params": f"{_SWAP}; `ema.gather_tensors()` gathers whole tensors one by one",
    **dict.fromkeys(("store", "restore", "apply_shadow"), _COPY),
    "forward": f"{_SWAP}; call `model(...)` in the block",
    "set": "`ema.load(path)` reads an average; `ema.reset()` starts from the live weights",
    "update_bn": "`from dist_ema import update_bn`; `update_bn(loader, ema.model)` in the block of "
    "`with ema.average_parameters():`",
    "update_parameters": "`ema.update()` averages the weights of the model it was built with",
    **dict.fromkeys(("num_averaged", "n_averaged"), "`ema.num_updates` counts updates"),
    "optimization_step": "`ema.step` counts optimizer steps",
    **dict.fromkeys(("cur_decay_value", "get_decay"), "`ema.decay` is the last decay applied"),
    "save_pretrained": "`ema.export(path)` writes what `from_pretrained` reads; `ema.save(path)` "
    "writes a checkpoint to resume from",
    "from_pretrained": "build it with the model, then `ema.load(path)` reads an export too",
    "to": "the average is beside the weights, or in host memory if built with device='cpu'",
}
# Arguments of their constructors.
_ARGUMENTS = {
    "use_buffers": 'buffers="average"',
    "beta": "decay",
    "avg_fn": "multi_avg_fn, which takes lists of tensors",
    **dict.fromkeys(
        ("use_ema_warmup", "use_warmup", "inv_gamma", "power"),
        "decay=Warmup(decay, inv_gamma, power)",
    ),
    "use_num_updates": "decay=Warmup(decay)",
    **dict.fromkeys(
        ("min_decay", "min_value"), "decay=lambda t, delta: max(minimum, schedule(t, delta))"
    ),
    "update_after_step": "start_step=update_after_step + 1",
}


def no_attribute(owner: object, name: str) -> AttributeError:
    """The error for an attribute that does not exist, with a hint if another library has it."""
    hint = f": {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
    text = f"{type(owner).__name__!r} object has no attribute {name!r}{hint}"
    return AttributeError(text, name=name, obj=owner)


def no_keyword(names: Iterable[str]) -> TypeError:
    """The error for unknown arguments of the constructor, with hints."""
    listed = [f"{n!r} ({_ARGUMENTS[n]} here)" if n in _ARGUMENTS else repr(n) for n in names]
    return TypeError(f"ShardedEMA() got unexpected keyword arguments: {', '.join(listed)}")


def no_name(name: object, names: list[str]) -> ValueError:
    """The error for a value that is not the name of an average."""
    if isinstance(name, str):
        return ValueError(f"no average is named {name!r}; there is {names}")
    return ValueError(
        f"name is a {type(name).__name__}, wanted the name of an average, one of {names}; do not "
        "pass parameters or a model: the average knows the model that it was built with"
    )


def no_pickles(path: Path) -> str | None:
    """The error for a checkpoint of pickles, which are not read; None if it has no known names."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        if any(map(_ZERO.fullmatch, names)):
            what = "a checkpoint of DeepSpeed ZeRO, of pickle files"
            how = "with its own script: python zero_to_fp32.py --safe_serialization . OUT"
        elif any(name.endswith(PICKLES) for name in names):
            what, how = (
                "a directory of pickle files",
                "with from_pretrained() and save_pretrained()",
            )
        else:
            return None
    elif path.suffix in PICKLES:
        what = "a pickle file by its name"
        how = (
            f"state = torch.load({str(path)!r}, weights_only=True), take the state dict out of it "
            "(of an average often state['state_dict_ema'] or state['ema']), and write "
            "safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, "
            "'ema.safetensors')"
        )
    else:
        return None
    return f"{path}: is {what}, and is not read: a pickle can run code. Convert it once, {how}"


def no_module(model: Any) -> TypeError:
    """The error for a model that is not a module."""
    text = (
        f"model is a {type(model).__name__}, wanted the torch.nn.Module that is trained (wrapped "
        "or not), or a list or mapping of such modules"
    )
    items = [] if isinstance(model, Iterator) else model  # iterating would exhaust a generator
    if isinstance(items, list | tuple) and all(isinstance(item, torch.Tensor) for item in items):
        text += (
            ", not its parameters: only the model knows how they are sharded and tied. For "
            "diffusers' EMAModel(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay), start_step=1), and update() for step(parameters); for torch-ema's "
            "ExponentialMovingAverage(model.parameters(), decay) write ShardedEMA(model, "
            "Warmup(decay)), and update() for update(parameters)"
        )
    elif isinstance(items, Mapping | list | tuple):
        pairs = items.items() if isinstance(items, Mapping) else enumerate(items)
        odd = next((key, value) for key, value in pairs if not isinstance(value, nn.Module))
        text += f"; model[{odd[0]!r}] is a {type(odd[1]).__name__}"
    return TypeError(text)
