"""Averages survive the way to disk and back bit for bit, whatever cut them before and after."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file, save_model

from dist_ema import background, checksums, files, stateful, writer
from dist_ema.boxed import Part
from dist_ema.checkpoint import CheckpointError, differing_schedules, load, save
from dist_ema.layout import Box, Place
from dist_ema.ranks import Ranks
from tests.cuts import (
    CUTS,
    SHAPES,
    blank,
    differing,
    first_ranks,
    full,
    infos,
    parts_of,
    state_of,
)

ROOT = Path(__file__).parents[1]
TENSORS = infos()
SEVERAL_BLOCKS = {"wide": (1100, 2300), "tall": (2300, 1100), "small": (3,)}


def write(path: Path, ranks: Ranks, *, cut: str = "flat", seed: int = 0, **options):
    """Save one average of made-up tensors."""
    parts = parts_of(cut, TENSORS, full(TENSORS, seed), ranks)
    return save(path, {"ema": parts}, TENSORS, state_of(step=seed), ranks, **options)


def seed_at(path: Path, ranks: Ranks, *, cut: str = "rows") -> int:
    """Load what `write` wrote, check every bit of it, and tell which it was."""
    parts = blank(cut, TENSORS, ranks)
    state = load(path, {"ema": parts}, TENSORS, ranks)
    wrong = differing(parts, parts_of(cut, TENSORS, full(TENSORS, state["step"]), ranks))
    assert not wrong, wrong
    return state["step"]


def beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != path.name)


# Any cut, any world.


@pytest.mark.ranks(4)
def test_every_cut_is_read_by_every_other_in_worlds_of_every_size(tmp_path: Path):
    values = full(TENSORS)
    worlds = [first_ranks(size) for size in (1, 2, 3, 4)]
    for cut, saving in itertools.product(CUTS, worlds):
        path = tmp_path / f"{cut}-{1 + worlds.index(saving)}"
        if saving is not None:
            write(path, saving, cut=cut)
    dist.barrier()
    for (cut, size), other, loading in itertools.product(
        itertools.product(CUTS, (1, 2, 3, 4)), CUTS, worlds
    ):
        if loading is not None:
            parts = blank(other, TENSORS, loading)
            state = load(tmp_path / f"{cut}-{size}", {"ema": parts}, TENSORS, loading)
            wrong = differing(parts, parts_of(other, TENSORS, values, loading))
            assert not wrong, (cut, size, other, loading.size, wrong)
            assert state == state_of(step=0)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("algorithm", ["xxh3_64", "crc32"])
def test_tensors_of_many_blocks_are_resharded(tmp_path: Path, algorithm: str):
    tensors, ranks = infos(SEVERAL_BLOCKS), Ranks()
    values = full(tensors)
    is_available = checksums.is_available
    if ranks.rank == 1:  # one rank that lacks a package is enough
        checksums.is_available = lambda name: name == algorithm
    try:
        for cut in ("rows", "columns", "flat"):
            parts = parts_of(cut, tensors, values, ranks)
            save(tmp_path / cut, {"ema": parts}, tensors, state_of(), ranks)
    finally:
        checksums.is_available = is_available
    assert algorithm.encode() in (tmp_path / "rows" / "manifest.json").read_bytes()[:200]
    for cut, other in itertools.product(("rows", "columns", "flat"), ("columns", "last", "flat")):
        parts = blank(other, tensors, ranks)
        load(tmp_path / cut, {"ema": parts}, tensors, ranks)
        assert not differing(parts, parts_of(other, tensors, values, ranks)), (cut, other)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype):
    tensors, ranks = infos(dtype=dtype), Ranks()
    values = full(tensors)
    save(
        tmp_path / "a",
        {"ema": parts_of("flat", tensors, values, ranks)},
        tensors,
        state_of(),
        ranks,
    )
    parts = blank("columns", tensors, ranks)
    load(tmp_path / "a", {"ema": parts}, tensors, ranks)
    assert not differing(parts, parts_of("columns", tensors, values, ranks))


@pytest.mark.ranks(0)
def test_an_average_of_another_width_is_cast_and_a_loss_is_told(tmp_path: Path):
    ranks = Ranks()
    write(tmp_path / "a", ranks)
    for dtype in (torch.float64, torch.bfloat16):
        tensors = infos(dtype=dtype)
        parts = blank("rows", tensors, ranks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path / "a", {"ema": parts}, tensors, ranks)
        assert [("rounded" in str(w.message)) for w in caught] == [True] * (dtype == torch.bfloat16)
        values = {fqn: value.to(dtype) for fqn, value in full(TENSORS, 0).items()}
        assert not differing(parts, parts_of("rows", tensors, values, ranks))


@pytest.mark.ranks(2)
def test_several_averages_share_a_manifest_and_have_a_directory_each(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    names = ["fast", "slow/0.999", ".hidden", "manifest.json"]
    averages = {n: parts_of("flat", TENSORS, full(TENSORS, i), ranks) for i, n in enumerate(names)}
    save(path, averages, TENSORS, state_of(names), ranks)
    assert sorted(p.name for p in path.iterdir()) == [
        "%2Ehidden", "fast", "manifest%2Ejson", "manifest.json", "slow%2F0.999",
    ]  # fmt: skip
    back = {n: blank("rows", TENSORS, ranks) for n in names}
    assert load(path, back, TENSORS, ranks) == state_of(names)
    for i, n in enumerate(names):
        assert not differing(back[n], parts_of("rows", TENSORS, full(TENSORS, i), ranks)), n

    one = {"slow/0.999": blank("rows", TENSORS, ranks)}
    with pytest.warns(UserWarning, match=r"'fast', '.hidden', 'manifest.json' are not loaded"):
        load(path, one, TENSORS, ranks)
    assert not differing(one["slow/0.999"], back["slow/0.999"])
    with pytest.raises(CheckpointError, match=r"no average named 'ema'; it has 'fast', 'sl"):
        load(path, {"ema": blank("rows", TENSORS, ranks)}, TENSORS, ranks)


@pytest.mark.ranks(2)
def test_parts_that_are_not_sent_are_filled_and_not_written(tmp_path: Path):
    ranks = Ranks()
    values = full(TENSORS)
    alone = Ranks.alone()
    whole = [
        dataclasses.replace(p, sends=ranks.rank == 0)
        for p in parts_of("last", TENSORS, values, alone)
    ]
    if ranks.rank == 1:
        for part in whole:
            part.values.fill_(torch.nan)  # not this rank's to answer for
    save(tmp_path / "a", {"ema": whole}, TENSORS, state_of(), ranks)
    load(tmp_path / "a", {"ema": whole}, TENSORS, ranks)
    assert not differing(whole, parts_of("last", TENSORS, values, alone))
    assert len(list((tmp_path / "a").glob("shard-*"))) == 1


@pytest.mark.ranks(2)
def test_saving_and_loading_need_little_more_memory_than_the_average(tmp_path: Path):
    tensors, ranks = infos({"large": (16_000, 4_000)}), Ranks()  # 128 MB on each of two ranks
    generator = torch.Generator().manual_seed(ranks.rank)
    place = Place("large", (16_000, 4_000), Box((8_000 * ranks.rank, 0), (8_000, 4_000)))
    parts = [Part(place, torch.randn(32_000_000, generator=generator), True)]
    columns = Place("large", (16_000, 4_000), Box((0, 2_000 * ranks.rank), (16_000, 2_000)))
    target = [Part(columns, torch.zeros(32_000_000), True)]
    write(tmp_path / "warm", ranks)
    with _peak() as peak:
        save(tmp_path / "a", {"ema": parts}, tensors, state_of(), ranks)
    assert peak() < 64e6, f"save: {peak() / 1e6:.0f} MB"
    with _peak() as peak:
        load(tmp_path / "a", {"ema": target}, tensors, ranks)
    assert peak() < 64e6, f"load: {peak() / 1e6:.0f} MB"


class _peak:
    """How far the resident memory rose above where it was, within a block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._read("VmRSS")
        return lambda: self._read("VmHWM") - self._before

    def __exit__(self, *raised: object) -> None:
        pass

    @staticmethod
    def _read(key: str) -> int:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if key in line
        )
        return int(line.split()[1]) * 1024


