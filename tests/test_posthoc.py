"""Averages synthesized after a run are those that would have been kept in it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import HalfLife, PowerFunction, ShardedEMA, cli, synthesize
from dist_ema.checkpoint import directory, writer
from dist_ema.checkpoint.directory import Files
from dist_ema.checkpoint.reader import Checkpoint, problems
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.posthoc import combine
from dist_ema.posthoc.synthesize import SynthesisResult, parse_widths, sweep
from dist_ema.schedule import Schedule, to_json
from tests.cuts import (
    CUTS,
    SHAPES,
    TENSORS,
    PeakMemory,
    beside,
    first_ranks,
    full,
    infos,
    parts_of,
)

NARROW, WIDE = PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.10)
KEPT = {"narrow": NARROW, "wide": WIDE}
OTHERS = [PowerFunction(sigma_rel=s) for s in (0.04, 0.07, 0.15, 0.2)]
EXACT = {"rtol": 0, "atol": 0}


def evenly(total: int, num: int) -> list[int]:
    return [total * (i + 1) // num for i in range(num)]


# A run in one process: what was kept is the oracle.


class Walk:
    """A model whose weights drift and shake, and averages of it."""

    def __init__(self, averages: dict[str, ShardedEMA], model: nn.Module) -> None:
        self.averages, self.model = averages, model
        self._random = torch.Generator().manual_seed(5)
        self._step = 0

    @torch.no_grad()
    def go(self) -> None:
        self._step += 1
        for weight in self.model.parameters():
            noise = torch.randn(weight.shape, generator=self._random)
            weight.add_(noise, alpha=0.05 / self._step**0.5).mul_(1 + 0.5 / (self._step + 20))
        for ema in self.averages.values():
            ema.update()


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(11, 13), nn.Linear(13, 7), nn.Linear(7, 13))


def kept_run(
    root: Path, saves: Sequence[int], wanted: Sequence[Schedule], **options: Any
) -> tuple[list[Path], list[ShardedEMA]]:
    """Checkpoints of a run, and averages that were kept in it to compare with."""
    model = net()
    stored = ShardedEMA(model, KEPT, **options)
    kept = [ShardedEMA(model, schedule, **options) for schedule in wanted]
    walk = Walk({"stored": stored} | dict(enumerate(kept)), model)  # type: ignore[dict-item]
    paths = []
    for step in range(1, max(saves) + 1):
        walk.go()
        if step in saves:
            paths.append(root / f"ema-{step:06d}")
            stored.save(paths[-1])
    return paths, kept


def flat(ema: ShardedEMA) -> Tensor:
    return torch.cat([v.flatten().double() for v in ema.gather_state_dict().values()])


def loaded(path: Path, schedule: Schedule, **options: Any) -> ShardedEMA:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema = ShardedEMA(net(), schedule, **options)
        ema.load(path)
    return ema


def relative_error(found: ShardedEMA, wanted: ShardedEMA) -> float:
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


COUNTING = [
    {},
    {"start_step": 13},
    {"update_every": 3},
    {"start_step": 5, "update_every": 4},
]


@pytest.mark.parametrize("options", COUNTING, ids=str)
def test_a_stored_width_comes_back_in_the_same_bits(tmp_path: Path, options: dict[str, int]):
    paths, kept = kept_run(tmp_path / "run", [50, 100, 151], [NARROW, WIDE], **options)
    for schedule, ema in zip((NARROW, WIDE), kept, strict=True):
        made = synthesize(paths, sigma_rel=schedule.sigma_rel, out=tmp_path / "out")
        assert (made.residual, made.step, made.problem) == (0.0, 151, None)
        back = loaded(tmp_path / "out", schedule, **options)
        torch.testing.assert_close(flat(back), flat(ema), **EXACT)


@pytest.mark.parametrize("options", COUNTING, ids=str)
def test_a_width_that_was_not_stored_is_the_one_that_was_kept(
    tmp_path: Path, options: dict[str, int]
):
    paths, kept = kept_run(tmp_path / "run", evenly(320, 16), OTHERS, **options)
    for schedule, ema in zip(OTHERS, kept, strict=True):
        errors = []
        for num in (4, 8, 16):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = paths[16 // num - 1 :: 16 // num]
                last = 320 if num == 8 else None  # by default the last
                made = synthesize(chosen, gamma=schedule.gamma, step=last, out=tmp_path / "out")
            assert made.step == 320
            back = loaded(tmp_path / "out", schedule, **options)
            errors.append(relative_error(back, ema))
        assert errors[0] > errors[1] > errors[2], (schedule, errors)
        assert errors[2] < 0.002, (schedule, errors)  # 0.02 was asked for
        assert (back.step, back.num_updates) == (ema.step, ema.num_updates)
        assert back.decay == ema.decay


def test_a_bad_match_is_told(tmp_path: Path):
    paths, _ = kept_run(tmp_path / "run", [90, 100], [])
    with pytest.warns(UserWarning, match=r"sigma_rel=0.25 at step 100 fits badly"):
        made = synthesize(paths, sigma_rel=0.25, out=tmp_path / "out")
    assert made.residual > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert synthesize(paths, sigma_rel=0.095, out=tmp_path / "out").residual < 0.1


def test_the_result_is_a_checkpoint_that_says_where_it_is_from(tmp_path: Path):
    paths, _ = kept_run(tmp_path / "run", [50, 100], [])
    made = synthesize(map(str, paths), sigma_rel=0.09, out=str(tmp_path / "out"))
    assert made.path == tmp_path / "out"
    assert set(made.coefficients) == {(str(p), n) for p in paths for n in KEPT}
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert list(problems(checkpoint)) == []
        about = checkpoint.manifest
    assert about.state["averages"]["ema"]["schedule"] == to_json(made.schedule)
    told = about.written["synthesized"]
    assert told["residual"] == made.residual
    assert {(f["checkpoint"], f["average"]): f["coefficient"] for f in told["from"]} == (
        made.coefficients
    )
    state = json.loads(json.dumps(about.state))
    with Checkpoint(paths[-1]) as checkpoint:
        first = checkpoint.state
    assert {k: v for k, v in state.items() if k != "averages"} == {
        k: v for k, v in first.items() if k != "averages"
    }


# Made-up checkpoints: every cut, dtype and size against a sum in float64.


def state_at(step: int, schedules: dict[str, Schedule] | None = None) -> dict[str, Any]:
    schedules = KEPT if schedules is None else schedules
    state = {"step": step, "num_updates": step, "update_every": 1, "start_step": 0}
    averages = {n: {"schedule": to_json(s), "decay": s(step, 1)} for n, s in schedules.items()}
    return {**state, "averages": averages}


def made_up(
    path: Path,
    step: int,
    tensors=TENSORS,
    /,
    *,
    cut: str = "flat",
    ranks: Group | None = None,
    schedules: dict[str, Schedule] | None = None,
    **changes: Any,
) -> Path:
    """A checkpoint of random numbers. `changes` go over its state."""
    ranks = ranks or Group.alone()
    names = KEPT if schedules is None else schedules
    averages = {
        name: parts_of(cut, tensors, values_at(step, i, tensors), ranks)
        for i, name in enumerate(names)
    }
    save(path, averages, tensors, state_at(step, schedules) | changes, ranks)
    return path


def values_at(step: int, number: int, tensors=TENSORS) -> dict[str, Tensor]:
    return full(tensors, 2 * step + number)


def summed(made: SynthesisResult, tensors=TENSORS) -> dict[str, Tensor]:
    """The sum that a synthesis says it is, from the numbers that `made_up` wrote."""
    total: dict[str, Tensor] = {}
    for (path, name), x in made.coefficients.items():
        step, number = int(Path(path).name.split("-")[-1]), list(KEPT).index(name)
        for fqn, value in values_at(step, number, tensors).items():
            wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
            total[fqn] = total.get(fqn, 0) + x * wide
    return {t.fqn: total[t.fqn].to(t.dtype) for t in tensors}


def read(path: Path, tensors=TENSORS) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one average, which has no problems."""
    dtypes = {t.fqn: t.dtype for t in tensors}
    with Checkpoint(path) as checkpoint:
        assert list(problems(checkpoint)) == []
        assert list(checkpoint.averages) == ["ema"]
        average = checkpoint.averages["ema"]
        values = {f: torch.zeros(t.shape, dtype=dtypes[f]) for f, t in average.tensors.items()}
        for fqn, value in values.items():
            checkpoint.read(average, fqn, 0, value.view(-1))
    return values


