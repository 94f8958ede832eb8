"""Rows of a table, one or some from each case: an engine and the weights that it holds."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Sequence

from tests.benchmarks.launch import Here, NotEnoughDevices, on_ranks
from tests.benchmarks.models import Shapes
from tests.benchmarks.report import Row
from tests.benchmarks.sizes import Sizes

Measures = Callable[[Here, str, Shapes, int], list[Row]]
Case = tuple[str, Shapes]


def rows_of(
    measure: Measures, cases: Sequence[Case], device: str, sizes: Sizes, rounds: int
) -> list[Row]:
    """What rank 0 measured in each case, in their order.

    Plain models run on one rank, all others on several. Cases share their processes, except that
    a stage of DeepSpeed has some of its own: its engines are not freed while the process lives.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        engine = case[0]
        own = engine == "plain" or engine.startswith("zero")
        groups.setdefault(engine if own else "torch", []).append(case)
    rows: list[Row] = []
    for name, group in groups.items():
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            rows += [{"engine": name, "weights": "not run: deepspeed is not installed"}]
            continue
        num_ranks = 1 if name == "plain" else sizes.ranks_of(device)
        sys.stderr.write(f"{measure.__module__}: {name} on {num_ranks} ranks\n")
        try:
            rows += on_ranks(_body, num_ranks, measure, group, rounds, device=device)[0]
        except NotEnoughDevices as error:
            rows += [{"engine": name, "weights": f"not run: {error}"}]
    return rows


def _body(here: Here, measure: Measures, cases: Sequence[Case], rounds: int) -> list[Row]:
    rows: list[Row] = []
    for engine, shapes in cases:
        rows += measure(here, engine, shapes, rounds)
        gc.collect()
    return rows
