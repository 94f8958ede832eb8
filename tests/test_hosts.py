"""Two hosts that share little, a bad network, and a file system that is slow and fails.

One run of tests/hosts_rank.py, by `torchrun` on two hosts of two ranks (see tests/hosts.py); each
test looks at a part of what it left. Full weights of every step come from the run, the averages
from an oracle and from a single process.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_ema import ShardedEMA
from tests import hosts
from tests.hosts_rank import DECAY, STEPS
from tests.net import ALIASES, TRAINABLE, Net, batch_of_tokens
from tests.oracle import Oracle, worst_relative_error

TIMEOUT_S = 240.0
NUM_RANKS = 2 * hosts.RANKS_PER_HOST


class Run:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = [directory / f"shared/rank-{rank}.json" for rank in range(NUM_RANKS)]
        self.found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]

    def of_every_rank(self, what: str) -> list[Any]:
        return [found[what] for found in self.found]

    def tensors(self, label: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / f"shared/{label}.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("hosts")
    log = directory / "log"
    process = hosts.start(directory, "tests.hosts_rank", log)
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        process.stdin.close()  # ends all of it
        process.wait()
    assert status == 0, f"ended with {status}:\n{log.read_text(errors='replace')[-8000:]}"
    yield Run(directory)


def is_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def check(run: Run, label: str, place: Path) -> None:
    """The average is the oracle's, and all that was written of it is the average, bit for bit."""
    every = [run.tensors(f"{label}-weights-{step}") for step in range(STEPS + 1)]
    oracle = Oracle({name: every[0][name] for name in TRAINABLE}, DECAY)
    for weights in every[1:]:
        oracle.update(weights)
    saved = run.tensors(f"{label}-saved")
    assert worst_relative_error(saved, oracle.average) < 1e-6
    for what in ("loaded", "background"):
        assert is_equal(run.tensors(f"{label}-{what}"), saved), what

    alone = Net()
    alone.load_state_dict(saved)
    for what in ("ema", "background"):
        ema = ShardedEMA(alone, decay=DECAY)
        torch.nn.init.zeros_(alone.emb.weight)
        ema.reset()
        ema.load(place / f"{label}-{what}")
        assert ema.step == STEPS
        assert is_equal(ema.gather_state_dict(), saved), what
    for method in ("auto", "direct", "rank0"):
        exported = load_file(place / f"{label}-{method}/model.safetensors")
        assert is_equal(exported, {k: v for k, v in saved.items() if k not in ALIASES}), method

    alone.load_state_dict(saved)
    with torch.no_grad():
        logits = alone.eval()(batch_of_tokens(0))
    torch.testing.assert_close(run.tensors(f"{label}-logits")["logits"], logits)


def test_ranks_are_on_two_hosts(run):
    assert run.of_every_rank("host") == ["host0", "host0", "host1", "host1"]


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp"])
def test_train_save_load_export(run, engine):
    check(run, engine, run.directory / "shared")


def test_auto_exports_through_rank_0_where_hosts_share_nothing(run):
    wanted = run.tensors("one-after")
    for name in ("auto", "same-name"):
        exported = load_file(run.directory / f"host0/{name}/model.safetensors")
        assert is_equal(exported, {k: v for k, v in wanted.items() if k not in ALIASES}), name
    of_host_1 = sorted(p.name for p in (run.directory / "host1").rglob("*"))
    assert of_host_1 == ["model.safetensors", "same-name"]
    assert (run.directory / "host1/same-name/model.safetensors").read_bytes() == b"of host 1"


@pytest.mark.parametrize(
    "call, name", [("load", "ema"), ("save", "new"), ("save asynchronously", "new"),
                   ("export directly", "direct")]
)  # fmt: skip
def test_a_directory_that_one_host_sees_is_refused_on_every_rank(run, call, name):
    errors = [errors[call] for errors in run.of_every_rank("one host sees it")]
    assert len(set(errors)) == 1, errors
    assert str(run.directory / "here") in errors[0] and name in errors[0]
    assert "2, 3" in errors[0] and "0, 1" not in errors[0]


def test_a_refused_call_leaves_nothing(run):
    left = sorted(p.name for p in (run.directory / "host0").iterdir())
    assert left == ["auto", "ema", "same-name"]
    assert is_equal(run.tensors("one-after"), run.tensors("one-before"))


def test_delay_and_loss(run):
    check(run, "bad", run.directory / "shared")
    packets = json.loads((run.directory / "packets.json").read_text())
    assert packets["dropped"] > 0 and packets["delayed"] > 50 * packets["dropped"]
    assert all(
        seconds > 10 * hosts.DELAY_S for seconds in run.of_every_rank("bad network, seconds")
    )


@pytest.fixture
def slow(run: Run) -> Path:
    if (reason := hosts.why_no_fuse()) is not None:
        pytest.skip(reason)
    return run.directory / "behind_slow"


def test_names_that_show_late(run, slow):
    check(run, "slow", slow)


def test_a_file_system_that_fails_now_and_then(run, slow):
    outcomes = [found["outcomes"] for found in run.of_every_rank("failing file system")]
    for number, of_ranks in enumerate(zip(*outcomes, strict=True)):
        for call in ("save", "export", "load"):
            failed = {bool(outcome[call]) for outcome in of_ranks}
            assert len(failed) == 1, f"round {number}, {call}: {of_ranks}"
        on_rank_0 = of_ranks[0]
        for call, read in (("save", "loaded"), ("export", "exported")):
            allowed = ("old", "new") if on_rank_0[call] else ("new",)
            assert on_rank_0[read] in allowed, f"round {number}, {call}: {on_rank_0}"
    for call in ("save", "export"):
        assert {bool(outcome[call]) for outcome in outcomes[0]} == {True, False}, call


def test_nothing_outlives_the_test(tmp_path):
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)
    process = hosts.start(tmp_path, "tests.hosts_rank", tmp_path / "log")
    while not (tmp_path / "packets.json").exists():
        assert process.poll() is None
    process.stdin.close()  # as when the process of the tests is killed
    process.wait(10)
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # another process has ended meanwhile
            assert str(tmp_path).encode() not in command_line.read_bytes()
