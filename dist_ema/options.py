"""`EMAOptions`: the arguments of `ShardedEMA` besides the model, validated.

A new option is a field of `EMAOptions`, a key of `EMAKeywords` and a parameter of `ShardedEMA`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.lerp import MultiAvgFn
from dist_ema.hints import no_keyword
from dist_ema.schedule import Schedule, as_schedule, code_hash, to_json

DEFAULT_NAME = "ema"


class EMAKeywords(TypedDict, total=False):
    """The keyword-only arguments of `ShardedEMA`, for functions that pass them on."""

    multi_avg_fn: MultiAvgFn | None
    update_every: int
    start_step: int
    params: str | Callable[[str, nn.Parameter], bool]
    buffers: str | Callable[[str, torch.Tensor], bool]
    replicas: str
    dtype: torch.dtype
    device: torch.device | str | None
    overlap: bool
    into: nn.Module | None
    process_group: dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class EMAOptions:
    """The arguments of `ShardedEMA` besides the model; see there for their meaning.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

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
    into: nn.Module | None = None
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
        counts = (("update_every", self.update_every, 1), ("start_step", self.start_step, 0))
        for label, value, least in counts:
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _check(is_count, label, value, f"a whole number >= {least}")
        is_valid = callable(self.params) or self.params in ("trainable", "all")
        _check(is_valid, "params", self.params, "'trainable', 'all' or a predicate")
        is_valid = callable(self.buffers) or self.buffers in ("copy", "average")
        _check(is_valid, "buffers", self.buffers, "'copy', 'average' or a predicate")
        _check(self.replicas in ("split", "whole"), "replicas", self.replicas, "'split' or 'whole'")
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        is_valid = is_float and dtype.itemsize >= 2
        _check(is_valid, "dtype", dtype, "a floating torch.dtype, 16 bits or more")
        if fn is not None and not callable(fn):
            raise TypeError(f"multi_avg_fn is {fn!r}, wanted a callable")
        if fn is not None and names != [DEFAULT_NAME]:
            raise ValueError("multi_avg_fn keeps one average; give it without a mapping")
        if self.device is not None and self.device.type != "cpu":
            raise ValueError(
                f"device is {self.device}, wanted 'cpu', or None for beside the weights"
            )
        if self.into is not None and (self.device is not None or self.overlap):
            raise ValueError("into holds the average: device and overlap have no meaning with it")
        if self.into is not None and len(names) > 1:
            raise ValueError("into is one module and holds one average; give one decay")

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

    def rule(self, name: str) -> dict[str, Any]:
        """How an average is computed, as JSON."""
        rule = cast(Schedule, self.multi_avg_fn or self.schedules[name])
        value = to_json(rule)  # a callable by its name
        return value | {"code": code_hash(rule)} if value["kind"] == "callable" else value

    def arguments(self) -> dict[str, str]:
        """Texts that must be equal on all ranks, for `Group.together`.

        Functions are compared by name only: they may close over what differs between ranks.
        """
        rules = {name: self.rule(name) | {"code": None} for name in self.schedules}
        texts = {"argument decay": repr(rules)}
        for field in fields(self):
            if field.name not in ("decay", "multi_avg_fn", "process_group"):
                value = getattr(self, field.name)
                plain = isinstance(value, str | int | torch.dtype | torch.device | None)
                texts[f"argument {field.name}"] = (
                    repr(value) if plain else f"a {type(value).__name__}"
                )
        return texts


def _check(is_valid: bool, label: str, value: object, wanted: str) -> None:
    if not is_valid:
        raise ValueError(f"{label} is {value!r}, wanted {wanted}")