def check_sum(made: SynthesisResult, tensors=TENSORS, **tolerance: float) -> None:
    torch.testing.assert_close(
        read(made.path, tensors), summed(made, tensors), **(tolerance or {"rtol": 2e-7, "atol": 0})
    )


@pytest.mark.ranks(4)
@pytest.mark.parametrize("room", [1 << 27, 1 << 14], ids=["a region", "many regions"])
def test_cuts_of_worlds_of_every_size_are_combined(tmp_path: Path, room: int):
    """Read into the cut of each in turn; tensors of many blocks, and such as hold no element."""
    tensors = infos({**SHAPES, "wide": (31, 97), "tall": (97, 31), "deep": (5, 17, 43)})
    worlds = [first_ranks(size) for size in (1, 2, 3, 4)]
    paths = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BLOCK_BYTES", 4096)
        patch.setattr(combine, "_SUMS_BYTES", room)
        cuts = [cut for cut in CUTS if cut != "crumbs"]
        for number, cut in enumerate(cuts):
            paths.append(tmp_path / f"a-{number + 1}")
            world = worlds[(number + 1) % 4]
            if world is not None:
                made_up(paths[-1], number + 1, tensors, cut=cut, ranks=world)
        dist.barrier()
        if dist.get_rank() == 0:
            for last in range(2, len(paths) + 1):
                outs = {tmp_path / f"out-{i}": s for i, s in enumerate([NARROW, *OTHERS])}
                for made in sweep(paths[:last], outs):
                    check_sum(made, tensors, rtol=1e-5, atol=1e-5)
    dist.barrier()


