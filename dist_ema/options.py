"""`EMAOptions`: the arguments of `ShardedEMA` besides the model, validated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import FindMaster
from dist_ema.core.lerp import MultiAvgFn
from dist_ema.hints import no_keyword
from dist_ema.schedule import BEMA, Schedule, as_schedule, code_hash, decay_at, to_json

DEFAULT_NAME = "ema"


def uncorrected(name: str) -> tuple[str, str]:
    """Names under which a checkpoint has the average of a `BEMA`, and the initial weights."""
    return f"{name}.uncorrected", f"{name}.initial"


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
    into: nn.Module | str | None
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
    into: nn.Module | str | None = None
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, *, device: torch.device | str | None = None, **keywords: Any) -> EMAOptions:
        """Options from keyword arguments. Unknown ones raise an error that names the right one."""
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in keywords if name not in names]:
            raise no_keyword(unknown)
        return cls(device=None if device is None else torch.device(device), **keywords)

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
            wanted = "'cpu', or None for beside the weights"
            raise ValueError(f"device is {self.device}, wanted {wanted}")
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
        if taken := [name for name in self.schedules if values.get(name, name) != name]:
            raise ValueError(f"a BEMA keeps a value named {taken[0]!r}; rename that average")
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
        # Without code: a function may close over what differs between ranks.
        rules = {name: self.rule(name) | {"code": None} for name in self.schedules}
        texts = {"argument decay": str(rules)}
        for name, value in vars(self).items():
            if name not in ("decay", "schedules", "values", "multi_avg_fn", "process_group"):
                is_function = callable(value) and not isinstance(value, torch.device)
                texts[f"argument {name}"] = type(value).__name__ if is_function else str(value)
        return texts
