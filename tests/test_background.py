"""A save in the background has the values of the call, and ends well or raises on every rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_ema.checkpoint import background, writer
from dist_ema.checkpoint import directory as files
from dist_ema.checkpoint.reader import Checkpoint, problems
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from tests.cuts import TENSORS, beside, full, parts_of, seed_at, small_disk, state_of, write
from tests.kill import start_child

ROOT = Path(__file__).parents[1]
write_data = writer._Save.write


def writing(write):
    """While ranks write their files in this way."""
    return mock.patch.object(writer._Save, "write", write)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.ranks(0, 2)
def test_a_save_in_the_background_has_the_values_of_the_call(tmp_path: Path):
    ranks, state = Group(), state_of(step=4)
    parts = parts_of("flat", TENSORS, full(TENSORS, 4), ranks)
    handle = save(tmp_path / "a", {"ema": parts}, TENSORS, state, ranks, asynchronous=True)
    for part in parts:
        part.view.fill_(-1)
    state["step"] = 5
    if ranks.size > 1:
        for i in range(50):  # what training does meanwhile
            ones = torch.full((1000,), float(i))
            dist.all_reduce(ones)
            assert ones[0] == i * ranks.size
    handle.result()
    assert handle.done()
    assert seed_at(tmp_path / "a") == 4
    assert beside(tmp_path / "a") == []


@pytest.mark.ranks(2)
def test_what_follows_waits_for_the_save_before(tmp_path: Path):
    path = tmp_path / "a"

    def slow(self, *args):
        time.sleep(0.3)
        return write_data(self, *args)

    with writing(slow):
        first = write(path, seed=1, asynchronous=True)
        second = write(path, seed=2, asynchronous=True)
        assert first.done()
        assert not second.done()
        assert seed_at(path) == 2  # a load waits as well
        second.result()
        third = write(path, seed=3, asynchronous=True)
        with pytest.raises(TimeoutError, match="not written"):
            third.result(timeout=0.01)
        write(path, seed=4)
        assert third.done()
        assert seed_at(path) == 4
    dist.barrier()
    assert beside(path) == []


@pytest.mark.parametrize(("num_ranks", "failing"), [(1, 0), (3, 0), (3, 2)])
def test_a_failure_in_the_background_is_raised_on_every_rank(tmp_path: Path, failing: int):
    ranks, path = Group(), tmp_path / "a"
    saves, write_all = background.BackgroundSaves(), writer.write_all
    write(path, seed=1)

    def fail(fd, data):
        raise OSError(28, "No space left on device")

    for is_asked in (True, False):
        fails = ranks.rank == failing
        with mock.patch.object(writer, "write_all", fail if fails else write_all):
            handle = write(path, seed=2, asynchronous=True, background=saves)
            if is_asked:
                with pytest.raises(CheckpointError, match=r"shard-.*No space left on device"):
                    handle.result()
            else:
                handle.join()
        dist.barrier()
        assert beside(path) == []
        if is_asked:
            assert seed_at(path) == 1
    with pytest.warns(UserWarning, match=r"earlier asynchronous save failed: .*No space left"):
        write(path, seed=3, background=saves)
    assert seed_at(path) == 3


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_without_progress_is_given_up_after_the_timeout(tmp_path: Path, stuck: int):
    ranks, path = Group(), tmp_path / "a"
    write(path, seed=1)

    def late(self, rank):
        report = write_data(self, rank)
        if rank == stuck:
            wait_for(tmp_path / "given_up")
        return report

    message = [
        [r"rank 0: has made no progress", "rank 1: ended before .* gave up"],
        [r"rank 1: has made no progress for 0.5 s", "rank 0 gave the save up before this rank"],
    ][stuck][ranks.rank == stuck]
    with writing(late):
        handle = write(path, seed=2, asynchronous=True, timeout=0.5)
        with pytest.raises(CheckpointError, match=message):
            handle.result()
        (tmp_path / "given_up").touch()
    dist.barrier()
    assert seed_at(path) == 1
    assert beside(path) == ["given_up"]


@pytest.mark.ranks(0)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_noticed_and_named(tmp_path: Path, victim: int):
    path, end = tmp_path / "a", tmp_path / "end"

    def dying(self, rank):
        report = write_data(self, rank)
        if rank == victim:
            # A child, as a data loader's worker, that lives on.
            start_child(lambda: wait_for(end))
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    def rank_main(rank: int) -> None:
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", rank=rank, world_size=2, init_method=store)
        write(path, seed=1)
        with writing(dying):
            handle, begun = write(path, seed=2, asynchronous=True), time.monotonic()
            with pytest.raises(CheckpointError, match=f"rank {victim}: ended before "):
                handle.result()
            assert time.monotonic() - begun < 10

    ranks = [start_child(lambda rank=rank: rank_main(rank)) for rank in range(2)]
    assert sorted(os.waitpid(rank, 0)[1] for rank in ranks) == [0, signal.SIGKILL]
    assert seed_at(path, Group.alone()) == 1
    end.touch()
    time.sleep(0.5)  # for the child to end, which holds the lock of rank 0's directories
    write(path, Group.alone(), seed=3)
    assert seed_at(path, Group.alone()) == 3
    assert beside(path) == ["end", "store"]


@pytest.mark.ranks(2)
def test_a_rank_that_cannot_create_its_file_is_named_on_every_rank(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path, seed=1)
    reserve = background._reserve

    def refuse(file):
        if ranks.rank == 1:
            raise PermissionError(13, "Permission denied", str(file))
        return reserve(file)

    with mock.patch.object(background, "_reserve", refuse):
        with pytest.raises(CheckpointError, match=r"rank 1: .*\.rank-1: Permission denied"):
            write(path, seed=2, asynchronous=True)
    dist.barrier()
    assert seed_at(path) == 1
    assert beside(path) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize("filling", [0, 1])
def test_a_full_disk_is_an_error_on_every_rank(tmp_path: Path, filling: int):
    """Full to the last byte while the data are written, and still full when the end is reported."""
    ranks, disk = Group(), tmp_path / "disk"
    path = disk / "a"

    def fill_disk():
        with open(disk / "filler", "ab", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1000))

    def fill(self, rank):
        if rank == filling:
            fill_disk()
            return write_data(self, rank)
        wait_for(disk / "filler")
        return []

    with small_disk(disk, "512k"):
        write(path, seed=1)
        with writing(fill):
            begun = time.monotonic()
            handle = write(path, seed=2, asynchronous=True)
            with pytest.raises(CheckpointError, match=r"shard-.*No space left on device"):
                handle.result()
            assert time.monotonic() - begun < 5
        assert seed_at(path) == 1
        dist.barrier()
        assert beside(path) == ["filler"]
        if ranks.rank == 0:
            fill_disk()
        dist.barrier()
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(path, seed=2, asynchronous=True)  # refused while ranks meet
        assert seed_at(path) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("ends_well", [True, False])
def test_a_rank_that_looks_too_late_finds_out_by_itself(tmp_path: Path, ends_well: bool):
    path = tmp_path / "a"
    outcome, finish = background.StatusFiles.outcome, writer._Save.finish

    def late(self, is_in_place):
        while self._directory.exists():
            time.sleep(0.01)
        return outcome(self, is_in_place)

    def fail(self, reports):
        raise OSError(5, "Input/output error", "manifest.json")

    with (
        mock.patch.object(background.StatusFiles, "outcome", late),
        mock.patch.object(background, "_ACKNOWLEDGE_S", 0.05),
        mock.patch.object(files, "VISIBLE_WITHIN_S", 0.05),
        mock.patch.object(writer._Save, "finish", finish if ends_well else fail),
    ):
        handle = write(path, seed=2, asynchronous=True)
        if ends_well:
            handle.result()
        else:
            with pytest.raises(CheckpointError, match=r"gave the save up|Input/output error"):
                handle.result()
    dist.barrier()
    assert path.exists() == ends_well
    assert beside(path) == []


AT_EXIT = """
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from dist_ema.checkpoint import writer
from dist_ema.core.group import Group
from tests.cuts import write

