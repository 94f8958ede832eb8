"""Exports that are killed before each change to the directory: readers find the old or the new."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.export import files as export_files
from tests.models import build, load

# Calls that change the directory, and those that write values to a hidden one. open() is among them
# for the lock.
CALLS = ("replace", "rename", "symlink", "link", "unlink", "mkdir", "rmdir", "open", "pwrite")
SIZES = {"gpt2": ("4KB", "2KB"), "unet": ("8KB", "4KB"), "plain": (300, 200)}
ONE = "5GB"
HALF = torch.bfloat16


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def average_of(name: str, factor: float, **config: object) -> ShardedEMA:
    model = plain_model() if name == "plain" else build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    for key, value in config.items():
        setattr(model.config, key, value)
    return ShardedEMA(model)


def visible(path: Path) -> dict[str, bytes]:
    """What readers find: the files of a directory, through links."""
    files = [file for file in path.iterdir() if file.is_file() and file.name[0] != "."]
    return {file.name: file.read_bytes() for file in files}


def loaded(name: str, path: Path) -> dict[str, torch.Tensor]:
    """What the library's own loader reads."""
    if name != "plain":
        return dict(load(name, str(path), None).state_dict())
    ema = ShardedEMA(plain_model())
    ema.load(path)
    return ema.gather_state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def start_child(body: Callable[[], object]) -> int:
    """Run in a forked process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def killed_before(
    call: int, body: Callable[[], object], calls: tuple[str, ...] = CALLS[:-1]
) -> bool:
    """Whether the body, in a child, was killed before its n-th call."""

    lock = threading.Lock()  # values are written on threads

    def counted(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def wrapper(*args: object, **options: object) -> object:
            nonlocal call
            if name != "open" or (len(args) > 1 and args[1] & os.O_CREAT):  # type: ignore[operator]
                with lock:
                    if call == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    call -= 1
            return original(*args, **options)

        return wrapper

    def patched() -> None:
        os.fsync = lambda fd: None  # type: ignore[assignment]  # a killed process loses no page
        for name in calls:
            setattr(os, name, counted(name))
        body()

    status = os.waitpid(start_child(patched), 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


CASES = [
    *(("plain", case) for case in ("1 -> 1", "1 -> n", "n -> 1", "n -> m", "n -> n", "dtype")),
    *(("gpt2", case) for case in ("1 -> 1", "1 -> n", "n -> 1", "n -> m", "n -> n", "dtype")),
    *(("gpt2", case) for case in ("config", "dtype, 1 -> n", "nothing -> 1")),
    *(("unet", case) for case in ("1 -> n", "n -> 1")),  # diffusers prefers an index
]


def options_of(name: str, case: str) -> tuple[dict[str, object], dict[str, object]]:
    many, more = SIZES[name]
    old, new = {
        "1 -> n": (ONE, many),
        "dtype, 1 -> n": (ONE, more),
        "n -> 1": (many, ONE),
        "n -> m": (many, more),
        "n -> n": (many, many),
    }.get(case, (ONE, ONE))
    dtypes = (HALF, torch.float32) if "dtype" in case else (None, None)
    return {"max_shard_size": old, "dtype": dtypes[0]}, {"max_shard_size": new, "dtype": dtypes[1]}


@pytest.mark.ranks(0)
@pytest.mark.timeout_s(180)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_whenever_an_export_is_killed_one_export_is_read(name: str, case: str, tmp_path: Path):
    torch.set_num_threads(1)
    changed = {"summary_type": "mean"} if case == "config" else {}
    first, second = average_of(name, 2.0), average_of(name, 3.0, **changed)
    old, new = options_of(name, case)
    path = tmp_path / "export"
    is_first = case == "nothing -> 1"
    first.export(tmp_path / "old", **old)
    second.export(tmp_path / "new", **new)
    files = [{} if is_first else visible(tmp_path / "old"), visible(tmp_path / "new")]
    outcomes = [loaded(name, tmp_path / which) for which in ("old", "new")]
    assert not same(*outcomes)
    foreign = path / "logs" / "events"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("log")
    call, states = 0, set()
    # Values of a library's model are written as those of a plain one.
    calls = CALLS if name == "plain" else CALLS[:-1]
    while True:
        if not is_first:
            first.export(path, **old)
            assert visible(path) == files[0]
        if not killed_before(call, lambda: second.export(path, **new), calls):
            break
        found = visible(path)
        assert found in files, f"killed before call {call}: {sorted(found)}"
        state = (found == files[1], any(entry.is_symlink() for entry in path.iterdir()))
        if state not in states and found:
            assert same(loaded(name, path), outcomes[found == files[1]])
            states.add(state)
        assert foreign.read_text() == "log"
        call += 1
        if is_first:
            second.export(path, **new)
            for file in files[1]:
                (path / file).unlink()
    assert visible(path) == files[1]
    assert sorted(e.name for e in path.iterdir()) == sorted([*files[1], "logs"])
    is_one_file = case == "1 -> 1" or (case == "dtype" and name != "gpt2")
    assert states >= ({(False, False)} if is_one_file else {(True, True)})
    assert is_one_file or is_first or (False, True) in states


def without_links(*args: object, **options: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.ranks(0)
@pytest.mark.parametrize("missing", ["symlink", "link"])
def test_without_links_a_killed_export_is_never_a_mixture(missing: str, tmp_path: Path):
    torch.set_num_threads(1)
    first, second = average_of("gpt2", 2.0), average_of("gpt2", 3.0)
    old, new = {"dtype": HALF, "max_shard_size": "4KB"}, {"max_shard_size": "4KB"}
    path = tmp_path / "export"
    second.export(tmp_path / "reference", **new)
    files = [visible(tmp_path / "reference")]
    call = unreadable = 0
    with mock.patch.object(export_files.os, missing, without_links):
        while True:
            first.export(path, **old)
            if len(files) == 1:
                files.append(visible(path))
            assert visible(path) == files[1]
            if not killed_before(call, lambda: second.export(path, **new)):
                break
            if visible(path) not in files:
                with pytest.raises((OSError, ValueError)):
                    loaded("gpt2", path)
                unreadable += 1
            call += 1
    assert visible(path) == files[0] and unreadable
    assert sorted(entry.name for entry in path.iterdir()) == sorted(files[0])


@pytest.mark.ranks(0)
@pytest.mark.parametrize("links", [True, False])
def test_an_error_while_files_are_replaced_leaves_the_old_export(links: bool, tmp_path: Path):
    first, second = average_of("plain", 2.0), average_of("plain", 3.0)
    first.export(tmp_path, max_shard_size=300)
    before = visible(tmp_path)
    rename, symlink, count = os.rename, os.symlink, 0

    def failing(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: object) -> None:
            nonlocal count
            count += 1
            if count == (4 if links else len(before) + 1):  # the second new file, if no links
                raise OSError(28, "No space left on device")
            original(*args)

        return wrapper

    with (
        mock.patch.object(export_files.os, "symlink", failing(symlink) if links else without_links),
        mock.patch.object(export_files.os, "rename", rename if links else failing(rename)),
        pytest.raises(OSError, match="No space left"),
    ):
        second.export(tmp_path, max_shard_size=300)
    assert visible(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(before)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("by", ["threads", "processes"])
def test_two_exports_to_one_path_follow_each_other(by: str, tmp_path: Path):
    averages = [average_of("plain", factor) for factor in (2.0, 3.0)]
    options = [{"max_shard_size": 300}, {"max_shard_size": 200}, {}]
    path = tmp_path / "export"
    wholes = []
    for i, average in enumerate(averages):
        for j, option in enumerate(options):
            average.export(tmp_path / f"{i}{j}", **option)
            wholes.append(visible(tmp_path / f"{i}{j}"))
    torch.set_num_threads(1)

    def work(average: ShardedEMA) -> None:
        for i in range(20):
            average.export(path, **options[i % 3])

    for _ in range(3):
        if by == "processes":
            children = [start_child(lambda a=average: work(a)) for average in averages]
            assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        else:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(work, averages))
        assert visible(path) in wholes
        assert {entry.name for entry in path.iterdir()} == visible(path).keys()


@pytest.mark.ranks(0)
@pytest.mark.parametrize(("theirs", "ours"), [("5GB", 300), (100, "5GB")])
def test_weights_of_others_that_loaders_may_prefer_are_refused(theirs, ours, tmp_path: Path):
    from huggingface_hub import save_torch_state_dict

    average = average_of("plain", 2.0)
    save_torch_state_dict(plain_model().state_dict(), tmp_path, max_shard_size=theirs)
    before = visible(tmp_path)
    with pytest.raises(ValueError, match="was not written by export"):
        average.export(tmp_path, max_shard_size=ours)
    assert visible(tmp_path) == before
    average.export(tmp_path, max_shard_size=theirs)  # the same names: replaced
    assert visible(tmp_path).keys() >= before.keys()


@pytest.mark.ranks(0)
def test_weights_that_appear_during_an_export_are_not_removed(tmp_path: Path):
    average = average_of("plain", 2.0)
    write_chunk = export_files.Writer.write_chunk

    def with_another_writer(*args: object) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"raw weights")
        write_chunk(*args)

    with (
        mock.patch.object(export_files.Writer, "write_chunk", with_another_writer),
        pytest.raises(ValueError, match="was not written by export"),
    ):
        average.export(tmp_path, max_shard_size=300)
    assert visible(tmp_path) == {"model.safetensors": b"raw weights"}
    assert len(list(tmp_path.iterdir())) == 1
