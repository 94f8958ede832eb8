"""A save in the background has the values of the call, and ends well or is told of."""

from __future__ import annotations

import os
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
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from tests.cuts import TENSORS, beside, full, parts_of, seed_at, state_of, write

ROOT = Path(__file__).parents[1]
write_data = writer._Save.write


def writing(write):
    """While ranks write their files in this way."""
    return mock.patch.object(writer._Save, "write", write)


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
    assert seed_at(tmp_path / "a", ranks) == 4
    assert beside(tmp_path / "a") == []


@pytest.mark.ranks(2)
def test_what_follows_waits_for_the_save_before(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"

    def slow(self, *args):
        time.sleep(0.3)
        return write_data(self, *args)

    with writing(slow):
        first = write(path, ranks, seed=1, asynchronous=True)
        second = write(path, ranks, seed=2, asynchronous=True)
        assert first.done()
        assert not second.done()
        assert seed_at(path, ranks) == 2  # a load waits as well
        second.result()
        third = write(path, ranks, seed=3, asynchronous=True)
        with pytest.raises(TimeoutError, match="not written"):
            third.result(timeout=0.01)
        write(path, ranks, seed=4)
        assert third.done()
        assert seed_at(path, ranks) == 4
    dist.barrier()
    assert beside(path) == []


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("failing", [0, -1])
def test_a_failure_in_the_background_is_raised_on_every_rank(tmp_path: Path, failing: int):
    ranks, path = Group(), tmp_path / "a"
    saves = background.BackgroundSaves()
    write(path, ranks, seed=1)
    write_all = writer.write_all

    def fail(fd, data):
        raise OSError(28, "No space left on device")

    for asked in (True, False):
        fails = ranks.rank == failing % ranks.size
        with mock.patch.object(writer, "write_all", fail if fails else write_all):
            handle = write(path, ranks, seed=2, asynchronous=True, background=saves)
            if asked:
                with pytest.raises(CheckpointError, match=r"shard-.*No space left on device"):
                    handle.result()
            else:
                handle.join()
        dist.barrier()
        assert beside(path) == []
        if asked:
            assert seed_at(path, ranks) == 1
    with pytest.warns(UserWarning, match=r"earlier asynchronous save failed: .*No space left"):
        write(path, ranks, seed=3, background=saves)
    assert seed_at(path, ranks) == 3


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_without_progress_is_given_up_after_the_timeout(tmp_path: Path, stuck: int):
    ranks, path = Group(), tmp_path / "a"
    write(path, ranks, seed=1)

    def late(self, rank):
        report = write_data(self, rank)
        if rank == stuck:
            time.sleep(3)
        return report

    message = [
        [r"rank 0: has made no progress", "rank 1: ended before .* gave up"],
        [r"rank 1: has made no progress for 0.5 s", "rank 0 gave the save up before this rank"],
    ][stuck][ranks.rank == stuck]
    with writing(late):
        begun = time.monotonic()
        handle = write(path, ranks, seed=2, asynchronous=True, timeout=0.5)
        with pytest.raises(CheckpointError, match=message):
            handle.result()
        if ranks.rank != stuck:
            assert time.monotonic() - begun < 2.5
    dist.barrier()
    assert seed_at(path, ranks) == 1
    assert beside(path) == []


DYING = """
import os, signal, sys, time, torch, torch.distributed as dist
from pathlib import Path
from dist_ema.checkpoint import writer
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from tests.cuts import write

torch.set_num_threads(1)
directory, victim = Path(sys.argv[1]), int(sys.argv[2])
rank = 0
while rank < 2 and os.fork():
    rank += 1
if rank == 2:
    print(sorted(os.wait()[1] for _ in range(2)))
    sys.exit()
store = f"file://{directory}/store"
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=store)
write(directory / "a", Group(), seed=1)
write_data = writer._Save.write
def dying(self, rank):
    report = write_data(self, rank)
    if rank == victim:
        if os.fork() == 0:  # a child, as a data loader's worker, that lives on
            while not (directory / "end").exists():
                time.sleep(0.05)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    return report
writer._Save.write = dying
handle, begun = write(directory / "a", Group(), seed=2, asynchronous=True), time.monotonic()
try:
    handle.result()
except CheckpointError as error:
    assert f"rank {victim}: " in str(error) and " ended before " in str(error), error
    assert time.monotonic() - begun < 10
    os._exit(0)
os._exit(1)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_noticed_and_named(tmp_path: Path, victim: int):
    command = [sys.executable, "-c", DYING, tmp_path, str(victim)]
    with open(tmp_path / "out", "w+") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, check=True, timeout=100)
        out.seek(0)
        assert out.read().splitlines()[-1] == "[0, 9]"  # gloo may write lines of its own before
    assert seed_at(tmp_path / "a", Group.alone()) == 1
    (tmp_path / "end").touch()
    time.sleep(0.5)  # for the child to end, which holds the lock of rank 0's directories
    write(tmp_path / "a", Group.alone(), seed=3)
    assert seed_at(tmp_path / "a", Group.alone()) == 3
    assert beside(tmp_path / "a") == ["end", "out", "store"]


@pytest.mark.ranks(2)
def test_a_rank_that_cannot_create_its_file_is_told_of_on_every_rank(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path, ranks, seed=1)
    reserve = background._reserve

    def refuse(file):
        if ranks.rank == 1:
            raise PermissionError(13, "Permission denied", str(file))
        return reserve(file)

    with mock.patch.object(background, "_reserve", refuse):
        with pytest.raises(CheckpointError, match=r"rank 1: .*\.rank-1: Permission denied"):
            write(path, ranks, seed=2, asynchronous=True)
    dist.barrier()
    assert seed_at(path, ranks) == 1
    assert beside(path) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize("filling", [0, 1])
def test_a_full_disk_is_told_of_on_every_rank(tmp_path: Path, filling: int):
    """Full to the last byte while the data are written, and still full when the end is told."""
    ranks, disk = Group(), tmp_path / "disk"
    path = disk / "a"
    if ranks.rank == 0:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
        subprocess.run(command, check=False, capture_output=True)
    dist.barrier()
    if not os.path.ismount(disk):
        pytest.skip("mounting a tmpfs is not allowed")

    def fill_disk():
        with open(disk / "filler", "ab", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1000))

    def fill(self, rank):
        if rank == filling:
            fill_disk()
            return write_data(self, rank)
        while not (disk / "filler").exists():
            time.sleep(0.01)
        return []

    try:
        write(path, ranks, seed=1)
        with writing(fill):
            begun = time.monotonic()
            handle = write(path, ranks, seed=2, asynchronous=True)
            with pytest.raises(CheckpointError, match=r"shard-.*No space left on device"):
                handle.result()
            assert time.monotonic() - begun < 5
        assert seed_at(path, ranks) == 1
        dist.barrier()
        assert beside(path) == ["filler"]
        if ranks.rank == 0:
            fill_disk()
        dist.barrier()
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(path, ranks, seed=2, asynchronous=True)  # refused while ranks meet
        assert seed_at(path, ranks) == 1
    finally:
        dist.barrier()
        if ranks.rank == 0:
            subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("ending", ["well", "badly"])
def test_a_rank_that_looks_too_late_finds_out_by_itself(tmp_path: Path, ending: str):
    ranks, path = Group(), tmp_path / "a"
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
        mock.patch.object(writer._Save, "finish", finish if ending == "well" else fail),
    ):
        handle = write(path, ranks, seed=2, asynchronous=True)
        if ending == "well":
            handle.result()
        else:
            with pytest.raises(CheckpointError, match=r"gave the save up|Input/output error"):
                handle.result()
    dist.barrier()
    assert path.exists() == (ending == "well")
    assert beside(path) == []


AT_EXIT = """
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from dist_ema.checkpoint import writer
from dist_ema.core.group import Group
from tests.cuts import write

torch.set_num_threads(1)
directory = Path(sys.argv[1])
jobs = [(ending, rank) for ending in ("well", "badly") for rank in range(2)]
children = []
for ending, rank in jobs:
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
write(directory / ending / "a", Group(), seed=3, asynchronous=True)
dist.destroy_process_group()
"""


def test_the_interpreter_waits_for_the_save_or_says_what_is_lost(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], cwd=ROOT, timeout=100)
    assert done.returncode == 0
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert said["well-0"] == said["well-1"] == ""
    assert seed_at(tmp_path / "well" / "a", Group.alone()) == 3
    for rank in range(2):
        assert f"the save of {tmp_path}/badly/a is lost: " in said[f"badly-{rank}"]
        assert "No space left on device" in said[f"badly-{rank}"]
    assert [p.name for p in (tmp_path / "well").iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "badly").iterdir()] == []