torch.set_num_threads(1)
directory = Path(sys.argv[1])
children = []
for ending, rank in [(ending, rank) for ending in ("well", "badly") for rank in range(2)]:
    if (pid := os.fork()) == 0:
        break
    children.append(pid)
else:
    for pid in children:
        os.waitpid(pid, 0)
    os._exit(0)

os.dup2(os.open(directory / f"{ending}-{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
store = f"file://{directory}/{ending}.store"
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=store)
write_data = writer._Save.write
def slow(self, *args):
    time.sleep(0.5)
    if ending == "badly" and rank == 1:
        raise OSError(28, "No space left on device", "shard")
    return write_data(self, *args)
writer._Save.write = slow
write(directory / ending / "a", seed=3, asynchronous=True)
dist.destroy_process_group()
"""


def test_the_interpreter_waits_for_the_save_or_says_what_is_lost(tmp_path: Path):
    subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], cwd=ROOT, timeout=100, check=True)
    printed = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert printed["well-0"] == printed["well-1"] == ""
    assert seed_at(tmp_path / "well" / "a", Group.alone()) == 3
    for rank in range(2):
        assert f"the save of {tmp_path}/badly/a is lost: " in printed[f"badly-{rank}"]
        assert "No space left on device" in printed[f"badly-{rank}"]
    assert [p.name for p in (tmp_path / "well").iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "badly").iterdir()] == []


def test_a_save_in_an_exit_handler_is_complete(tmp_path: Path):
    """The interpreter has waited for its threads already."""
    program = (
        "import atexit, sys, torch; from dist_ema import ShardedEMA;"
        "ema = ShardedEMA(torch.nn.Linear(300, 300));"
        "atexit.register(ema.save, sys.argv[1], asynchronous=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "a"], cwd=ROOT, timeout=100)
    if sys.version_info[:2] != (3, 12):  # which starts no thread then
        assert ended.returncode == 0 and not list(problems(Checkpoint(tmp_path / "a")))
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
