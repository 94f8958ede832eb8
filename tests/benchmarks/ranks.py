"""The same model on 1, 2 and 4 ranks: bytes that a rank holds, and the time of its update."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dist_ema import ShardedEMA
from tests.benchmarks.launch import Here, NotEnoughDevices, on_ranks
from tests.benchmarks.measure import interleaved, ratio
from tests.benchmarks.models import ENGINES, Shapes, updater, wrap
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.update import floor

NOTE = """\
*Bytes*: the most that a rank holds for its average, over one fp32 copy of the model. *Time*: the
slowest rank's update over `torch._foreach_lerp_` of the whole model in the same process on as many
threads, in turn: medians over interleaved rounds while the other ranks wait, so that cores and
bandwidth are not what ranks share. One thread a rank."""


def run(device: str, sizes: Sizes) -> list[Table]:
    rows: list[Row] = []
    for num_ranks in sizes.num_ranks:
        engines = [e for e in ENGINES if num_ranks == 1 or e != "plain"]
        try:
            every = on_ranks(body, num_ranks, engines, sizes.whole, sizes.rounds, device=device)
        except NotEnoughDevices as error:
            rows.append({"engine": f"not run: {error}", "ranks": num_ranks})
            continue
        for engine, of_ranks in zip(engines, zip(*every, strict=True), strict=True):
            slowest = max(of_ranks, key=lambda found: found["time"])
            rows.append(
                {
                    "engine": engine,
                    "ranks": num_ranks,
                    "weights": sizes.whole.name,
                    "bytes": max(found["bytes"] for found in of_ranks),
                    "time": slowest["time"],
                    "MB held": max(found["MB held"] for found in of_ranks),
                    "update ms": slowest["update ms"],
                }
            )
    rows.sort(key=lambda row: str(row["engine"]))
    return [Table("ranks", "An update on more ranks", NOTE, rows)]


def body(here: Here, engines: list[str], shapes: Shapes, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [case(here, engine, shapes, rounds) for engine in engines]


def case(here: Here, engine: str, shapes: Shapes, rounds: int) -> dict[str, Any]:
    model = wrap(engine, shapes, here)
    ema = ShardedEMA(model)
    found: dict[str, Any] = {}
    for _ in here.turns():
        one = shapes.numel // shapes.count
        acts = {
            "whole": floor([one] * shapes.count, here.device),
            "update": updater(ema, model),
        }
        taken = interleaved(acts, here.device, rounds=rounds)
        found = {
            "bytes": ema.nbytes / (4 * shapes.numel),
            "time": ratio(taken, "update", "whole"),
            "MB held": ema.nbytes / 1e6,
            "update ms": statistics.median(taken["update"]) * 1e3,
        }
    return found