@pytest.mark.ranks(2)
def test_elements_dealt_out_like_cards_are_combined(tmp_path: Path):
    for step, cut in enumerate(("rows", "crumbs", "flat"), start=1):
        made_up(tmp_path / f"a-{step}", step, cut=cut, ranks=Group())
    if dist.get_rank() == 0:
        for last in (2, 3):
            given = [tmp_path / f"a-{step}" for step in range(1, last + 1)]
            check_sum(synthesize(given, sigma_rel=0.08, out=tmp_path / "out"), rtol=1e-5, atol=1e-6)
    dist.barrier()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_every_dtype_is_combined(tmp_path: Path, dtype: torch.dtype):
    tensors = infos(dtype=dtype)
    paths = [made_up(tmp_path / f"a-{step}", step, tensors) for step in (10, 20, 30)]
    made = synthesize(paths, sigma_rel=0.07, out=tmp_path / "out")
    eps = torch.finfo(dtype).eps
    check_sum(made, tensors, rtol=eps, atol=eps if eps < 1e-10 else eps / 1000)


def test_a_sweep_reads_every_byte_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 4096)
    tensors = infos({"wide": (331, 97), "tall": (97, 331), "small": (3,)})
    paths = [made_up(tmp_path / f"a-{step}", step, tensors) for step in (10, 20, 30)]
    data = 3 * 2 * 4 * sum(math.prod(t.shape) for t in tensors)
    read_bytes = 0
    real = Files.read

    def counted(self: Files, name: str, start: int, buffer: memoryview) -> None:
        nonlocal read_bytes
        read_bytes += len(buffer)
        real(self, name, start, buffer)

    monkeypatch.setattr(Files, "read", counted)
    steps: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], object]]:
        steps.append(-total)
        yield steps.append

    outs = {tmp_path / f"out/{i}": s for i, s in enumerate(OTHERS)}
    assert len(sweep(paths, outs, progress=progress)) == len(OTHERS)
    assert data <= read_bytes < data + 50_000  # headers and manifests
    assert steps[0] == -data and sum(steps) == 0


