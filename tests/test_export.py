"""Exports: what the libraries that read them find is the gathered average, or nothing new."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from dist_ema.checkpoint import directory as files
from dist_ema.core import gather
from dist_ema.export import files as export_files
from tests.models import tiny_gpt2
from tests.net import ALIASES
from tests.read_exports import contents, written
from tests.runs import EXACT, live_state, start
from tests.worlds import World, evaluate, mesh, rank, worlds

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

a_few_worlds = worlds("plain", "plain_compiled", "ddp-2", "fsdp2-2", "fsdp2-3", "hsdp", "fsdp2_tp")


def unaliased(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in ALIASES}


@a_few_worlds
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_file_holds_the_gathered_average(world: World, dtype, tmp_path):
    run = start(world).train(2)
    state = run.ema.gather_state_dict(dtype=dtype)
    live = live_state(run.training)
    run.ema.export(tmp_path / "made" / "export", dtype=dtype)
    torch.testing.assert_close(live_state(run.training), live, **EXACT)
    if rank() != 0:
        return
    path = tmp_path / "made" / "export"
    assert [file.name for file in path.iterdir()] == [FILE]
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]
    with safe_open(path / FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        found = {name: file.get_tensor(name) for name in file.keys()}
    torch.testing.assert_close(found, unaliased(state), **EXACT)
    floats = {tensor.dtype for tensor in found.values() if tensor.is_floating_point()}
    assert floats == {dtype or torch.float32}
    if dtype is None:
        net = world.make_net(seed=1)
        missing, unexpected = load_model(net, path / FILE, strict=True)
        assert not set(missing) and not unexpected
        torch.testing.assert_close(dict(net.state_dict()), state, **EXACT)
        assert net.head.weight is net.emb.weight
        torch.testing.assert_close(evaluate(net), evaluate(world.plain_twin(state)), **EXACT)


@a_few_worlds
@pytest.mark.parametrize(("size", "limit"), [(500, 500), ("1KB", 1000), ("1 KiB", 1024)])
def test_files_are_split_at_the_asked_size_and_replaced(world: World, size, limit, tmp_path):
    run = start(world).train(1)
    state = run.ema.gather_state_dict()
    path = tmp_path / "export"
    run.ema.export(path, max_shard_size=size)
    if rank() == 0:
        check_split(path, limit, unaliased(state))
        (path / "tokenizer.json").write_text("{}")
    run.train(1)
    state = run.ema.gather_state_dict()
    run.ema.export(path)
    if rank() == 0:
        assert sorted(entry.name for entry in path.iterdir()) == [FILE, "tokenizer.json"]
        torch.testing.assert_close(written(path), unaliased(state), **EXACT)


def check_split(path: Path, limit: int, state: dict[str, Tensor]) -> None:
    index = json.loads((path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    of = f"of-{len(files):05d}.safetensors"
    assert files == [f"model-{i:05d}-{of}" for i in range(1, len(files) + 1)]
    assert sorted(file.name for file in path.iterdir()) == sorted([*files, INDEX])
    assert len(files) > 1
    total = 0
    for name in files:
        part = load_file(path / name)
        assert set(part) == {n for n, file in index["weight_map"].items() if file == name}
        nbytes = sum(tensor.nbytes for tensor in part.values())
        assert nbytes <= limit or len(part) == 1, (name, nbytes)
        total += nbytes
    assert index["metadata"]["total_size"] == total
    torch.testing.assert_close(written(path), state, **EXACT)


@worlds("plain", "ddp-2", "fsdp2-3", "hsdp", "fsdp2_tp")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_average_that_is_not_finite_is_refused_by_name(world: World, value: float, tmp_path):
    path = tmp_path / "export"
    run = start(world).train(1)
    run.ema.export(path, max_shard_size=1000)
    before = contents(path)
    with torch.no_grad():
        last_rows = run.training.parameters()["blocks.1.l1.weight"]
        last_rows = last_rows.to_local() if isinstance(last_rows, DTensor) else last_rows
        last_rows.masked_fill_(last_rows > 0, value)
    run.ema.update()
    with pytest.raises(ValueError, match=r"blocks\.1\.l1\.weight") as refusal:
        run.ema.export(path)
    assert "blocks.0" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"blocks\.1\.l1\.weight"):
        run.ema.export(tmp_path / "other")
    if dist.is_initialized():
        dist.barrier()
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


@worlds("plain", "fsdp2-2")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_shard_size", 0),
        ("max_shard_size", "lots"),
        ("max_shard_size", None),
        ("weights_name", "model.bin"),
        ("weights_name", "sub/model.safetensors"),
        ("method", "magic"),
        ("dtype", torch.int8),
        ("name", "slow"),
    ],
)
def test_a_bad_argument_is_refused_on_every_rank(world: World, option: str, value, tmp_path):
    run = start(world).train(1)
    with pytest.raises(ValueError, match="slow" if option == "name" else option):
        run.ema.export(tmp_path / "export", **{option: value})
    assert list(tmp_path.iterdir()) == []
    run.ema.gather_state_dict()


@worlds("plain", "ddp-2", "fsdp2-2")
def test_a_file_and_a_checkpoint_are_refused_as_paths_and_left(world: World, tmp_path):
    run = start(world).train(1)
    run.ema.save(tmp_path / "saved")
    if rank() == 0:
        (tmp_path / "file").write_text("precious")
        (tmp_path / "link").symlink_to("saved")
        before = contents(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="file"):
        run.ema.export(tmp_path / "file")
    for name in ("saved", "link"):
        with pytest.raises(ValueError, match=r"is a checkpoint of save\(\).* another directory"):
            run.ema.export(tmp_path / name)
    if rank() == 0:
        assert (tmp_path / "file").read_text() == "precious"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link", "saved"]
        assert contents(tmp_path / "saved") == before
    run.ema.save(tmp_path / "saved")
    run.ema.export(tmp_path / "export")


def sharded_gpt2() -> ShardedEMA:
    """An average that is neither the live weights nor where it started."""
    torch.manual_seed(0)
    shards = mesh((dist.get_world_size(),), ("shard",))
    ema = ShardedEMA(fully_shard(tiny_gpt2(), mesh=shards), 0.5)
    with torch.no_grad():
        for parameter in ema.model.parameters():
            parameter.mul_(1.5).add_(0.01)
    ema.update()
    return ema


class Wide(nn.Module):
    """Weights that cuts by columns scatter over many short runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 40)
        self.b = nn.Linear(40, 36, bias=False)
        self.conv = nn.Conv2d(3, 20, 3)
        self.cube = nn.Parameter(torch.randn(4, 6, 8))
        self.empty = nn.Parameter(torch.randn(0, 8))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scattered_pieces_are_joined_before_they_are_written(dtype, tmp_path):
    torch.manual_seed(0)
    shards = mesh((dist.get_world_size(),), ("shard",))
    net = Wide()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    by_last_dim = {net.a.weight: 1, net.b.weight: 1, net.cube: 2}

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(by_last_dim.get(parameter, 0))

    even = dist.get_world_size() == 2
    model = fully_shard(net, mesh=shards, shard_placement_fn=placement if even else None)
    ema = ShardedEMA(model)
    gathered: list[frozenset[str]] = []
    chunks = gather.Gatherer.chunks

    def noting(*args, only: frozenset[str], spread: bool):
        gathered.append(only)
        return chunks(*args, only=only, spread=spread)

    with (
        mock.patch.object(gather.Gatherer, "chunks", noting),
        mock.patch.object(gather, "_BUCKET_BYTES", 1000),
    ):
        ema.export(tmp_path / "direct", dtype=dtype, method="direct")
        assert gathered == ([frozenset({"a.weight", "b.weight", "cube"})] if even else [])
        ema.export(tmp_path / "rank0", dtype=dtype, method="rank0")
    if rank() == 0:
        found = written(tmp_path / "direct")
        wanted = {n: t if dtype is None else t.to(dtype) for n, t in state.items()}
        torch.testing.assert_close(found, wanted, **EXACT)
        assert contents(tmp_path / "direct") == contents(tmp_path / "rank0")


