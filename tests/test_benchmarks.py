"""The benchmarks run and tell what they should; no time is compared with anything."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ema.core.group import Group
from dist_ema.core.replicas import find_holders
from dist_ema.engines import select
from tests.benchmarks import __main__ as command
from tests.benchmarks import against, peers, plots, readme, report, scale, swap, trace, update
from tests.benchmarks.launch import Here
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import CHECK, Config
from tests.pool import NO_GROUP

TINY = CHECK.decoder
MESHES = {"fsdp2": (1, 4), "hsdp": (2, 2)}


def finite(rows: list[Row]) -> bool:
    return all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def here() -> Here:
    return Here(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "zero2"])
def test_an_update_is_measured(engine: str):
    rows = [r for shapes in CHECK.update[:2] for r in update.case(here(), engine, shapes, 1)]
    if dist.get_rank() == 0:
        told = [(row["engine"], row["weights"], row["ranks"]) for row in rows]
        assert told == [(engine, shapes.name, 2) for shapes in CHECK.update[:2]], told
        columns = ("update/floor", "update/floor cold", "two")
        assert all(row[column] > 0 for row in rows for column in columns), rows
        assert finite(rows), rows


@pytest.mark.ranks(2)
def test_others_are_measured_or_fail_with_their_own_words():
    rows = peers.engine_case(here(), "fsdp2", CHECK.peers[1], 1)
    by_way = {row["way"]: row for row in rows}
    assert "deepcopy" in by_way["torch AveragedModel"]["fails with"], by_way
    assert "exit()" in by_way["ema-pytorch"]["fails with"], by_way
    averaged = {way: row["averaged"] for way, row in by_way.items() if not row["fails with"]}
    assert averaged.pop("full gather at each update") == 2, averaged
    assert set(averaged.values()) == {1} and len(averaged) == 5, averaged
    assert finite(rows), rows


@pytest.mark.ranks(2)
def test_others_are_measured_in_one_process():
    rows = peers.plain_case(here(), "plain", CHECK.peers[0], 1)
    assert [row["way"] for row in rows] == ["dist_ema", *peers.LIBRARIES], rows
    assert finite(rows), rows


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "zero3"])
def test_more_ranks_hold_fewer_bytes(engine: str):
    found = update.ranks_case(here(), engine, CHECK.whole, 1)
    assert found["bytes"] == 1 / dist.get_world_size(), found
    assert finite([found]), found


@pytest.mark.ranks(2)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_swaps_are_measured(engine: str):
    rows = swap.swap_case(here(), engine, CHECK.swapped, 1)
    assert [row["engine"] for row in rows] == [engine], rows
    assert finite(rows), rows


@pytest.mark.ranks(1)
def test_memory_is_measured():
    (row,) = swap.memory_case(here(), "plain", CHECK.heavy, 1)
    assert row["average"] == 1 and row["average MB"] == 4 * CHECK.heavy.numel / 1e6, row
    assert finite([row]), row


@pytest.mark.ranks(2)
def test_files_are_measured():
    rows = swap.files_case(here(), "fsdp2", CHECK.stored, 1)
    told = [row["what"] for row in rows]
    names = ["write", "write apart", "read", "save", "load", "gather_state_dict"]
    assert told[: len(names)] == names, told
    assert any(name.startswith("export") for name in told[len(names) :]), told
    assert finite(rows), rows


@pytest.mark.ranks(4)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_simulated_world_is_what_real_ranks_hold(mesh: str):
    world = scale.world_of(TINY, *MESHES[mesh])
    weights = select(scale.sharded(TINY, *MESHES[mesh])).weights()
    metas = [f.meta for w in weights for f in w.fragments]
    assert metas == world.held(dist.get_rank()), metas
    every = [set(world.held(rank)) for rank in range(4)]
    wanted = [tuple(r for r in range(4) if meta in every[r]) for meta in metas]
    assert find_holders(metas, Group()) == wanted


def simulated(body: Callable[..., Row], *arguments: Any) -> Row:
    """A row of the simulation, and no process group again."""
    try:
        return body(*arguments)
    finally:
        dist.destroy_process_group()


@pytest.mark.ranks(NO_GROUP)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_rank_is_simulated(mesh: str):
    num_replicas, num_shards = MESHES[mesh]
    found = simulated(scale.construction, TINY, num_replicas, num_shards, 1)
    weights = found["billion parameters"] * 4e3 / (num_replicas * num_shards)
    assert weights <= found["average MB"] < 1.1 * weights + 0.01, found
    assert 0 < found["plan MB"] < 1, found
    assert 0 < found["sent MB"] + found["received MB"] < 0.02, found


@pytest.mark.ranks(NO_GROUP)
def test_what_rank_0_is_told_is_simulated():
    found = simulated(scale.planning, TINY, 2, 4)
    world = scale.world_of(TINY, 2, 4)
    assert found["boxes"] == sum(len(world.owned(rank)) for rank in range(8)), found
    assert found["manifest MB"] > 0 and found["gather: told MB"] > 0, found


@pytest.mark.ranks(NO_GROUP)
def test_what_is_exchanged_is_eight_bytes_a_tensor_and_rank():
    def exchanged(config: Config, num_shards: int) -> float:
        found = simulated(scale.construction, config, 1, num_shards, 0)
        return 1e6 * (found["sent MB"] + found["received MB"])

    small = exchanged(TINY, 4)
    num_tensors = len(scale.world_of(TINY, 1, 4).tensors)
    assert exchanged(TINY, 32) - small <= 28 * (8 * num_tensors + 80)  # 80: heads, other calls
    assert exchanged(dataclasses.replace(TINY, layers=4), 4) < 2.5 * small


def test_a_suite_runs_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(update, "ENGINES", ("plain",))
    command.main(["update", "--check", "--device", "cpu", "--out", str(tmp_path)])
    (rows,) = report.read(tmp_path, "update").values()
    assert [row["weights"] for row in rows] == [shapes.name for shapes in CHECK.update]


def test_steps_are_traced(tmp_path: Path):
    rows = trace.measure("cpu", CHECK.traced, 1, tmp_path)
    assert [row["way"] for row in rows] == list(trace.WAYS)
    assert finite(rows), rows
    events = json.loads(gzip.decompress((tmp_path / rows[-1]["trace"]).read_bytes()))["traceEvents"]
    found = {event.get("name") for event in events}
    assert {"forward", "backward", "optimizer", "update"} <= found


def test_hidden_work_is_that_of_side_streams_while_the_main_one_is_busy():
    def event(cat: str, stream: int, start: float, end: float) -> dict[str, Any]:
        return {"cat": cat, "ts": start, "dur": end - start, "args": {"stream": stream}}

    main, side = trace.by_stream(
        [
            event("kernel", 7, 0, 10),
            event("kernel", 7, 10, 20),
            event("kernel", 7, 30, 40),
            event("kernel", 13, 15, 25),
            event("gpu_memcpy", 14, 22, 32),
            {"cat": "cpu_op", "ts": 0, "dur": 100},
        ]
    )
    assert (main, side) == ([(0, 20), (30, 40)], [(15, 32)])
    assert trace.overlapping(side, main) == 5 + 2


def test_the_gpu_kit_runs_on_a_cpu(tmp_path: Path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", str(report.ROOT / "launch" / "gpu.sh"), "--dry-run"]
    assert subprocess.run([*command, "trace"], env=environment).returncode == 0
    assert [row["way"] for row in report.read(tmp_path, "trace")["trace"]] == list(trace.WAYS)
    assert "no average" in (tmp_path / "trace.txt").read_text()
    refused = subprocess.run([*command, "traces"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "traces is none of tests" in refused.stderr


def test_results_are_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"weights": "a", "way": w, "over floor": 2.0, "none": ""} for w in ("dist_ema", "x|y")]
    of_ranks = [{"engine": "ddp", "ranks": n, "bytes": 1 / n, "time": 1 / n} for n in (1, 2)]
    for suite, name, told in (("peers", "plain", rows), ("ranks", "ranks", of_ranks)):
        table = Table(name, name, "A note.", told)
        report.write(tmp_path, suite, [table], report.environment("cpu"), "a command")
    read = json.loads((tmp_path / "peers.json").read_text())
    assert read["tables"][0]["rows"] == rows
    assert torch.__version__.startswith(read["environment"]["torch"])
    assert read["environment"]["cores"] > 0 and len(read["environment"]["load"]) == 3
    assert "| a | x\\|y | 2 |" in (tmp_path / "peers.md").read_text()
    pytest.importorskip("matplotlib")
    drawn = plots.draw(tmp_path, tmp_path / "plots")
    assert [path.stat().st_size > 1000 for path in drawn] == [True, True]


def test_what_became_slower_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def measured(checkouts: list[Path], out: Path, arguments: list[str]) -> list[Any]:
        for checkout in checkouts:
            assert (checkout / "dist_ema" / "ema.py").exists()
            assert (checkout / "tests" / "benchmarks" / "against.py").exists()
        first = {"update/floor": 1.0, "update/floor cold": 1.0}
        then = {"update/floor": 1.1, "update/floor cold": 1.2}
        rows = [{"engine": "plain", "weights": "few", **figures} for figures in (first, then)]
        return [against.figures([row]) for row in rows][-len(checkouts) :]

    monkeypatch.setattr(against, "measured", measured)
    with pytest.raises(SystemExit, match=r"plain, few, update/floor cold: 1\.00 -> 1\.20$"):
        command.main(["--check-against", "HEAD"])
    old = [{"engine": "plain", "weights": "few", "update/floor": 0.9, "update/floor cold": 1.19}]
    report.write(tmp_path, "update", [Table("update", "", "", old)], {}, "")
    with pytest.raises(SystemExit, match=r"15 %:\nplain, few, update/floor: 0\.90 -> 1\.10$"):
        command.main(["--check-against", str(tmp_path / "update.json")])


def test_an_unknown_suite_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["updates"])
    assert (
        "there are update, peers, ranks, swap, scale, trace, memory, plots, readme"
        in capsys.readouterr().err
    )


def test_the_pages_show_the_committed_results(tmp_path: Path):
    pages = [Path("README.md"), readme.PAGE]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((report.ROOT / page).read_text())
    readme.write(report.directory_for("cpu"), tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (report.ROOT / page).read_text()
    with pytest.raises(SystemExit, match=r"no update\.json"):
        readme.read(tmp_path)