# What others read.


@pytest.mark.ranks(3)
def test_torch_and_safetensors_read_the_files(tmp_path: Path):
    ranks, values = Ranks(), full(TENSORS)
    for cut in CUTS:
        write(tmp_path / cut, ranks, cut=cut)
        state = {t.fqn: torch.full(t.shape, -1.0) for t in TENSORS}
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / cut)))
        for fqn, value in state.items():
            assert torch.equal(value, values[fqn]), (cut, fqn)
        for file in (tmp_path / cut).glob("*.safetensors"):
            with safe_open(file, framework="pt") as shard:
                offsets = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
                for fqn in shard.keys():
                    box = shard.get_tensor(fqn)
                    at = offsets[fqn]["saved_offsets"]
                    whole = values[fqn][
                        tuple(slice(o, o + s) for o, s in zip(at, box.shape, strict=True))
                    ]
                    assert torch.equal(box, whole), (cut, fqn)


@pytest.mark.ranks(2)
def test_nothing_on_disk_is_a_pickle(tmp_path: Path):
    write(tmp_path / "a", Ranks())
    names = {p.name.split("-")[0] for p in (tmp_path / "a").iterdir()}
    assert names == {"manifest.json", "shard"}


# What others wrote.


def plain_files(path: Path, layout: str) -> dict[str, torch.Tensor]:
    """The tensors as a library would write them, with a name that is not averaged beside them."""
    values = full(TENSORS, 5)
    state = {**values, "num_batches": torch.tensor(3)}
    if layout == "save_model":
        module = torch.nn.Module()
        module.emb, module.head = torch.nn.Embedding(13, 6), torch.nn.Linear(6, 13, bias=False)
        module.emb.weight = module.head.weight = torch.nn.Parameter(values["emb.weight"])
        save_model(module, path / "model.safetensors")
        return {"emb.weight": values["emb.weight"]}
    if layout == "alias":
        state["head.weight"] = state.pop("emb.weight")
    if layout == "both":
        state["head.weight"] = state["emb.weight"].clone()
    halves = [dict(list(state.items())[:4]), dict(list(state.items())[4:])]
    if layout in ("two files", "index"):
        for i, half in enumerate(halves):
            save_file(half, path / f"model-{i}.safetensors")
    else:
        save_file(state, path / "model.safetensors")
    if layout == "index":
        save_file(state, path / "stray.safetensors")
        index = {fqn: f"model-{i}.safetensors" for i, half in enumerate(halves) for fqn in half}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return values


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "layout", ["one file", "two files", "index", "alias", "both", "save_model", "the file"]
)
def test_a_consolidated_checkpoint_is_loaded_as_the_average(tmp_path: Path, layout: str):
    ranks = Ranks()
    if ranks.rank == 0:
        plain_files(tmp_path, layout)
    dist.barrier()
    shapes = {"emb.weight": SHAPES["emb.weight"]} if layout == "save_model" else SHAPES
    tensors = infos(shapes)
    path = tmp_path / "model.safetensors" if layout == "the file" else tmp_path
    parts = blank("flat", tensors, ranks)
    assert load(path, {"ema": parts}, tensors, ranks, others=["num_batches"]) == {}
    values = {fqn: value for fqn, value in full(TENSORS, 5).items() if fqn in shapes}
    assert not differing(parts, parts_of("flat", tensors, values, ranks))
    if layout != "save_model":
        with pytest.raises(CheckpointError, match="unexpected: num_batches"):
            load(path, {"ema": parts}, tensors, ranks)
    with pytest.raises(CheckpointError, match="without a name"):
        load(path, {"a": parts, "b": parts}, tensors, ranks)