def test_memory_does_not_grow_with_tensors_or_snapshots(tmp_path: Path, monkeypatch):
    tensors = infos({"large": (3_000_017,), "small": (3,)})
    values = {"large": torch.ones(3_000_017), "small": torch.ones(3)}
    for step in range(1, 5):
        averages = {n: parts_of("flat", tensors, values, Group.alone()) for n in KEPT}
        save(tmp_path / f"a-{step}", averages, tensors, state_at(step), Group.alone())
    del averages, values
    paths = [tmp_path / f"a-{step}" for step in range(1, 5)]
    synthesize(paths[:1], sigma_rel=0.2, out=tmp_path / "warm")
    monkeypatch.setattr(combine, "_SUMS_BYTES", 4 << 20)
    outs = {tmp_path / f"out-{i}": s for i, s in enumerate(OTHERS[:2])}
    with PeakMemory() as peak:
        sweep(paths, outs)
        assert peak() < 20 << 20  # one whole tensor is 12 MB, its sums 48 MB


@pytest.mark.ranks(4)
def test_a_run_that_went_on_under_another_engine_and_world(tmp_path: Path):
    """DDP on 4 ranks, then FSDP2 on 2, then FSDP2 on 3; what is kept is a float64 oracle."""
    rank = dist.get_rank()
    record: list[dict[str, Tensor]] = []
    saved: list[Path] = []
    weights_now = {n: p.detach().clone() for n, p in plain_net().named_parameters()}
    stretches: list[tuple[int, Callable[[nn.Module, Any], nn.Module]]] = [
        (4, lambda model, group: DistributedDataParallel(model, process_group=group)),
        (2, shard),
        (3, shard),
    ]
    for size, wrap in stretches:
        group = dist.new_group(list(range(size)))
        if rank < size:
            model = plain_net()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights_now[name])
            model = wrap(model, group)
            ema = ShardedEMA(model, KEPT, process_group=group)
            if saved:
                ema.load(saved[-1])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
            for _ in range(20):
                batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(len(record)))
                model(batch).square().mean().sub(1).square().backward()
                optimizer.step()
                optimizer.zero_grad()
                ema.update()
                record.append(full_weights(model))
                if len(record) % 4 == 0:
                    path = tmp_path / f"ema-{len(record):04d}"
                    ema.save(path)
        told: list[Any] = [record]
        dist.broadcast_object_list(told)
        record = told[0]
        weights_now = record[-1]
        saved = [tmp_path / f"ema-{step:04d}" for step in range(4, len(record) + 1, 4)]
    first = dist.new_group([0])
    if rank == 0:
        for schedule in OTHERS:
            made = synthesize(saved, gamma=schedule.gamma, out=tmp_path / "out")
            found = ShardedEMA(plain_net(), schedule, process_group=first)
            found.load(made.path)
            state = found.gather_state_dict()
            oracle: dict[str, Tensor] = {n: w.double() for n, w in record[0].items()}
            for k, step in enumerate(record, start=1):
                decay = schedule(k, 1)
                oracle = {n: decay * v + (1 - decay) * step[n] for n, v in oracle.items()}
            apart = sum(
                float((state[n].detach().double() - v).square().sum()) for n, v in oracle.items()
            )
            length = sum(float(v.square().sum()) for v in oracle.values())
            assert (apart / length) ** 0.5 < 0.002, schedule
    dist.barrier()


def plain_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def shard(model: nn.Module, group: Any) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    return fully_shard(model, mesh=mesh)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (
            (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        )
        for name, p in model.named_parameters()
    }


# Refusals: what was found is told, and nothing is written.


def nothing_written(tmp_path: Path) -> bool:
    return not [name for name in beside(tmp_path / "x") if "out" in name]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_updates": 29}, "has 29 updates at step 30, wanted 30"),
        ({"num_updates": 31}, "steps were skipped or counted twice"),
        ({"start_step": 30}, "saved at step 30, before its first update as a power function"),
        ({"start_step": 40}, "start_step=40, update_every=1.; it is a copy of the weights"),
        ({"start_step": 3}, "wanted 30|its last decay is"),
        ({"update_every": 31}, "before its first update"),
        ({"update_every": 0}, "update_every is 0, wanted a whole number >= 1"),
        ({"update_every": None}, "update_every is None"),
        ({"start_step": True}, "start_step is True"),
        ({"step": 31, "num_updates": 31}, "its last decay is 0.*was not made by this schedule"),
    ],
    ids=str,
)
def test_counters_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], told: str):
    good = made_up(tmp_path / "a-10", 10)
    bad = made_up(tmp_path / "a-30", 30, **changes)
    with pytest.raises(CheckpointError, match=told) as caught:
        synthesize([good, bad], sigma_rel=0.07, out=tmp_path / "out")
    assert str(bad) in str(caught.value)
    assert nothing_written(tmp_path)


