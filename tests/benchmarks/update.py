"""What an update costs beside `torch._foreach_lerp_` on the same bytes; the same on more ranks."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dist_ema import ShardedEMA
from tests.benchmarks import models
from tests.benchmarks.launch import Here, NotEnoughDevices, on_ranks, rows_of
from tests.benchmarks.measure import hot_and_cold, interleaved, medians, peak_bandwidth, ratio
from tests.benchmarks.models import Shapes, updater, wrap
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import Sizes

WEIGHT = 1e-4
ENGINES = ("plain", "fsdp1", "fsdp2", "zero2", "zero3")
NOTE = """\
Medians over interleaved rounds of one update's time over another's in the same round, on rank 0
while the other ranks do the same, as after a training step. *Floor*: `torch._foreach_lerp_` of the
tensors that the rank averages and clones of them; where the live weights are bf16, of fp32 tensors
of 10/12 of the length, since 12 bytes are moved for an fp32 weight and 10 for a bf16 one.
*Compiled*: the floor's rival for bf16, one pass that `torch.compile` makes of the update of all
elements in one tensor, over the floor. *Two*: two averages over one. *Cold*: each sample is one
call after a matmul, a write of 64 MB and a pause of 3 ms, as in a training step; all others are
hot, call after call. *Of HBM*: bytes a second of the update over the bandwidth of the device's
memory by its clock and bus width (GPUs only); *copy of HBM*: the same of a copy within the device
of as many bytes, which is what can be reached."""
RANKS_NOTE = """\
*Bytes*: the most that a rank holds for its average, over one fp32 copy of the model. *Time*: the
slowest rank's update over `torch._foreach_lerp_` of the whole model in the same process on as many
threads, in turn: medians over interleaved rounds while the other ranks wait, so that cores and
bandwidth are not what ranks share. One thread a rank."""


def run(device: str, sizes: Sizes) -> list[Table]:
    cases = [(e, s) for e in ENGINES for s in sizes.update if can_hold(e, s)]
    rows = rows_of(case, cases, device, sizes, sizes.rounds)
    return [Table("update", "An update over the floor", NOTE, rows)]


def can_hold(engine: str, shapes: Shapes) -> bool:
    """ZeRO averages fp32 masters, whatever the weights are."""
    return shapes.dtype == torch.float32 or not engine.startswith("zero")


def case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    model = wrap(engine, shapes, here)
    one = ShardedEMA(model, 1 - WEIGHT)
    two = ShardedEMA(model, {"fast": 0.99, "slow": 1 - WEIGHT})
    lives = [fragment.view for fragment in one._average.plan.fragments]
    narrow = shapes.dtype.itemsize < 4
    count = sum(live.numel() for live in lives)
    if narrow:
        lives = [torch.ones(live.numel() * 10 // 12, device=here.device) for live in lives]
    numels = [live.numel() for live in lives]
    acts = {
        "floor": floor(lives),
        "update": updater(one, model),
        "two": updater(two, model),
    }
    if narrow and here.size == 1 and any(map(shutil.which, ("c++", "g++", "gcc", "clang"))):
        acts["compiled"] = compiled(count, shapes.dtype, here.device)
    peak = peak_bandwidth(here.device)
    if peak is not None:
        acts["copy"] = copy(6 * sum(numels), here.device)
    taken, cold = hot_and_cold(acts, here.device, rounds=rounds, together=here)
    seconds, cold_seconds = medians(taken), medians(cold)
    row = {
        "engine": engine,
        "ranks": here.size,
        "weights": shapes.name,
        "tensors here": len(numels),
        "MB moved": round(12 * sum(numels) / 1e6, 1),
        "update/floor": ratio(taken, "update", "floor"),
        "update/floor cold": ratio(cold, "update", "floor"),
        "two": ratio(taken, "two", "update"),
        "floor us": seconds["floor"] * 1e6,
        "update us": seconds["update"] * 1e6,
        "floor us cold": cold_seconds["floor"] * 1e6,
        "update us cold": cold_seconds["update"] * 1e6,
        "GB/s": 12 * sum(numels) / seconds["update"] / 1e9,
    }
    if "compiled" in taken:
        row["compiled"] = ratio(taken, "compiled", "floor")
        row["compiled cold"] = ratio(cold, "compiled", "floor")
    if peak is not None:
        for name, column in (("update", "of HBM"), ("copy", "copy of HBM")):
            row[column] = 12 * sum(numels) / seconds[name] / peak
    return [row]


@torch.no_grad()
def floor(lives: Sequence[torch.Tensor]) -> Callable[[], object]:
    """The least that an update of these tensors can be: they lie where the model has them."""
    lives = [live.detach() for live in lives]
    averages = [live.clone() for live in lives]
    return lambda: torch._foreach_lerp_(averages, lives, WEIGHT)


def copy(nbytes: int, device: torch.device) -> Callable[[], object]:
    """Reads so many bytes and writes as many."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def compiled(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The update of one tensor in one pass, which torch has no kernel for but can compile."""
    average = torch.zeros(numel, device=device)
    live = torch.ones(numel, dtype=dtype, device=device)

    @torch.compile
    def update(average: torch.Tensor, live: torch.Tensor) -> None:
        average.copy_(average + WEIGHT * (live.float() - average))

    return lambda: update(average, live)


def run_ranks(device: str, sizes: Sizes) -> list[Table]:
    rows: list[Row] = []
    for num_ranks in sizes.num_ranks:
        engines = [e for e in models.ENGINES if num_ranks == 1 or e != "plain"]
        try:
            every = on_ranks(
                ranks_body, num_ranks, engines, sizes.whole, sizes.rounds, device=device
            )
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
    return [Table("ranks", "An update on more ranks", RANKS_NOTE, rows)]


def ranks_body(here: Here, engines: list[str], shapes: Shapes, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [ranks_case(here, engine, shapes, rounds) for engine in engines]


def ranks_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> dict[str, Any]:
    model = wrap(engine, shapes, here)
    ema = ShardedEMA(model)
    found: dict[str, Any] = {}
    for _ in here.turns():
        acts = {
            "whole": floor([torch.ones(n, device=here.device) for n in shapes.numels]),
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