@pytest.mark.ranks(0)
def test_a_channels_last_weight_is_exported_row_major(tmp_path):
    conv = nn.Conv2d(3, 20, 3).to(memory_format=torch.channels_last)
    ShardedEMA(conv).export(tmp_path)
    torch.testing.assert_close(written(tmp_path), dict(conv.state_dict()), **EXACT)


@pytest.mark.ranks(2)
def test_rank0_writes_where_the_others_see_nothing(tmp_path):
    ema = sharded_gpt2()
    with (
        mock.patch.object(export_files.Writer, "sees_files", lambda self: rank() == 0),
        mock.patch.object(files, "VISIBLE_WITHIN_S", 0.2),
    ):
        ema.export(tmp_path / "auto")
        with pytest.raises(RuntimeError, match="these ranks do not see it: 1;"):
            ema.export(tmp_path / "direct", method="direct")
        ema.export(tmp_path / "rank0", method="rank0")
    if rank() == 0:
        assert contents(tmp_path / "auto") == contents(tmp_path / "rank0")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["auto", "rank0"]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ["direct", "rank0"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_rank_that_cannot_write_fails_all(method: str, failing: int, call: str, tmp_path):
    ema = sharded_gpt2()
    ema.export(tmp_path / "export")
    before = contents(tmp_path / "export")
    full = OSError(28, "No space left on device")
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(export_files, "_SYNC_BYTES", 1))
        if rank() == failing:
            patches.enter_context(mock.patch.object(export_files.os, call, side_effect=full))
        if method == "direct" or failing == 0:
            with pytest.raises(OSError, match="No space left"):
                ema.export(tmp_path / "export", method=method)
        else:
            ema.export(tmp_path / "export", method=method)
    if rank() == 0:
        assert contents(tmp_path / "export") == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["export"]
    ema.gather_state_dict()