@pytest.mark.ranks(0)
def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path):
    ranks, values = Ranks(), full(TENSORS)
    write(tmp_path / "a", ranks)
    renamed = [dataclasses.replace(t) for t in TENSORS]
    renamed[0] = dataclasses.replace(TENSORS[0], fqn="head.weight", aliases=("emb.weight",))
    moved = {("head.weight" if f == "emb.weight" else f): v for f, v in values.items()}
    parts = blank("rows", renamed, ranks)
    load(tmp_path / "a", {"ema": parts}, renamed, ranks)
    assert not differing(parts, parts_of("rows", renamed, moved, ranks))

    untied = [dataclasses.replace(t, aliases=()) for t in TENSORS]
    untied.append(dataclasses.replace(untied[0], fqn="head.weight"))
    parts = blank("rows", untied, ranks)
    load(tmp_path / "a", {"ema": parts}, untied, ranks)
    both = {**values, "head.weight": values["emb.weight"]}
    assert not differing(parts, parts_of("rows", untied, both, ranks))
    save(tmp_path / "b", {"ema": parts}, untied, state_of(), ranks)
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        load(tmp_path / "b", {"ema": blank("rows", TENSORS, ranks)}, TENSORS, ranks)


# Replacing.


@pytest.mark.ranks(2)
def test_a_save_replaces_the_last_one_and_leaves_nothing_beside_it(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "new" / "a"
    for seed in range(3):
        write(path, ranks, seed=seed, cut=list(CUTS)[seed])
        assert seed_at(path, ranks) == seed
    dist.barrier()
    assert beside(path) == []


@pytest.mark.ranks(2)
def test_what_is_no_checkpoint_is_not_replaced_and_files_of_others_stay(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    write(path, ranks)
    if ranks.rank == 0:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").write_text("mine")
        (tmp_path / "empty").mkdir()
        (path / "notes.txt").write_text("mine")
        (path / "config").mkdir()
        (path / "config" / "x.json").write_text("mine")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"file: exists and is no directory"):
        write(tmp_path / "file", ranks)
    with pytest.raises(CheckpointError, match=r"no checkpoint \(it holds thesis.tex\)"):
        write(tmp_path / "full", ranks)
    write(tmp_path / "empty", ranks)
    write(path, ranks, seed=1, cut="last")
    assert seed_at(path, ranks) == 1
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "config" / "x.json").read_text() == "mine"
    assert sorted(p.name for p in path.iterdir() if p.suffix != ".safetensors") == [
        "config",
        "manifest.json",
        "notes.txt",
    ]
    assert len(list(path.glob("shard-*"))) == 2
    assert beside(path) == ["empty", "file", "full"]