def test_averages_of_another_run_are_refused(tmp_path: Path):
    good = made_up(tmp_path / "a-10", 10)
    state = state_at(40)
    for average in state["averages"].values():
        average["decay"] = PowerFunction(**_gamma(average))(20, 1)
    later = made_up(tmp_path / "a-40", 40, averages=state["averages"], start_step=20)
    with pytest.raises(CheckpointError, match=r"start_step=20, and .* has 0; they are not of one"):
        synthesize([good, later], sigma_rel=0.07, out=tmp_path / "out")
    changed = {"narrow": NARROW, "wide": PowerFunction(sigma_rel=0.12)}
    other = made_up(tmp_path / "a-20", 20, schedules=changed)
    with pytest.raises(CheckpointError, match="or the schedule was changed during it"):
        synthesize([good, other], sigma_rel=0.07, out=tmp_path / "out")
    assert nothing_written(tmp_path)


def _gamma(average: dict[str, Any]) -> dict[str, float]:
    return {"gamma": average["schedule"]["gamma"]}


def test_a_checkpoint_without_a_power_function_is_refused(tmp_path: Path):
    good = made_up(tmp_path / "a-10", 10)
    halves = {"half": HalfLife(100)}
    bad = made_up(tmp_path / "a-20", 20, schedules=halves)
    with pytest.raises(CheckpointError, match=r"no average with a Power.*'half' with Half"):
        synthesize([good, bad], sigma_rel=0.07, out=tmp_path / "out")
    assert nothing_written(tmp_path)
    beside_others = [
        made_up(tmp_path / f"b-{step}", step, schedules={**KEPT, **halves}) for step in (10, 20)
    ]
    made = synthesize(beside_others, sigma_rel=0.07, out=tmp_path / "out")
    assert {name for _, name in made.coefficients} == set(KEPT)
    check_sum(made)


def test_another_model_is_refused_by_name(tmp_path: Path):
    good = made_up(tmp_path / "a-20", 20)
    shapes = {**SHAPES, "extra": (2, 2), "bias": (3,)}
    del shapes["cube"]
    tensors = [
        dataclasses.replace(t, dtype=torch.float64) if t.fqn == "norm.weight" else t
        for t in infos(shapes)
    ]
    bad = made_up(tmp_path / "a-10", 10, tensors)
    with pytest.raises(CheckpointError) as caught:
        synthesize([good, bad], sigma_rel=0.07, out=tmp_path / "out")
    told = str(caught.value)
    assert f"{bad} ('wide'): is of another model than {good} ('wide')" in told or str(bad) in told
    assert "bias has shape (3,), wanted (1,)" in told
    assert "norm.weight has dtype F64, wanted F32" in told
    assert "cube is missing" in told
    assert "extra is unexpected" in told
    assert nothing_written(tmp_path)


def test_a_tied_weight_is_found_under_its_other_name(tmp_path: Path):
    tensors = [
        dataclasses.replace(t, fqn="head.weight", aliases=("emb.weight",)) if t.aliases else t
        for t in TENSORS
    ]
    old = made_up(tmp_path / "a-10", 10, tensors)
    new = made_up(tmp_path / "a-20", 20)
    check_sum(synthesize([old, new], sigma_rel=0.07, out=tmp_path / "out"))


def test_a_synthesized_average_is_no_snapshot(tmp_path: Path):
    paths = [made_up(tmp_path / f"a-{step}", step) for step in (10, 20)]
    synthesize(paths, sigma_rel=0.08, out=tmp_path / "b-20")
    with pytest.raises(CheckpointError, match="b-20: was synthesized"):
        synthesize([*paths, tmp_path / "b-20"], sigma_rel=0.07, out=tmp_path / "out")
    assert nothing_written(tmp_path)


