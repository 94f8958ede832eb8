"""Exports: what the libraries that read them find is the gathered average, or nothing new."""

from __future__ import annotations

import contextlib
import json
import os
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

from dist_ema import ShardedEMA
from dist_ema.checkpoint import directory as files
from dist_ema.core import gather
from dist_ema.export import files as export_files
from tests.models import tiny_gpt2
from tests.net import ALIASES
from tests.read_exports import contents, written
from tests.runs import a_few_worlds, live_state, same, start
from tests.worlds import World, barrier, evaluate, mesh, rank, worlds

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def unaliased(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in ALIASES}


@worlds("plain", "plain_compiled", "fsdp2-2")
def test_the_file_is_the_model_with_the_averaged_weights(world: World, tmp_path: Path):
    run = start(world).train(2)
    state, live = run.ema.gather_state_dict(), live_state(run.training)
    path = tmp_path / "made" / "export"
    run.ema.export(path)
    same(live_state(run.training), live)
    if rank() != 0:
        return
    assert [file.name for file in path.iterdir()] == [FILE]
    assert [entry.name for entry in path.parent.iterdir()] == ["export"]
    with safe_open(path / FILE, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    net = world.make_net(seed=1)
    missing, unexpected = load_model(net, path / FILE, strict=True)
    assert not set(missing) and not unexpected
    same(dict(net.state_dict()), state)
    assert net.head.weight is net.emb.weight
    same(evaluate(net), evaluate(world.plain_twin(state)))


@worlds("plain", "fsdp2-2")
@pytest.mark.parametrize(("size", "limit"), [(500, 500), ("1KB", 1000), ("1 KiB", 1024)])
def test_files_are_split_at_the_asked_size_and_replaced(world: World, size, limit, tmp_path: Path):
    run, path = start(world).train(1), tmp_path / "export"
    state = run.ema.gather_state_dict()
    run.ema.export(path, max_shard_size=size)
    if rank() == 0:
        check_split(path, limit)
        same(written(path), unaliased(state))
        (path / "tokenizer.json").write_text("{}")
    run.train(1)
    state = run.ema.gather_state_dict()
    run.ema.export(path)
    if rank() == 0:
        assert sorted(entry.name for entry in path.iterdir()) == [FILE, "tokenizer.json"]
        same(written(path), unaliased(state))


def check_split(path: Path, limit: int) -> None:
    index = json.loads((path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    number = len(names)
    assert number > 1
    assert names == [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]
    assert sorted(file.name for file in path.iterdir()) == sorted([*names, INDEX])
    total = 0
    for name in names:
        part = load_file(path / name)
        assert set(part) == {n for n, file in index["weight_map"].items() if file == name}
        nbytes = sum(tensor.nbytes for tensor in part.values())
        assert nbytes <= limit or len(part) == 1, (name, nbytes)
        total += nbytes
    assert index["metadata"]["total_size"] == total


@a_few_worlds
def test_an_average_that_is_not_finite_is_refused_by_name(world: World, tmp_path: Path):
    value = {"ddp": torch.inf, "hsdp": -torch.inf}.get(world.name, torch.nan)
    path = tmp_path / "export"
    run = start(world).train(1)
    run.ema.export(path, max_shard_size=1000)
    before = contents(path)
    with torch.no_grad():
        last_rows = run.training.parameters()["blocks.1.l1.weight"]
        last_rows = last_rows.to_local() if isinstance(last_rows, DTensor) else last_rows
        last_rows.masked_fill_(last_rows > 0, value)
    run.ema.update()
    for place in (path, tmp_path / "other"):
        with pytest.raises(ValueError, match=r"blocks\.1\.l1\.weight") as refusal:
            run.ema.export(place)
        assert "blocks.0" not in str(refusal.value)
    barrier()
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]


@worlds("fsdp2-2")
def test_a_bad_argument_is_refused_on_every_rank(world: World, tmp_path: Path):
    run = start(world).train(1)
    for option, value in (
        ("max_shard_size", 0),
        ("max_shard_size", "lots"),
        ("max_shard_size", None),
        ("weights_name", "model.bin"),
        ("weights_name", "sub/model.safetensors"),
        ("method", "magic"),
        ("dtype", torch.int8),
        ("name", "slow"),
    ):
        with pytest.raises(ValueError, match="slow" if option == "name" else option):
            run.ema.export(tmp_path / "export", **{option: value})
    with pytest.raises(ValueError, match=r"argument path is .*0 on rank 0 and .*1 on rank 1"):
        run.ema.export(tmp_path / str(rank()))
    assert list(tmp_path.iterdir()) == []
    run.ema.gather_state_dict()


@worlds("plain", "fsdp2-2")
def test_a_file_and_a_checkpoint_are_refused_as_paths_and_left(world: World, tmp_path: Path):
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
        exported = written(tmp_path / "direct")
        same(exported, {n: t if dtype is None else t.to(dtype) for n, t in state.items()})
        assert contents(tmp_path / "direct") == contents(tmp_path / "rank0")


@pytest.mark.ranks(0)
def test_a_channels_last_weight_is_exported_row_major(tmp_path):
    conv = nn.Conv2d(3, 20, 3).to(memory_format=torch.channels_last)
    ShardedEMA(conv).export(tmp_path)
    same(written(tmp_path), dict(conv.state_dict()))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("host", ["node", "node-{}"])
def test_rank_0_writes_where_ranks_see_different_directories(host: str, tmp_path: Path):
    """The same path leads each rank to a directory of its own, as local disks do."""
    own, before, ema = tmp_path / str(rank()), Path.cwd(), sharded_gpt2()
    ema.export(tmp_path / "wanted", method="rank0")
    own.mkdir()
    if rank() == 1:
        (own / "auto").mkdir()
        (own / "auto" / FILE).write_bytes(b"of rank 1")
    os.chdir(own)
    try:
        with (
            mock.patch("socket.gethostname", lambda: host.format(rank())),
            mock.patch.object(files, "VISIBLE_WITHIN_S", 0.2),
        ):
            with pytest.raises(RuntimeError, match="these ranks do not see it: 1;"):
                ema.export("/proc/self/cwd/direct", method="direct")
            ema.export("/proc/self/cwd/auto")
    finally:
        os.chdir(before)
    assert [entry.name for entry in own.iterdir()] == ["auto"]
    wanted = contents(tmp_path / "wanted") if rank() == 0 else {FILE: b"of rank 1"}
    assert contents(own / "auto") == wanted


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", ["direct", "rank0", "auto"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_rank_that_cannot_write_fails_all(method: str, failing: int, call: str, tmp_path: Path):
    """Here "auto" is "rank0": the hosts have different names."""
    ema = sharded_gpt2()
    ema.export(tmp_path / "export")
    before = contents(tmp_path / "export")
    full = OSError(28, "No space left on device")
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(export_files, "_SYNC_BYTES", 1))
        patches.enter_context(mock.patch("socket.gethostname", lambda: f"node-{rank()}"))
        if rank() == failing:
            patches.enter_context(mock.patch.object(export_files.os, call, side_effect=full))
        if method == "direct" or failing == 0:
            with pytest.raises(OSError, match=rf"/{FILE}: No space left"):
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
def test_files_that_others_write_during_exports_are_never_lost(tmp_path: Path):
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
        for i in range(6):
            ema.export(path, max_shard_size=500 if i % 2 else "5GB")
    finally:
        stop.set()
        writer.join()
    assert len(written_there) > 20
    assert all(file.read_text() == "log" for file in written_there)
    assert (path / "runs.txt").read_text() == "line\n" * len(written_there)


@pytest.mark.ranks(2)
def test_tensors_of_an_average_that_changed_meanwhile_are_refused():
    ema = sharded_gpt2()
    for change, message in (
        (lambda: None, "inside average_parameters"),
        (ema.update, "was updated while"),
    ):
        tensors = ema.gather_tensors()
        change()
        inside = ema.average_parameters if "inside" in message else contextlib.nullcontext
        refused = pytest.raises(RuntimeError, match=message)
        with inside(), refused if rank() == 0 else contextlib.nullcontext():
            dict(tensors)
    ema.gather_state_dict()
