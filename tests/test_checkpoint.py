"""Averages survive the way to disk and back bit for bit, whatever cut them before and after."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file, save_model

from dist_ema.checkpoint import directory as files
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, Fragment, FragmentMeta
from tests.cuts import (
    CUTS,
    SEVERAL_BLOCKS,
    SHAPES,
    TENSORS,
    PeakMemory,
    beside,
    blank,
    broken_parts,
    differing,
    first_ranks,
    full,
    infos,
    parts_of,
    seed_at,
    state_of,
    write,
)

ROOT = Path(__file__).parents[1]


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
def test_tensors_of_many_blocks_are_resharded(tmp_path: Path):
    tensors, ranks = infos(SEVERAL_BLOCKS), Group()
    values = full(tensors)
    for cut in ("rows", "columns", "flat"):
        parts = parts_of(cut, tensors, values, ranks)
        save(tmp_path / cut, {"ema": parts}, tensors, state_of(), ranks)
    for cut, other in itertools.product(("rows", "columns", "flat"), ("columns", "last", "flat")):
        parts = blank(other, tensors, ranks)
        load(tmp_path / cut, {"ema": parts}, tensors, ranks)
        assert not differing(parts, parts_of(other, tensors, values, ranks)), (cut, other)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_every_dtype_keeps_its_bits(tmp_path: Path, dtype: torch.dtype):
    tensors, ranks = infos(dtype=dtype), Group()
    values = full(tensors)
    parts = parts_of("flat", tensors, values, ranks)
    save(tmp_path / "a", {"ema": parts}, tensors, state_of(), ranks)
    parts = blank("columns", tensors, ranks)
    load(tmp_path / "a", {"ema": parts}, tensors, ranks)
    assert not differing(parts, parts_of("columns", tensors, values, ranks))


@pytest.mark.ranks(0)
def test_an_average_of_another_width_is_cast_and_a_loss_is_told(tmp_path: Path):
    ranks = Group()
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
    ranks, path = Group(), tmp_path / "a"
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
    ranks = Group()
    values = full(TENSORS)
    alone = Group.alone()
    whole = [
        dataclasses.replace(p, is_owner=ranks.rank == 0)
        for p in parts_of("last", TENSORS, values, alone)
    ]
    if ranks.rank == 1:
        for part in whole:
            part.view.fill_(torch.nan)  # not this rank's to answer for
    save(tmp_path / "a", {"ema": whole}, TENSORS, state_of(), ranks)
    load(tmp_path / "a", {"ema": whole}, TENSORS, ranks)
    assert not differing(whole, parts_of("last", TENSORS, values, alone))
    assert len(list((tmp_path / "a").glob("shard-*"))) == 1


@pytest.mark.ranks(2)
def test_saving_and_loading_need_little_more_memory_than_the_average(tmp_path: Path):
    tensors, ranks = infos({"large": (16_000, 4_000)}), Group()  # 128 MB on each of two ranks
    generator = torch.Generator().manual_seed(ranks.rank)
    place = FragmentMeta("large", (16_000, 4_000), Box((8_000 * ranks.rank, 0), (8_000, 4_000)))
    parts = [Fragment(place, torch.randn(32_000_000, generator=generator))]
    columns = FragmentMeta("large", (16_000, 4_000), Box((0, 2_000 * ranks.rank), (16_000, 2_000)))
    target = [Fragment(columns, torch.zeros(32_000_000))]
    write(tmp_path / "warm", ranks)
    with PeakMemory() as peak:
        save(tmp_path / "a", {"ema": parts}, tensors, state_of(), ranks)
    assert peak() < 64e6, f"save: {peak() / 1e6:.0f} MB"
    with PeakMemory() as peak:
        load(tmp_path / "a", {"ema": target}, tensors, ranks)
    assert peak() < 64e6, f"load: {peak() / 1e6:.0f} MB"


# What others read.


@pytest.mark.ranks(3)
def test_torch_and_safetensors_read_the_files(tmp_path: Path):
    ranks, values = Group(), full(TENSORS)
    for cut in CUTS:
        write(tmp_path / cut, ranks, cut=cut)
        state = {t.fqn: torch.full(t.shape, -1.0) for t in TENSORS}
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / cut)))
        for fqn, value in state.items():
            assert torch.equal(value, values[fqn]), (cut, fqn)
        names = {p.name.split("-")[0] for p in (tmp_path / cut).iterdir()}
        assert names == {"manifest.json", "shard"}  # nothing is a pickle
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
    ranks = Group()
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
        with pytest.raises(CheckpointError, match=f"{path}: unexpected: num_batches"):
            load(path, {"ema": parts}, tensors, ranks)
    with pytest.raises(CheckpointError, match="without a name"):
        load(path, {"a": parts, "b": parts}, tensors, ranks)


@pytest.mark.ranks(0)
def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path):
    ranks, values = Group(), full(TENSORS)
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
    ranks, path = Group(), tmp_path / "new" / "a"
    for seed in range(3):
        write(path, ranks, seed=seed, cut=list(CUTS)[seed])
        assert seed_at(path, ranks) == seed
    dist.barrier()
    assert beside(path) == []


@pytest.mark.ranks(2)
def test_what_is_no_checkpoint_is_not_replaced_and_files_of_others_stay(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
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
    for asynchronous in (False, True):
        with pytest.raises(CheckpointError, match=r"not part of the checkpoint \(config, notes"):
            write(path, ranks, seed=1, cut="last", asynchronous=asynchronous)
    assert seed_at(path, ranks) == 0
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "config" / "x.json").read_text() == "mine"
    assert sorted(p.name for p in path.iterdir() if p.suffix != ".safetensors") == [
        "config",
        "manifest.json",
        "notes.txt",
    ]
    assert beside(path) == ["empty", "file", "full"]


@pytest.mark.ranks(0)
def test_a_link_is_followed(tmp_path: Path):
    ranks = Group()
    write(tmp_path / "a", ranks)
    (tmp_path / "latest").symlink_to("a")
    write(tmp_path / "latest", ranks, seed=1)
    assert (tmp_path / "latest").is_symlink()
    assert seed_at(tmp_path / "a", ranks) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_file_that_appears_during_a_save_stays(tmp_path: Path, can_exchange: bool):
    """Also one that is being written, in a directory of an average as well."""
    ranks, path = Group(), tmp_path / "a"
    parts = parts_of("flat", TENSORS, full(TENSORS), ranks)
    both = {"fast": parts, "slow": parts}
    save(path, both, TENSORS, state_of(["fast", "slow"]), ranks)
    exchange = files._exchange
    names = ("notes.txt", "slow/notes.txt", "below/manifest.json")
    opened = []

    def disturbed(a, b):
        (path / "below").mkdir()
        for name in names:
            opened.append(open(path / name, "w"))
            opened[-1].write("mi")
        return can_exchange and exchange(a, b)

    with mock.patch.object(files, "_exchange", disturbed):
        save(path, both, TENSORS, state_of(["fast", "slow"], step=1), ranks)
    for file in opened:
        file.write("ne")
        file.close()
    dist.barrier()
    assert [(path / name).read_text() for name in names] == ["mine"] * 3
    assert load(path, both, TENSORS, ranks)["step"] == 1
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_what_is_no_checkpoint_is_never_put_in_the_place_of_one(tmp_path: Path):
    path = tmp_path / "a"
    (tmp_path / ".a.old-0123abcd").mkdir()
    (tmp_path / ".a.old-0123abcd" / "notes.txt").write_text("mine")
    assert files.find(path) == path
    with pytest.raises(CheckpointError, match="No such file"):
        load(path, {"ema": blank("rows", TENSORS, Group())}, TENSORS, Group())
    write(path, Group(), seed=1)
    assert (tmp_path / ".a.old-0123abcd" / "notes.txt").read_text() == "mine"
    (tmp_path / ".a.tmp-0123abcd").mkdir()
    with pytest.raises(FileNotFoundError):
        files.put_in_place(tmp_path / ".a.tmp-0123abcd", path)
    assert seed_at(path, Group()) == 1
    (path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(CheckpointError, match=r"no checkpoint of dist_ema \(manifest.json is"):
        write(path, Group(), seed=2)


@pytest.mark.ranks(2)
def test_the_working_directory_is_not_replaced(tmp_path: Path):
    ranks, before = Group(), Path.cwd()
    inside = tmp_path / "run" / "now"
    inside.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    os.chdir(inside)
    try:
        for path in (".", "..", inside):
            with pytest.raises(CheckpointError, match="holds the working directory"):
                write(Path(path), ranks)
        assert list(inside.iterdir()) == []
        dist.barrier()
        write(Path("below"), ranks, seed=1)
        assert seed_at(Path("below"), ranks) == 1
    finally:
        os.chdir(before)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("can_exchange", [True, False])
def test_two_jobs_that_save_to_one_path_lose_no_checkpoint(tmp_path: Path, can_exchange: bool):
    """Each rank is a job of its own."""
    ranks, path = Group(), tmp_path / "a"
    if ranks.rank == 0:
        write(path, Group.alone())
    dist.barrier()
    exchange = files._exchange
    with mock.patch.object(files, "_exchange", lambda a, b: can_exchange and exchange(a, b)):
        for seed in range(20):
            write(path, Group.alone(), seed=seed)
            assert (files.find(path) / "manifest.json").exists() or not can_exchange
    dist.barrier()
    assert seed_at(path, ranks) == 19
    assert beside(path) == []


@pytest.mark.ranks(2)
def test_what_another_job_writes_is_not_cleared_away(tmp_path: Path):
    path = tmp_path / "a"
    if Group().rank == 0:
        stale = tmp_path / ".a.tmp-0123abcd"
        stale.mkdir()
        with files.hidden_sibling(path, "tmp") as directory:
            files.clear_stale(path)
            assert directory.exists() and not stale.exists()
        assert not directory.exists()


@pytest.mark.ranks(2, 4)
def test_ranks_may_hold_different_parts_of_one_model(tmp_path: Path):
    """As pipeline stages do: one checkpoint holds all of them."""
    ranks = Group()
    mine = [t for i, t in enumerate(TENSORS) if i % ranks.size == ranks.rank]
    parts = parts_of("rows", mine, full(TENSORS), Group.alone())
    for asynchronous in (False, True):
        path = tmp_path / str(asynchronous)
        options = {"asynchronous": asynchronous}
        handle = save(path, {"ema": parts}, mine, state_of(step=0), ranks, **options)
        if handle is not None:
            handle.result()
        back = blank("rows", mine, Group.alone())
        load(path, {"ema": back}, mine, ranks)
        assert not differing(back, parts_of("rows", mine, full(TENSORS), Group.alone()))
        assert seed_at(path, ranks) == 0  # all of it, in another cut
    other = infos({"x": (2, 1 + ranks.rank)})
    parts = parts_of("rows", other, full(other), Group.alone())
    with pytest.raises(CheckpointError, match=r"one name: .*'x'.*\(2, 1\).*'x'.*\(2, 2\)"):
        save(tmp_path / "b", {"ema": parts}, other, state_of(step=0), ranks)
    assert not (tmp_path / "b").exists()


@pytest.mark.ranks(0)
def test_debris_of_killed_saves_is_cleared_by_the_next(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path, ranks)
    for name in (".a.tmp-0123abcd", ".a.old-0123abcd", ".a.mail-0123abcd"):
        (tmp_path / name / "below").mkdir(parents=True)
    others = [".a.tmp-0123abcd.txt", ".b.tmp-0123abcd", "a.tmp-0123abcd", ".a.tmp-notes"]
    for name in others:
        (tmp_path / name).mkdir()
    others.append(".a.tmp-01234567")
    (tmp_path / others[-1]).write_text("a file")
    write(path, ranks)
    assert beside(path) == sorted(others)


@pytest.mark.ranks(0)
def test_without_an_exchange_the_old_one_is_found_between_two_renames(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    with mock.patch.object(files, "_exchange", lambda a, b: False):
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


# Refusing to write.


@pytest.mark.ranks(0, 3)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_average_that_is_not_finite_is_not_written(tmp_path: Path, asynchronous: bool):
    ranks, path = Group(), tmp_path / "a"
    write(path, ranks, seed=1)
    parts, options = broken_parts(ranks), {"asynchronous": asynchronous}
    with pytest.raises(CheckpointError, match=r"NaN or Inf in cube, emb\.weight; nothing is"):
        save(path, {"ema": parts}, TENSORS, state_of(), ranks, **options)
    assert seed_at(path, ranks) == 1
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_large_finite_numbers_are_written(tmp_path: Path):
    ranks = Group()
    values = full(TENSORS)
    values["emb.weight"].fill_(3e38)
    parts = parts_of("rows", TENSORS, values, ranks)
    save(tmp_path / "a", {"ema": parts}, TENSORS, state_of(), ranks)


@pytest.mark.ranks(2)
def test_ranks_that_do_not_hold_the_whole_model_are_told_so(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    parts = parts_of("rows", TENSORS, full(TENSORS), ranks)
    lacking = [p for p in parts if ranks.rank == 0 or p.meta.fqn != "norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight: boxes hold 4 of 7 elements"):
        save(path, {"ema": lacking}, TENSORS, state_of(), ranks)
    with pytest.raises(CheckpointError, match=r"emb\.weight: boxes at .* overlap"):
        alone = parts_of("rows", TENSORS, full(TENSORS), Group.alone())
        save(path, {"ema": alone}, TENSORS, state_of(), ranks)
    with pytest.raises(CheckpointError, match=r"argument path is .* on rank 0"):
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
    ranks = Group()
    parts = parts_of("rows", TENSORS, full(TENSORS), ranks)
    with pytest.raises(CheckpointError):
        save(tmp_path / "a", {"ema": parts}, TENSORS, state, ranks)


# Tensors that do not match.


@pytest.mark.ranks(2)
def test_tensors_that_do_not_match_are_all_named(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path, ranks)
    shapes = {**SHAPES, "conv.weight": (4, 3, 3, 3), "new.weight": (2, 2)}
    del shapes["bias"], shapes["cube"]
    tensors = infos(shapes)
    parts = blank("rows", tensors, ranks)
    before = [p.view.clone() for p in parts]
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            load(path, {"ema": parts}, tensors, ranks, strict=strict)
        assert str(caught.value) == (
            f"{path}: does not fit: conv.weight: the checkpoint has shape (4, 3, 3, 2), the model "
            "(4, 3, 3, 3); missing: new.weight; unexpected: bias, cube"
        )
    assert all(torch.equal(p.view, b) for p, b in zip(parts, before, strict=True))

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


# Killed.


def test_a_killed_save_leaves_the_last_or_the_one_before():
    """A few of the kills that `python -m tests.kill --kills 200` makes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", "--kills", os.environ.get("KILLS", "8")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