def test_arguments_that_make_no_sense_are_refused(tmp_path: Path):
    paths = [made_up(tmp_path / f"a-{step}", step) for step in (10, 20, 30)]
    shutil.copytree(paths[0], tmp_path / "copy")
    again = made_up(tmp_path / "again", 20)
    out: dict[str, Any] = {"out": tmp_path / "out"}
    for given, options, told in [
        (paths, {}, "exactly one of gamma and sigma_rel"),
        (paths, {"gamma": 2.0, "sigma_rel": 0.1}, "exactly one of gamma and sigma_rel"),
        (paths, {"sigma_rel": 0.31}, "at most 0.30028"),
        (paths, {"gamma": -1}, "above -1"),
        (paths, {"gamma": [1.0, 2.0]}, "must be a number"),
        (paths, {"gamma": 2, "step": 15}, "no checkpoint is of step 15; there are steps 10, 20"),
        (paths, {"gamma": 2, "step": 20}, r"a-30: later than the wanted step 20"),
        ([*paths, paths[0]], {"gamma": 2}, "a-10: is the same checkpoint as .*a-10"),
        ([*paths, tmp_path / "copy"], {"gamma": 2}, "copy: is the same checkpoint as .*a-10"),
        ([*paths, again], {"gamma": 2}, "has the same profile as"),
        ([], {"gamma": 2}, "no checkpoints are given"),
        (paths[0], {"gamma": 2}, "wanted a list of paths"),
        (str(paths[0]), {"gamma": 2}, "wanted a list of paths"),
        (paths, {"gamma": 2, "out": paths[1]}, "would be written over the checkpoint"),
        (paths, {"gamma": 2, "out": paths[1] / "in"}, "would be written over the checkpoint"),
        (paths, {"gamma": 2, "out": tmp_path}, "would be written over the checkpoint"),
    ]:
        with pytest.raises(ValueError, match=told):
            synthesize(given, **(out | options))
    twins = {"a": NARROW, "b": NARROW}
    with pytest.raises(ValueError, match="has the same profile as"):
        synthesize([made_up(tmp_path / "t-5", 5, schedules=twins)], gamma=2, **out)
    assert nothing_written(tmp_path)
    assert not list(paths[1].glob("in*"))


def test_damage_is_refused_and_what_was_there_stays(tmp_path: Path):
    paths = [made_up(tmp_path / f"a-{step}", step) for step in (10, 20, 30)]
    synthesize(paths, sigma_rel=0.07, out=tmp_path / "out")
    before = read(tmp_path / "out")
    shard = next((paths[1] / "wide").glob("shard-*"))
    intact = shard.read_bytes()

    def cut_short() -> str:
        shard.write_bytes(intact[:-5])
        return "the file is cut short, in or before tensor"

    def altered() -> str:
        shard.write_bytes(intact[:-5] + b"\x55" + intact[-4:])
        return "tensor .* is altered"

    def altered_header() -> str:
        shard.write_bytes(intact[:20] + b"\x55" + intact[21:])
        return "the header is altered"

    def lost() -> str:
        shard.unlink()
        return "No such file"

    for damage in (cut_short, altered, altered_header, lost):
        told = damage()
        with pytest.raises(CheckpointError, match=told) as caught:
            synthesize(paths, sigma_rel=0.09, out=tmp_path / "out")
        assert str(shard) in str(caught.value)
        torch.testing.assert_close(read(tmp_path / "out"), before, **EXACT)
        assert beside(tmp_path / "out") == ["a-10", "a-20", "a-30"]
        shard.write_bytes(intact)
    whole = (paths[1] / "manifest.json").read_bytes()
    for data in (b"", whole[:300], whole[:-7], whole.replace(b'"step":20', b'"step":21')):
        (paths[1] / "manifest.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a-20/manifest.json: is"):
            synthesize(paths, sigma_rel=0.09, out=tmp_path / "out")
    (paths[1] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="a-20"):
        synthesize(paths, sigma_rel=0.09, out=tmp_path / "out")


