"""Two hosts, a bad network, and a file system that is slow and fails.

One run of tests/hosts_rank.py on two hosts of two ranks (see tests/hosts.py), and checks of what it
left, in a single process.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_ema import ShardedEMA
from tests import hosts
from tests.hosts_rank import STEPS
from tests.net import ALIASES, Net
from tests.runs import DECAY, same

TIMEOUT_S = 240.0


def test_two_hosts(tmp_path: Path):
    if (reason := hosts.why_not()) is not None:
        pytest.skip(reason)
    log = tmp_path / "log"
    process = hosts.start(tmp_path, log)
    files = [tmp_path / f"shared/rank-{rank}.json" for rank in range(hosts.NUM_RANKS)]
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(file.exists() for file in files):
            is_running = process.poll() is None and time.monotonic() < deadline
            assert is_running, log.read_text(errors="replace")[-8000:]
            time.sleep(0.1)
    finally:
        process.stdin.close()  # as when the process of the tests is killed
        process.wait(10)
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # another process has ended meanwhile
            assert str(tmp_path).encode() not in command_line.read_bytes(), "outlives the test"

    results = [json.loads(file.read_text()) for file in files]
    assert [result["host"] for result in results] == ["host0", "host0", "host1", "host1"]
    packets = json.loads((tmp_path / "packets.json").read_text())
    assert packets["dropped"] > 0 and packets["delayed"] > 50 * packets["dropped"]
    assert all(result["seconds"] > 10 * hosts.DELAY_S for result in results)
    check_files(tmp_path / "shared" / "hsdp")
    if (reason := hosts.why_no_fuse()) is not None:
        check_files(tmp_path / "shared" / "fsdp2")
        pytest.skip(reason)
    check_files(tmp_path / "behind_slow" / "fsdp2")
    check_faults([result["outcomes"] for result in results])


def check_files(path: Path) -> None:
    """All that was written of an average is the average, bit for bit."""
    wanted = load_file(path / "wanted")
    alone = Net()
    alone.load_state_dict(wanted)
    for name in ("ema", "background"):
        ema = ShardedEMA(alone, DECAY)
        torch.nn.init.zeros_(alone.emb.weight)
        ema.reset()
        ema.load(path / name)
        assert ema.step == STEPS
        same(ema.gather_state_dict(), wanted)
    for method in ("auto", "direct", "rank0"):
        exported = load_file(path / method / "model.safetensors")
        same(exported, {name: wanted[name] for name in wanted.keys() - ALIASES.keys()})


def check_faults(outcomes: list[list[dict[str, Any]]]) -> None:
    """Each call failed on all ranks or on none; then the old files are there, or the new ones."""
    for number, of_ranks in enumerate(zip(*outcomes, strict=True)):
        for call in ("save", "export", "load"):
            failed = {bool(outcome[call]) for outcome in of_ranks}
            assert len(failed) == 1, f"round {number}, {call}: {of_ranks}"
        on_rank_0 = of_ranks[0]
        for call, read in (("save", "saved"), ("export", "exported")):
            allowed = ("old", "new") if on_rank_0[call] else ("new",)
            assert on_rank_0[read] in allowed, f"round {number}, {call}: {on_rank_0}"
    for call in ("save", "export"):
        assert {bool(outcome[call]) for outcome in outcomes[0]} == {True, False}, call
