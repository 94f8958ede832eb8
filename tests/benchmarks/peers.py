"""Other averages beside this one: what an update of each costs, and where each fails.

Each is used as its documentation says, on what the engine's user holds: the wrapped model, or the
parameters of it. What is averaged is told by the elements and the dtype of what it keeps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import ShardedEMA
from tests.benchmarks.launch import Here, rows_of
from tests.benchmarks.measure import hot_and_cold, ratio
from tests.benchmarks.models import Shapes, elements_of_all_ranks, local, nbytes_of, updater, wrap
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.update import WEIGHT, floor

DECAY = 1 - WEIGHT
ENGINES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")
PLAIN_NOTE = """\
One process, no process group. Medians over interleaved rounds of one update's time over another's
in the same round. *Floor*: `torch._foreach_lerp_` of the weights and clones of them. *Cold*: after
a matmul, a write of 64 MB and a pause of 3 ms, as in a training step; others are hot."""
ENGINES_NOTE = """\
All ranks at once; ratios as above, on rank 0. *Averaged*: elements kept over all ranks together,
over the elements of the model: 1 is one copy in all, the number of ranks a copy each, less than 1
says that weights are left out. Where a way fails, the first line of its error. ZeRO has bf16
weights and fp32 masters."""


@dataclass(frozen=True)
class Way:
    """An average that was built, and how it is updated."""

    update: Callable[[], object]
    kept: list[torch.Tensor]


Build = Callable[[nn.Module], Way]


def dist_ema(model: nn.Module) -> Way:
    ema = ShardedEMA(model, DECAY)
    return Way(updater(ema, model), list(ema._average.storage.values[0]))


def torch_averaged_model(model: nn.Module) -> Way:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    return Way(lambda: averaged.update_parameters(model), list(averaged.module.parameters()))


def diffusers(foreach: bool) -> Build:
    def build(model: nn.Module) -> Way:
        from diffusers.training_utils import EMAModel

        ema = EMAModel(model.parameters(), decay=DECAY, foreach=foreach)
        return Way(lambda: ema.step(model.parameters()), ema.shadow_params)

    return build


def ema_pytorch(foreach: bool) -> Build:
    def build(model: nn.Module) -> Way:
        from ema_pytorch import EMA

        options = {"beta": DECAY, "update_every": 1, "update_after_step": 0}
        ema = EMA(model, use_foreach=foreach, **options)
        for _ in range(2):  # the first ones copy
            ema.update()
        return Way(ema.update, list(ema.ema_model.parameters()))

    return build


def torch_ema(model: nn.Module) -> Way:
    from torch_ema import ExponentialMovingAverage

    ema = ExponentialMovingAverage(model.parameters(), decay=DECAY)
    return Way(lambda: ema.update(), ema.shadow_params)


def foreach_over_dtensors(model: nn.Module) -> Way:
    """As torchtitan does it, with whatever `parameters()` gives."""
    lives = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in lives]
    return Way(lambda: torch._foreach_lerp_(averages, lives, WEIGHT), averages)


def full_gather(model: nn.Module) -> Way:
    """As Composer does it: all weights are gathered on every rank at each update."""
    if not isinstance(model, FSDPModule):
        raise TypeError("a full gather is measured under FSDP2 only")
    parameters = list(model.parameters())
    averages = [_whole(p).clone() for p in parameters]

    def update() -> None:
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(_whole(parameter), WEIGHT)

    return Way(update, averages)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


LIBRARIES: dict[str, Build] = {
    "torch AveragedModel": torch_averaged_model,
    "diffusers EMAModel": diffusers(False),
    "diffusers EMAModel, foreach": diffusers(True),
    "ema-pytorch": ema_pytorch(False),
    "ema-pytorch, foreach": ema_pytorch(True),
    "torch-ema": torch_ema,
}
OTHERS: dict[str, Build] = {
    "foreach over parameters()": foreach_over_dtensors,
    "full gather at each update": full_gather,
}


def run(device: str, sizes: Sizes) -> list[Table]:
    plain = Table("plain", "Side by side in one process", PLAIN_NOTE)
    plain.rows += rows_of(
        plain_case, [("plain", s) for s in sizes.peers], device, sizes, sizes.rounds
    )
    cut = Table("engines", "Side by side under the engines", ENGINES_NOTE)
    cases = [
        (engine, replace(s, dtype=torch.bfloat16) if engine.startswith("zero") else s)
        for engine in ENGINES
        for s in sizes.peers[:2]
    ]
    cut.rows += rows_of(engine_case, cases, device, sizes, sizes.slow_rounds)
    return [plain, cut]


def plain_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    model = wrap(engine, shapes, here)
    ways = {"dist_ema": dist_ema(model)} | {n: build(model) for n, build in LIBRARIES.items()}
    acts = {"floor": floor(list(model.parameters()))}
    acts |= {name: way.update for name, way in ways.items()}
    taken, cold = hot_and_cold(acts, here.device, rounds=rounds)
    return [
        {
            "weights": shapes.name,
            "way": name,
            "over floor": ratio(taken, name, "floor"),
            "over floor cold": ratio(cold, name, "floor"),
            "over dist_ema": ratio(taken, name, "dist_ema"),
            "over dist_ema cold": ratio(cold, name, "dist_ema"),
            "MB kept": nbytes_of(way.kept) / 1e6,
        }
        for name, way in ways.items()
    ]


def engine_case(here: Here, engine: str, shapes: Shapes, rounds: int) -> list[Row]:
    """One way after the other, each beside this library's: several copies may not fit."""
    model = wrap(engine, shapes, here)
    ours = dist_ema(model)
    rows = [{"engine": engine} | _told(here, shapes, "dist_ema", ours)]
    for name, build in (LIBRARIES | OTHERS).items():
        if name == "full gather at each update" and engine != "fsdp2":
            continue
        row: dict[str, Any] = {"engine": engine, "weights": shapes.name, "way": name}
        way, error = _attempt(here, build, model)
        if way is None:
            row["fails with"] = error
        else:
            acts = {"dist_ema": ours.update, "theirs": way.update}
            taken, cold = hot_and_cold(acts, here.device, rounds=rounds, together=here)
            row |= _told(here, shapes, name, way)
            row["over dist_ema"] = ratio(taken, "theirs", "dist_ema")
            row["over dist_ema cold"] = ratio(cold, "theirs", "dist_ema")
        rows.append(row)
        del way
        gc.collect()
    return rows


def _attempt(here: Here, build: Build, model: nn.Module) -> tuple[Way | None, str]:
    """An average that has been updated on every rank, or what was raised first."""
    way, error = None, ""
    try:
        way = build(model)
        way.update()
    except SystemExit:
        error = "it ends the process: exit()"
    except Exception as raised:
        text = (str(raised).strip() or repr(raised)).splitlines()[0]
        error = f"{type(raised).__name__}: {text}"[:160]
    errors = [told for told in here.all_gather(error) if told]
    return (None, errors[0]) if errors else (way, "")


def _told(here: Here, shapes: Shapes, name: str, way: Way) -> Row:
    kept = sum(local(t).numel() for t in way.kept)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in way.kept})
    return {
        "weights": shapes.name,
        "way": name,
        "over dist_ema": 1.0,
        "averaged": elements_of_all_ranks(kept, here) / shapes.numel,
        "in": ", ".join(dtypes),
        "MB kept": nbytes_of(way.kept) / 1e6,
        "fails with": "",
    }