def test_a_sum_that_is_not_finite_is_refused_by_name(tmp_path: Path):
    tensors = infos(dtype=torch.float16)
    paths = []
    for step in (10, 20):
        averages = {}
        for name, height in (("narrow", 60000), ("wide", -60000)):
            values = {t.fqn: torch.full(t.shape, 1.0, dtype=t.dtype) for t in tensors}
            values["cube"] *= height
            averages[name] = parts_of("flat", tensors, values, Group.alone())
        paths.append(tmp_path / f"a-{step}")
        save(paths[-1], averages, tensors, state_at(step), Group.alone())
    synthesize(paths, sigma_rel=0.07, out=tmp_path / "between")
    with pytest.raises(CheckpointError, match="NaN or Inf in cube;"):
        synthesize(paths, sigma_rel=0.04, out=tmp_path / "out")
    assert nothing_written(tmp_path)


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path):
    paths = [made_up(tmp_path / f"a-{step}", step) for step in (10, 20)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
        synthesize(paths, sigma_rel=0.07, out=tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is no directory"):
        synthesize(paths, sigma_rel=0.07, out=tmp_path / "file")
    (tmp_path / "out" / "thesis.tex").unlink()
    synthesize(paths, sigma_rel=0.07, out=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not part of the checkpoint"):
        synthesize(paths, sigma_rel=0.09, out=tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "out" / "notes.txt").unlink()
    made = synthesize(paths, sigma_rel=0.09, out=tmp_path / "out")
    check_sum(made)


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(directory, "_MAX_OPEN", 4)
    paths = [made_up(tmp_path / f"a-{step}", step, cut="crumbs") for step in (10, 11)]
    assert len(list((paths[0] / "wide").iterdir())) > 4
    check_sum(synthesize(paths, sigma_rel=0.07, out=tmp_path / "out"), rtol=1e-5, atol=1e-6)


# The command.


def run(capsys, *arguments: object) -> tuple[int, list[str], str]:
    try:
        status = cli.main(["synthesize", *map(str, arguments)])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [made_up(tmp_path / f"a-{step}", step) for step in range(20, 340, 20)]


def test_the_command_writes_one_width(paths: list[Path], tmp_path: Path, capsys):
    for option, value in (("--sigma-rel", 0.07), ("--gamma", 11.25)):
        status, out, err = run(capsys, *paths, "--out", tmp_path / "out", option, value)
        assert (status, err) == (0, "")
        assert out[0].startswith(f"{tmp_path}/out: sigma_rel 0.0")
        assert ", gamma 11.2" in out[0]
        assert "step 320; from 32 averages, residual 0.00" in out[0]
        assert len(read(tmp_path / "out")) == len(TENSORS)
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "schedule PowerFunction(gamma=11.25)" in capsys.readouterr().out


def test_the_command_sweeps(paths: list[Path], tmp_path: Path, capsys):
    out_at = tmp_path / "sweep"
    status, out, err = run(capsys, *paths, "--out", out_at, "--sweep", "0.05:0.25:0.05")
    names = ["0.05", "0.10", "0.15", "0.20", "0.25"]
    assert (status, err, len(out)) == (0, "", 5)
    assert sorted(path.name for path in out_at.iterdir()) == [f"sigma_rel-{n}" for n in names]
    for name, number in (("0.05", 0), ("0.10", 1)):
        torch.testing.assert_close(
            read(out_at / f"sigma_rel-{name}"), values_at(320, number), **EXACT
        )
    for name in names[2:]:
        made = synthesize(paths, sigma_rel=float(name), out=tmp_path / "out")
        torch.testing.assert_close(read(out_at / f"sigma_rel-{name}"), read(made.path), **EXACT)


def test_the_command_tells_what_is_wrong(paths: list[Path], tmp_path: Path, capsys):
    out = tmp_path / "out"
    for arguments, expected, told in [
        ((*paths, "--out", out), 2, "one of the arguments --gamma --sigma-rel --sweep is required"),
        ((*paths, "--out", out, "--gamma", 1, "--sigma-rel", 0.1), 2, "not allowed with"),
        (("--out", out, "--gamma", 1), 2, "required: PATH"),
        ((*paths, "--gamma", 1), 2, "required: --out"),
        ((*paths, "--out", out, "--sigma-rel", 0.4), 2, "at most 0.30028"),
        ((*paths, "--out", out, "--gamma", 1, "--step", 7), 2, "no checkpoint is of step 7"),
        ((*paths, paths[0], "--out", out, "--gamma", 1), 2, "the same checkpoint"),
        ((*paths, out, "--out", tmp_path / "o", "--gamma", 1), 1, "out: No such file"),
        ((*paths, "--out", out, "--sweep", "0.1:0.05:0.01"), 2, "wanted FROM:TO:BY"),
        ((*paths, "--out", out, "--sweep", "0.1:0.2:1e-9"), 2, "at most 256 widths"),
    ]:
        status, _, err = run(capsys, *arguments)
        assert status == expected, err
        assert told in err and "Traceback" not in err, err
    assert nothing_written(tmp_path)
    status, _, err = run(capsys, *paths[-2:], "--out", out, "--sigma-rel", 0.25)
    assert status == 0
    assert err.startswith(f"dist-ema: {out}: the profile of sigma_rel=0.25 at step 320 fits badly")


@pytest.mark.parametrize(
    "text",
    ["", "0.1", "0.1:0.2", "0.1:0.2:0", "0.1:0.2:-1", "a:b:c", "nan:1:1", "0.1:inf:0.1", "0:9:1"],
)
def test_a_range_that_makes_no_sense_is_refused(text: str):
    with pytest.raises(ValueError, match=r"--sweep|sigma_rel must be"):
        parse_widths(Path("x"), None, None, text)


def test_a_range_ends_where_it_says():
    found = parse_widths(Path("x"), None, None, "0.05:0.10:0.03")
    assert list(found) == [Path("x") / f"sigma_rel-{s}" for s in ("0.05", "0.08")]
    assert found[Path("x/sigma_rel-0.05")] == NARROW


def test_the_result_exports_like_any_other(tmp_path: Path):
    paths, _ = kept_run(tmp_path / "run", [40, 80], [])
    out = synthesize(paths, sigma_rel=0.08, out=tmp_path / "out").path
    assert cli.main(["export", str(out), str(tmp_path / "exported")]) == 0
    model = net()
    load_model(model, tmp_path / "exported" / "model.safetensors")
    found = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(found, read(out, infos_of(model)), **EXACT)


def infos_of(model: nn.Module):
    return infos({name: tuple(p.shape) for name, p in model.named_parameters()})


def test_an_average_that_its_schedule_did_not_make_alone_is_refused(tmp_path: Path):
    model = nn.Linear(3, 2)
    first = ShardedEMA(model, PowerFunction(sigma_rel=0.25))
    for _ in range(5):
        first.update()
    first.save(tmp_path / "first")
    synthesize([tmp_path / "first"], sigma_rel=0.25, out=tmp_path / "made")
    for source in ("first", "made"):
        other = ShardedEMA(model, PowerFunction(sigma_rel=0.05 if source == "first" else 0.25))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule differs
            other.load(tmp_path / source)
        other.update()
        other.save(tmp_path / "later")
        with pytest.raises(CheckpointError, match=r"was not made by .* alone"):
            synthesize([tmp_path / "later"], sigma_rel=0.05, out=tmp_path / "out")
        other.reset()
        other.update()
        other.save(tmp_path / "later")
        synthesize(
            [tmp_path / "later"], gamma=other._options.schedules["ema"].gamma, out=tmp_path / "out"
        )


def test_a_profile_too_narrow_for_the_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="gamma is 1e"):
        synthesize([tmp_path / "none"], gamma=1e8, out=tmp_path / "out")


def test_a_result_in_the_place_of_several_averages_leaves_none_of_them(tmp_path: Path):
    model = nn.Linear(3, 2)
    several = {"narrow": PowerFunction(sigma_rel=0.05), "wide": PowerFunction(sigma_rel=0.1)}
    ema = ShardedEMA(model, several)
    ema.update()
    for path in ("kept", "place"):
        ema.save(tmp_path / path)
    (tmp_path / "place" / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"not part of the checkpoint \(notes\)"):
        synthesize([tmp_path / "kept"], sigma_rel=0.05, out=tmp_path / "place")
    (tmp_path / "place" / "notes").rmdir()
    synthesize([tmp_path / "kept"], sigma_rel=0.05, out=tmp_path / "place")
    names = {entry.name for entry in (tmp_path / "place").iterdir()}
    assert {"narrow", "wide"} & names == set()
