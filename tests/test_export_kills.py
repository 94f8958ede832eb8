"""Exports that are killed before each change to the directory: readers find the old or the new."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.export import files as export_files
from tests.kill import start_child
from tests.models import build, load

# Calls that change the directory, and those that write values to a hidden one. open() is among them
# for the lock.
CALLS = ("replace", "rename", "symlink", "link", "unlink", "mkdir", "rmdir", "open", "pwrite")
SIZES = {"gpt2": ("4KB", "2KB"), "unet": ("8KB", "4KB"), "plain": (300, 200)}
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
        for name in calls:
            setattr(os, name, counted(name))
        body()

    status = os.waitpid(start_child(patched), 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


# One file, n and m files; before that, what else differs.
CASES = [
    *(("plain", case) for case in ("1 -> 1", "1 -> n", "n -> 1", "n -> m", "n -> n")),
    *(("plain", "dtype 1 -> 1"), ("gpt2", "dtype 1 -> 1"), ("gpt2", "dtype 1 -> m")),
    *(("gpt2", case) for case in ("1 -> n", "n -> 1", "n -> m", "config 1 -> 1", "nothing -> 1")),
    *(("unet", case) for case in ("1 -> n", "n -> 1")),  # diffusers prefers an index
]


def options_of(name: str, case: str) -> list[dict[str, object]]:
    """Of the old export and the new one."""
    *change, old, _, new = case.split()
    sizes = dict(zip("nm", SIZES[name], strict=True))
    dtypes = (HALF, torch.float32) if change == ["dtype"] else (None, None)
    return [
        {"max_shard_size": sizes.get(number, "5GB"), "dtype": dtype}
        for number, dtype in zip((old, new), dtypes, strict=True)
    ]


@pytest.mark.ranks(0)
@pytest.mark.timeout_s(180)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_whenever_an_export_is_killed_one_export_is_read(name: str, case: str, tmp_path: Path):
    changed = {"summary_type": "mean"} if "config" in case else {}
    first, second = average_of(name, 2.0), average_of(name, 3.0, **changed)
    old, new = options_of(name, case)
    path, is_first = tmp_path / "export", case == "nothing -> 1"
    first.export(tmp_path / "old", **old)
    second.export(tmp_path / "new", **new)
    files = [{} if is_first else visible(tmp_path / "old"), visible(tmp_path / "new")]
    outcomes = [loaded(name, tmp_path / which) for which in ("old", "new")]
    assert not same(*outcomes)
    foreign = path / "logs" / "events"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("log")
    states = set()
    # Values of a library's model are written as those of a plain one.
    calls = CALLS if name == "plain" else CALLS[:-1]
    for call in itertools.count():
        if not is_first:
            first.export(path, **old)
            assert visible(path) == files[0]
        if not killed_before(call, lambda: second.export(path, **new), calls):
            break
        now = visible(path)
        assert now in files, f"killed before call {call}: {sorted(now)}"
        state = (now == files[1], any(entry.is_symlink() for entry in path.iterdir()))
        if state not in states and now:
            assert same(loaded(name, path), outcomes[now == files[1]])
            states.add(state)
        assert foreign.read_text() == "log"
        if is_first:
            second.export(path, **new)
            for file in files[1]:
                (path / file).unlink()
    assert visible(path) == files[1]
    assert sorted(e.name for e in path.iterdir()) == sorted([*files[1], "logs"])
    is_one_file = name == "plain" and case.endswith("1 -> 1")
    assert states >= ({(False, False)} if is_one_file else {(True, True)})
    assert is_one_file or is_first or (False, True) in states


def without_links(*args: object, **options: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.ranks(0)
@pytest.mark.parametrize("missing", ["symlink", "link"])
def test_without_links_a_killed_export_is_never_a_mixture(missing: str, tmp_path: Path):
    first, second = average_of("gpt2", 2.0), average_of("gpt2", 3.0)
    old, new = {"dtype": HALF, "max_shard_size": "4KB"}, {"max_shard_size": "4KB"}
    path, unreadable = tmp_path / "export", 0
    second.export(tmp_path / "new", **new)
    first.export(tmp_path / "old", **old)
    files = [visible(tmp_path / "new"), visible(tmp_path / "old")]
    with mock.patch.object(export_files.os, missing, without_links):
        for call in itertools.count():
            first.export(path, **old)
            assert visible(path) == files[1]
            if not killed_before(call, lambda: second.export(path, **new)):
                break
            if visible(path) not in files:
                with pytest.raises((OSError, ValueError)):
                    loaded("gpt2", path)
                unreadable += 1
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
    path, wholes = tmp_path / "export", []
    for i, (average, option) in enumerate(itertools.product(averages, options)):
        average.export(tmp_path / str(i), **option)
        wholes.append(visible(tmp_path / str(i)))

    def work(average: ShardedEMA) -> None:
        for i in range(20):
            average.export(path, **options[i % 3])

    for _ in range(2):
        if by == "processes":
            children = [start_child(lambda a=average: work(a)) for average in averages]
            assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        else:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(work, averages))
        assert visible(path) in wholes
        assert {entry.name for entry in path.iterdir()} == visible(path).keys()


@pytest.mark.ranks(0)
@pytest.mark.parametrize(("size", "own_size"), [("5GB", 300), (100, "5GB")])
def test_weights_of_others_that_loaders_may_prefer_are_refused(size, own_size, tmp_path: Path):
    from huggingface_hub import save_torch_state_dict

    average = average_of("plain", 2.0)
    save_torch_state_dict(plain_model().state_dict(), tmp_path, max_shard_size=size)
    before = visible(tmp_path)
    with pytest.raises(ValueError, match="was not written by export"):
        average.export(tmp_path, max_shard_size=own_size)
    assert visible(tmp_path) == before
    average.export(tmp_path, max_shard_size=size)  # the same names: replaced
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
