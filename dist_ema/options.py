"""What a `ShardedEMA` is asked for, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dist_ema.core.group import Group
from dist_ema.core.lerp import MultiAvgFn
from dist_ema.schedule import Schedule, as_schedule, code_hash, to_json

DEFAULT_NAME = "ema"


@dataclass(frozen=True, slots=True)
class Options:
    """The constructor's arguments, all but the model."""

    schedules: dict[str, Schedule]  # by name of the average
    multi_avg_fn: MultiAvgFn | None
    update_every: int
    start_step: int
    params: str | Callable[[str, nn.Parameter], bool]
    buffers: str | Callable[[str, torch.Tensor], bool]
    replicas: str
    dtype: torch.dtype
    device: torch.device | None  # None: beside the weights
    overlap: bool
    has_teacher: bool

    def __post_init__(self) -> None:
        counts = (("update_every", self.update_every, 1), ("start_step", self.start_step, 0))
        for label, number, least in counts:
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{label} is {number!r}, wanted a whole number >= {least}")
        if not callable(self.params) and self.params not in ("trainable", "all"):
            raise ValueError(f"params is {self.params!r}, wanted 'trainable', 'all' or a predicate")
        if not callable(self.buffers) and self.buffers not in ("copy", "average"):
            raise ValueError(
                f"buffers is {self.buffers!r}, wanted 'copy', 'average' or a predicate"
            )
        if self.replicas not in ("split", "whole"):
            raise ValueError(f"replicas is {self.replicas!r}, wanted 'split' or 'whole'")
        dtype = self.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"dtype is {dtype!r}, wanted a floating torch.dtype, 16 bits or more")
        if self.multi_avg_fn is not None:
            if not callable(self.multi_avg_fn):
                raise TypeError(f"multi_avg_fn is {self.multi_avg_fn!r}, wanted a callable")
            if list(self.schedules) != [DEFAULT_NAME]:
                raise ValueError("multi_avg_fn keeps one average; give it without a mapping")
        if self.device is not None and self.device.type != "cpu":
            raise ValueError(
                f"device is {self.device}, wanted 'cpu', or None for beside the weights"
            )
        if self.has_teacher and (self.device is not None or self.overlap):
            raise ValueError("into holds the average: device and overlap have no meaning with it")
        if self.has_teacher and len(self.schedules) > 1:
            raise ValueError("into is one module and holds one average; give one decay")

    def rule(self, name: str) -> dict[str, Any]:
        """How an average is made, as JSON."""
        rule = cast(Schedule, self.multi_avg_fn or self.schedules[name])
        told = to_json(rule)  # a callable by its name
        return told | {"code": code_hash(rule)} if told["kind"] == "callable" else told

    def agree(self, group: Group) -> None:
        """Refuse averages that differ from rank to rank. Collective: every rank calls it."""
        mine = {
            # A callable by its name: it may close over what differs between ranks.
            "decay": {n: {**self.rule(n), "code": None} for n in self.schedules},
            "update_every": self.update_every,
            "start_step": self.start_step,
            "params": self.params if isinstance(self.params, str) else "a predicate",
            "buffers": self.buffers if isinstance(self.buffers, str) else "a predicate",
            "replicas": self.replicas,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "overlap": self.overlap,
            "into": "a module" if self.has_teacher else None,
        }
        if group.equal(mine):
            return
        told = group.all_gather(mine)
        for rank, theirs in enumerate(told):
            for label, value in theirs.items():
                if repr(value) != repr(
                    told[0][label]
                ):  # names of averages in another order as well
                    raise ValueError(
                        f"ranks build different averages: {label} is {told[0][label]!r} on rank 0, "
                        f"{value!r} on rank {rank}"
                    )


def schedules_of(decay: object) -> dict[str, Schedule]:
    """A schedule for each average, by its name."""
    if not isinstance(decay, Mapping):
        return {DEFAULT_NAME: as_schedule(decay)}
    if not decay:
        raise ValueError("decay is an empty mapping, wanted at least one name")
    found = {}
    for name, value in decay.items():
        # Names become names of files.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
            raise ValueError(f"{name!r} cannot name an average; use letters, digits, _ . -")
        found[name] = as_schedule(value)
    return found


def average_meant(evaluate: bool | str, names: list[str], *, needed: bool = False) -> str | None:
    """Which average is evaluated, and exported or copied if `needed`; None if that needs no name.

    Raises:
        ValueError: no average is named so, or there are several and none is named.
    """
    if isinstance(evaluate, str):
        if evaluate not in names:
            raise ValueError(f"evaluate is {evaluate!r}, wanted one of the averages {names}")
        return evaluate
    if len(names) > 1 and (evaluate or needed):
        raise ValueError(f"there are several averages, {names}; say by evaluate= which is meant")
    return None