@pytest.mark.ranks(0)
def test_a_link_is_followed(tmp_path: Path):
    ranks = Ranks()
    write(tmp_path / "a", ranks)
    (tmp_path / "latest").symlink_to("a")
    write(tmp_path / "latest", ranks, seed=1)
    assert (tmp_path / "latest").is_symlink()
    assert seed_at(tmp_path / "a", ranks) == 1


@pytest.mark.ranks(0)
def test_debris_of_killed_saves_is_cleared_by_the_next(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    for name in (".a.tmp-0123abcd", ".a.old-0123abcd", ".a.mail-0123abcd"):
        (tmp_path / name / "below").mkdir(parents=True)
    others = [".a.tmp-0123abcd.txt", ".b.tmp-0123abcd", "a.tmp-0123abcd", ".a.tmp-notes"]
    for name in others:
        (tmp_path / name).mkdir()
    write(path, ranks)
    assert beside(path) == sorted(others)


@pytest.mark.ranks(0)
def test_without_an_exchange_the_old_one_is_found_between_two_renames(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    exchange = files._exchange
    files._exchange = lambda a, b: False
    try:
        write(path, ranks, seed=1)
        write(path, ranks, seed=2)
        assert seed_at(path, ranks) == 2
        assert beside(path) == []
        path.rename(tmp_path / ".a.old-0123abcd")
        (tmp_path / ".a.tmp-0123abcd").mkdir()
        assert seed_at(path, ranks) == 2
        assert not path.exists()
        with pytest.raises(CheckpointError, match="NaN"):
            save(path, {"ema": broken_parts(ranks)}, TENSORS, state_of(), ranks)
        assert seed_at(path, ranks) == 2
        write(path, ranks, seed=3)
        assert seed_at(path, ranks) == 3
        assert beside(path) == []
    finally:
        files._exchange = exchange


# In the background.


@pytest.mark.ranks(0, 2)
def test_a_save_in_the_background_has_the_values_of_the_call(tmp_path: Path):
    ranks = Ranks()
    parts = parts_of("flat", TENSORS, full(TENSORS, 4), ranks)
    handle = save(
        tmp_path / "a", {"ema": parts}, TENSORS, state_of(step=4), ranks, asynchronous=True
    )
    for part in parts:
        part.values.fill_(-1)
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
    ranks, path = Ranks(), tmp_path / "a"
    write_data = writer.ShardWriter.write_data

    def slow(self, *args):
        time.sleep(0.3)
        return write_data(self, *args)

    writer.ShardWriter.write_data = slow
    try:
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
    finally:
        writer.ShardWriter.write_data = write_data
    dist.barrier()
    assert beside(path) == []


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("failing", [0, -1])
def test_a_failure_in_the_background_is_raised_on_every_rank(tmp_path: Path, failing: int):
    ranks, path = Ranks(), tmp_path / "a"
    write(path, ranks, seed=1)
    write_all = writer._write_all

    def fail(fd, data):
        raise OSError(28, "No space left on device")

    for asked in (True, False):
        if ranks.rank == failing % ranks.size:
            writer._write_all = fail
        try:
            handle = write(path, ranks, seed=2, asynchronous=True)
            if asked:
                with pytest.raises(CheckpointError, match=r"shard-.*No space left on device"):
                    handle.result()
            else:
                handle._thread.join()
        finally:
            writer._write_all = write_all
        dist.barrier()
        assert beside(path) == []
        if asked:
            assert seed_at(path, ranks) == 1
    with pytest.warns(UserWarning, match=r"earlier save .* failed: .*No space left"):
        write(path, ranks, seed=3)
    assert seed_at(path, ranks) == 3


@pytest.mark.ranks(2)
def test_a_rank_that_is_not_heard_of_is_given_up(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    write(path, ranks, seed=1)
    report, limit = background.Letters.report, background.STALL_S

    def late(self, content):
        while self._box.exists():
            time.sleep(0.05)
        report(self, content)

    background.Letters.report, background.STALL_S = late, 0.5
    told = (r"ranks \[1\] were not heard of for 0", "gave the save up before this rank")
    try:
        handle = write(path, ranks, seed=2, asynchronous=True)
        with pytest.raises(CheckpointError, match=told[ranks.rank]):
            handle.result()
    finally:
        background.Letters.report, background.STALL_S = report, limit
    dist.barrier()
    assert seed_at(path, ranks) == 1
    assert beside(path) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize("ending", ["well", "badly"])
def test_a_rank_that_looks_too_late_finds_out_by_itself(tmp_path: Path, ending: str):
    ranks, path = Ranks(), tmp_path / "a"
    outcome, limit = background.Letters.outcome, background._ACKNOWLEDGE_S
    finish = writer.ShardWriter.finish

    def late(self, is_in_place):
        while self._box.exists():
            time.sleep(0.01)
        return outcome(self, is_in_place)

    def fail(self, metadata, results):
        raise OSError(5, "Input/output error", "manifest.json")

    background.Letters.outcome, background._ACKNOWLEDGE_S = late, 0.05
    if ending == "badly":
        writer.ShardWriter.finish = fail
    try:
        handle = write(path, ranks, seed=2, asynchronous=True)
        if ending == "well":
            handle.result()
        else:
            with pytest.raises(CheckpointError, match=r"gave the save up|Input/output error"):
                handle.result()
    finally:
        background.Letters.outcome, background._ACKNOWLEDGE_S = outcome, limit
        writer.ShardWriter.finish = finish
    dist.barrier()
    assert path.exists() == (ending == "well")
    assert beside(path) == []


AT_EXIT = """
import os, sys, time, torch, torch.distributed as dist
from pathlib import Path
from dist_ema import writer
from dist_ema.ranks import Ranks
from tests.test_checkpoint import write

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
write_data = writer.ShardWriter.write_data
def slow(self, *args):
    time.sleep(0.5)
    if ending == "badly" and rank == 1:
        raise OSError(28, "No space left on device", "shard")
    return write_data(self, *args)
writer.ShardWriter.write_data = slow
write(directory / ending / "a", Ranks(), seed=3, asynchronous=True)
dist.destroy_process_group()
"""


def test_the_interpreter_waits_for_the_save_or_says_what_is_lost(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], cwd=ROOT, timeout=100)
    assert done.returncode == 0
    said = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    assert said["well-0"] == said["well-1"] == ""
    assert seed_at(tmp_path / "well" / "a", Ranks.alone()) == 3
    for rank in range(2):
        assert f"the save of {tmp_path}/badly/a is lost: " in said[f"badly-{rank}"]
        assert "No space left on device" in said[f"badly-{rank}"]
    assert [p.name for p in (tmp_path / "well").iterdir()] == ["a"]
    assert [p.name for p in (tmp_path / "badly").iterdir()] == []


# Refusing to write.


def broken_parts(ranks: Ranks) -> list[Part]:
    """Parts with NaN on the first rank that has some, Inf on the last."""
    parts = parts_of("flat", TENSORS, full(TENSORS), ranks)
    for part in parts:
        if part.place.fqn == "emb.weight" and ranks.rank == 0:
            part.values[-1] = torch.nan
        if part.place.fqn == "cube" and ranks.rank == ranks.size - 1:
            part.values[0] = -torch.inf
    return parts


@pytest.mark.ranks(0, 3)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_average_that_is_not_finite_is_not_written(tmp_path: Path, asynchronous: bool):
    ranks, path = Ranks(), tmp_path / "a"
    write(path, ranks, seed=1)
    with pytest.raises(
        CheckpointError, match=r"NaN or Inf in cube, emb\.weight; nothing is written"
    ):
        save(
            path,
            {"ema": broken_parts(ranks)},
            TENSORS,
            state_of(),
            ranks,
            asynchronous=asynchronous,
        )
    assert seed_at(path, ranks) == 1
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_large_finite_numbers_are_written(tmp_path: Path):
    ranks = Ranks()
    values = full(TENSORS)
    values["emb.weight"].fill_(3e38)
    parts = parts_of("rows", TENSORS, values, ranks)
    save(tmp_path / "a", {"ema": parts}, TENSORS, state_of(), ranks)


@pytest.mark.ranks(2)
def test_ranks_that_do_not_hold_the_whole_model_are_told_so(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    parts = parts_of("rows", TENSORS, full(TENSORS), ranks)
    lacking = [p for p in parts if ranks.rank == 0 or p.place.fqn != "norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight: boxes hold 4 of 7 elements"):
        save(path, {"ema": lacking}, TENSORS, state_of(), ranks)
    with pytest.raises(CheckpointError, match=r"emb\.weight: boxes at .* overlap"):
        alone = parts_of("rows", TENSORS, full(TENSORS), Ranks.alone())
        save(path, {"ema": alone}, TENSORS, state_of(), ranks)
    with pytest.raises(CheckpointError, match="different averages or paths"):
        save(tmp_path / str(ranks.rank), {"ema": parts}, TENSORS, state_of(), ranks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks(0)
@pytest.mark.parametrize(
    "state",
    [
        {},
        {"step": -1, "num_updates": 0, "averages": {}},
        {"step": 1, "num_updates": 1, "averages": {"other": {"schedule": {}}}},
        {"step": 1, "num_updates": 1, "averages": {"ema": {"schedule": {}, "decay": 2.0}}},
        {**state_of(), "x": float("nan")},
    ],
)
def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path, state: dict):
    ranks = Ranks()
    parts = parts_of("rows", TENSORS, full(TENSORS), ranks)
    with pytest.raises(CheckpointError):
        save(tmp_path / "a", {"ema": parts}, TENSORS, state, ranks)


def test_another_schedule_is_told():
    own, other = state_of(["a", "b"]), state_of(["a", "b", "c"])
    assert differing_schedules(other, own) == []
    other["averages"]["b"]["schedule"] = {"kind": "HalfLife", "steps": 9}
    [told] = differing_schedules(other, own)
    assert "'b'" in told
    assert "HalfLife" in told


# Tensors that do not match.


@pytest.mark.ranks(2)
def test_tensors_that_do_not_match_are_all_named(tmp_path: Path):
    ranks, path = Ranks(), tmp_path / "a"
    write(path, ranks)
    shapes = {**SHAPES, "conv.weight": (4, 3, 3, 3), "new.weight": (2, 2)}
    del shapes["bias"], shapes["cube"]
    tensors = infos(shapes)
    parts = blank("rows", tensors, ranks)
    before = [p.values.clone() for p in parts]
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            load(path, {"ema": parts}, tensors, ranks, strict=strict)
        assert str(caught.value) == (
            f"{path}: does not fit: conv.weight: the checkpoint has shape (4, 3, 3, 2), the model "
            "(4, 3, 3, 3); missing: new.weight; unexpected: bias, cube"
        )
    assert all(torch.equal(p.values, b) for p, b in zip(parts, before, strict=True))

    shapes["conv.weight"] = SHAPES["conv.weight"]
    tensors = infos(shapes)
    parts = blank("rows", tensors, ranks)
    with pytest.raises(CheckpointError, match=r"strict=False"):
        load(path, {"ema": parts}, tensors, ranks)
    with pytest.warns(UserWarning) as warned:
        load(path, {"ema": parts}, tensors, ranks, strict=False)
    assert [str(w.message) for w in warned] == [
        f"{path}: missing: new.weight",
        f"{path}: unexpected: bias, cube",
    ]
    values = {**full(TENSORS, 0), "new.weight": torch.full((2, 2), -77.0)}
    assert not differing(parts, parts_of("rows", tensors, values, ranks))


# Through torch.distributed.checkpoint.


class Stateful:
    """What `ShardedEMA` is to torch.distributed.checkpoint."""

    def __init__(self, averages, tensors=TENSORS, state=None):
        self.averages, self.tensors, self.state = averages, tensors, state or state_of(averages)

    def state_dict(self):
        return stateful.state_dict(self.averages, self.tensors, self.state)

    def load_state_dict(self, given):
        self.state = stateful.load_state_dict(given, self.averages, self.tensors)


def averages_in(cut: str, ranks: Ranks) -> dict[str, list[Part]]:
    return {n: parts_of(cut, TENSORS, full(TENSORS, i), ranks) for i, n in enumerate("ab")}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["save", "async_save", "async_save with a writer"])
@pytest.mark.parametrize("cut", CUTS)
def test_torch_saves_and_reshards_the_state_dict(tmp_path: Path, way: str, cut: str):
    ranks, path = Ranks(), tmp_path / "a"
    model = torch.nn.Linear(3, 3)
    saved = Stateful(averages_in(cut, ranks), state=state_of("ab", step=11))
    state = {"model": model.state_dict(), "ema": saved}
    if way == "save":
        dcp.save(state, checkpoint_id=path)
    else:
        target = {"checkpoint_id": path}
        if way != "async_save":
            target = {"storage_writer": dcp.FileSystemWriter(path)}
        future = dcp.async_save(state, **target)
        for part in itertools.chain(*saved.averages.values()):
            part.values.fill_(-3)
        future.result()
    for other in ("columns", "flat", "last"):
        loaded = Stateful({n: blank(other, TENSORS, ranks) for n in "ab"})
        dcp.load({"model": model.state_dict(), "ema": loaded}, checkpoint_id=path)
        assert loaded.state == state_of("ab", step=11)
        for name, parts in averages_in(other, ranks).items():
            assert not differing(loaded.averages[name], parts), (other, name)


@pytest.mark.ranks(0)
def test_a_state_dict_is_copied_and_taken_back(tmp_path: Path):
    import copy
    import pickle

    ranks = Ranks()
    own = Stateful(averages_in("last", ranks))
    for again in (copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))):
        kept = again(own.state_dict())
        for part in itertools.chain(*own.averages.values()):
            part.values.fill_(0)
        own.load_state_dict(kept)
        for name, parts in averages_in("last", ranks).items():
            assert not differing(own.averages[name], parts)
    whole = own.state_dict()
    whole["averages"] = {n: full(TENSORS, i) for i, n in enumerate("ba")}
    for values in whole["averages"].values():
        values["scale"] = values["scale"].view(1)
    own.load_state_dict(whole)
    assert not differing(own.averages["a"], averages_in("last", ranks)["b"])

    before = averages_in("rows", ranks)
    other = Stateful(averages_in("rows", ranks))
    crumbs = Stateful(averages_in("crumbs", ranks)).state_dict()
    short = own.state_dict()
    del short["averages"]["b"]["cube"]
    shaped = own.state_dict()
    shaped["averages"]["a"]["norm.weight"] = torch.zeros(8)
    unlike = own.state_dict()
    unlike["state"] = torch.zeros(5, dtype=torch.uint8)
    for given in (
        {},
        crumbs,
        short,
        shaped,
        unlike,
        {"averages": {}, "state": own.state_dict()["state"]},
    ):
        with pytest.raises(CheckpointError):
            other.load_state_dict(given)
    for name, parts in before.items():
        assert not differing(other.averages[name], parts)


@pytest.mark.ranks(0)
def test_arithmetic_on_a_boxed_tensor_is_refused():
    value = Stateful(averages_in("rows", Ranks())).state_dict()["averages"]["a"]["cube"]
    with pytest.raises(NotImplementedError, match="gather_state_dict"):
        value + 1
    assert "boxes=[(0, 0, 0)+(3, 2, 5)]" in repr(value)


# Killed.


def test_a_killed_save_leaves_the_last_or_the_one_before():
    """A few of the kills that `python -m tests.checkpoint_kill --kills 200` makes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint_kill", "--kills", os.environ.get("KILLS", "8")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