@pytest.mark.ranks(0)
def test_names_that_the_state_dict_does_not_have_are_refused(tmp_path):
    class Renaming(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}kernel"] = destination.pop(f"{prefix}weight")

    ema = ShardedEMA(nn.Sequential(Renaming(2, 3)))
    with pytest.raises(ValueError, match=r"only in state_dict\(\) \['0\.kernel'\]"):
        ema.export(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_the_last_good_one():
    """A few of the kills that `python -m tests.kill --what export --kills 200` makes."""
    command = [sys.executable, "-m", "tests.kill", "--what", "export"]
    command += ["--kills", os.environ.get("KILLS", "8")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.ranks(0)
@pytest.mark.parametrize("path", [".", "sub/..", "../here", "link/here"])
def test_an_export_to_the_working_directory_leaves_all_else_and_its_mode(path: str, tmp_path):
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    (here / "link").symlink_to(tmp_path)
    (here / "precious").write_text("")
    here.chmod(0o775)
    inode = here.stat().st_ino
    ema = ShardedEMA(nn.Linear(2, 2))
    before = Path.cwd()
    os.chdir(here)
    try:
        for size in ("5GB", 1, "5GB"):
            ema.export(path, max_shard_size=size)
    finally:
        os.chdir(before)
    assert sorted(entry.name for entry in here.iterdir()) == ["link", FILE, "precious", "sub"]
    assert (here.stat().st_ino, here.stat().st_mode & 0o777) == (inode, 0o775)
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


@pytest.mark.ranks(0)
@pytest.mark.parametrize("size", ["5GB", 500])
def test_files_that_others_write_during_exports_are_never_lost(size, tmp_path):
    path, stop = tmp_path / "run", threading.Event()
    (path / "logs").mkdir(parents=True)
    (path / "runs.txt").write_text("")
    written_there: list[Path] = []

    def write_logs() -> None:
        while not stop.is_set():
            for directory in (path, path / "logs"):
                file = directory / f"events.{len(written_there)}"
                file.write_text("log")
                written_there.append(file)
                with (path / "runs.txt").open("a") as log:
                    log.write("line\n")

    writer = threading.Thread(target=write_logs)
    writer.start()
    try:
        ema = ShardedEMA(nn.Linear(20, 20))
        for i in range(10):
            ema.export(path, max_shard_size=size if i % 2 else "5GB")
    finally:
        stop.set()
        writer.join()
    assert len(written_there) > 20
    assert all(file.read_text() == "log" for file in written_there)
    assert (path / "runs.txt").read_text() == "line\n" * len(written_there)


@pytest.mark.ranks(2)
def test_ranks_that_export_to_different_paths_are_refused(tmp_path):
    ema = ShardedEMA(DistributedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"argument path is .*0 on rank 0 and .*1 on rank 1"):
        ema.export(tmp_path / str(rank()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(2)
def test_tensors_of_an_average_that_changed_meanwhile_are_refused():
    ema = sharded_gpt2()
    tensors = ema.gather_tensors()
    with ema.average_parameters():
        refused = pytest.raises(RuntimeError, match="inside average_parameters")
        with refused if rank() == 0 else contextlib.nullcontext():
            dict(tensors)
    tensors = ema.gather_tensors()
    ema.update()
    refused = pytest.raises(RuntimeError, match="was updated while")
    with refused if rank() == 0 else contextlib.nullcontext():
        dict(tensors)
    ema.gather_state_dict()
