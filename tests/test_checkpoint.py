"""Averages survive the way to disk and back bit for bit, whatever cut them before and after."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file, save_model

from dist_ema.checkpoint import directory as files
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, Fragment, FragmentMeta, TensorMeta
from tests import kill
from tests.cuts import (
    CUTS,
    SEVERAL_BLOCKS,
    SHAPES,
    TENSORS,
    PeakMemory,
    beside,
    blank,
    differing,
    first_ranks,
    full,
    infos,
    parts_of,
    seed_at,
    state_of,
    write,
)

# Any cut, any world.


@pytest.mark.ranks(4)
def test_every_cut_is_read_by_every_other_in_worlds_of_every_size(tmp_path: Path):
    worlds = {size: first_ranks(size) for size in (1, 2, 3, 4)}
    for cut, (size, saving) in itertools.product(CUTS, worlds.items()):
        if saving is not None:
            write(tmp_path / f"{cut}-{size}", saving, cut=cut)
    dist.barrier()
    for cut, size, other, loading in itertools.product(CUTS, worlds, CUTS, worlds.values()):
        if loading is not None:
            assert seed_at(tmp_path / f"{cut}-{size}", loading, cut=other) == 0


DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.complex64)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "tensors",
    [infos(SEVERAL_BLOCKS), *(infos(dtype=dtype) for dtype in DTYPES)],
    ids=["many blocks", *map(str, DTYPES)],
)
def test_tensors_of_many_blocks_and_of_every_dtype_keep_their_bits(
    tmp_path: Path, tensors: list[TensorMeta]
):
    for cut in ("rows", "columns", "flat"):
        write(tmp_path / cut, cut=cut, tensors=tensors)
        for other in ("columns", "last", "flat"):
            seed_at(tmp_path / cut, cut=other, tensors=tensors)


@pytest.mark.ranks(0)
def test_an_average_of_another_width_is_cast_with_a_warning_of_a_loss(tmp_path: Path):
    ranks = Group()
    write(tmp_path / "a")
    for dtype in (torch.float64, torch.bfloat16):
        tensors = infos(dtype=dtype)
        parts = blank("rows", tensors, ranks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(tmp_path / "a", {"ema": parts}, tensors, ranks)
        assert [("rounded" in str(w.message)) for w in caught] == [True] * (dtype == torch.bfloat16)
        values = {fqn: value.to(dtype) for fqn, value in full(TENSORS).items()}
        assert not differing(parts, parts_of("rows", tensors, values, ranks))


@pytest.mark.ranks(2)
def test_several_averages_share_a_manifest_and_have_a_directory_each(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    names = ["fast", "slow/0.999", ".hidden", "manifest.json"]
    write(path, names=names)
    assert sorted(p.name for p in path.iterdir()) == [
        "%2Ehidden", "fast", "manifest%2Ejson", "manifest.json", "slow%2F0.999",
    ]  # fmt: skip
    assert seed_at(path, names=names) == 0
    one = {"slow/0.999": blank("rows", TENSORS, ranks)}
    with pytest.warns(UserWarning, match=r"'fast', '.hidden', 'manifest.json' are not loaded"):
        load(path, one, TENSORS, ranks)
    assert not differing(one["slow/0.999"], parts_of("rows", TENSORS, full(TENSORS, 1), ranks))
    with pytest.raises(CheckpointError, match=r"no average named 'ema'; it has 'fast', 'sl"):
        seed_at(path)


@pytest.mark.ranks(2)
def test_parts_that_are_not_owned_are_filled_and_not_written(tmp_path: Path):
    ranks, good = Group(), parts_of("last", TENSORS, full(TENSORS), Group.alone())
    copies = parts_of("last", TENSORS, full(TENSORS), Group.alone())
    copies = [dataclasses.replace(part, is_owner=ranks.rank == 0) for part in copies]
    if ranks.rank == 1:
        for part in copies:
            part.view.fill_(torch.nan)
    save(tmp_path / "a", {"ema": copies}, TENSORS, state_of(), ranks)
    load(tmp_path / "a", {"ema": copies}, TENSORS, ranks)
    assert not differing(copies, good)
    assert len(list((tmp_path / "a").glob("shard-*"))) == 1


@pytest.mark.ranks(2, 4)
def test_ranks_may_hold_different_parts_of_one_model(tmp_path: Path):
    """As pipeline stages do: one checkpoint holds all of them."""
    ranks, alone = Group(), Group.alone()
    held = [t for i, t in enumerate(TENSORS) if i % ranks.size == ranks.rank]
    parts = parts_of("rows", held, full(TENSORS), alone)
    for asynchronous in (False, True):
        path = tmp_path / str(asynchronous)
        options = {"asynchronous": asynchronous}
        handle = save(path, {"ema": parts}, held, state_of(step=0), ranks, **options)
        if handle is not None:
            handle.result()
        back = blank("rows", held, alone)
        load(path, {"ema": back}, held, ranks)
        assert not differing(back, parts)
        assert seed_at(path) == 0  # all of it, in another cut
    other = infos({"x": (2, 1 + ranks.rank)})
    parts = parts_of("rows", other, full(other), alone)
    with pytest.raises(CheckpointError, match=r"one name: .*'x'.*\(2, 1\).*'x'.*\(2, 2\)"):
        save(tmp_path / "b", {"ema": parts}, other, state_of(step=0), ranks)
    assert not (tmp_path / "b").exists()


@pytest.mark.ranks(2)
def test_saving_and_loading_need_little_more_memory_than_the_average(tmp_path: Path):
    shape, ranks = (16_000, 4_000), Group()  # 128 MB on each of two ranks
    tensors = infos({"large": shape})
    rows = FragmentMeta("large", shape, Box((8_000 * ranks.rank, 0), (8_000, 4_000)))
    columns = FragmentMeta("large", shape, Box((0, 2_000 * ranks.rank), (16_000, 2_000)))
    saved = {"ema": [Fragment(rows, torch.ones(32_000_000))]}
    loaded = {"ema": [Fragment(columns, torch.zeros(32_000_000))]}
    write(tmp_path / "warm")
    with PeakMemory() as peak:
        save(tmp_path / "a", saved, tensors, state_of(), ranks)
    assert peak() < 64e6, f"save: {peak() / 1e6:.0f} MB"
    with PeakMemory() as peak:
        load(tmp_path / "a", loaded, tensors, ranks)
    assert peak() < 64e6, f"load: {peak() / 1e6:.0f} MB"


# What others read and wrote.


@pytest.mark.ranks(3)
def test_torch_and_safetensors_read_the_files(tmp_path: Path):
    values = full(TENSORS)
    for cut in CUTS:
        path = tmp_path / cut
        write(path, cut=cut)
        state = {t.fqn: torch.full(t.shape, -1.0) for t in TENSORS}
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        assert all(torch.equal(value, values[fqn]) for fqn, value in state.items()), cut
        names = {p.name.split("-")[0] for p in path.iterdir()}
        assert names == {"manifest.json", "shard"}  # nothing is a pickle
        numel = [t.numel() for file in path.glob("shard-*") for t in load_file(file).values()]
        assert sum(numel) == sum(value.numel() for value in values.values())


def plain_files(path: Path, layout: str) -> None:
    """The tensors as a library would write them, with a name that is not averaged beside them."""
    state = {**full(TENSORS), "num_batches": torch.tensor(3)}
    if layout == "save_model":
        module = torch.nn.Module()
        module.emb, module.head = torch.nn.Embedding(13, 6), torch.nn.Linear(6, 13, bias=False)
        module.emb.weight = module.head.weight = torch.nn.Parameter(state["emb.weight"])
        save_model(module, path / "model.safetensors")
        return
    if layout == "alias":
        state["head.weight"] = state.pop("emb.weight")
    if layout == "both":
        state["head.weight"] = state["emb.weight"].clone()
    halves = [dict(list(state.items())[:4]), dict(list(state.items())[4:])]
    parts = halves if layout in ("two files", "index") else [state]
    for i, part in enumerate(parts):
        save_file(part, path / f"model-{i}.safetensors")
    if layout == "index":
        save_file(state, path / "stray.safetensors")
        index = {fqn: f"model-{i}.safetensors" for i, half in enumerate(halves) for fqn in half}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


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
    path = tmp_path / "model-0.safetensors" if layout == "the file" else tmp_path
    parts = blank("flat", tensors, ranks)
    assert load(path, {"ema": parts}, tensors, ranks, others=["num_batches"]) == {}
    assert not differing(parts, parts_of("flat", tensors, full(TENSORS), ranks))
    if layout != "save_model":
        with pytest.raises(CheckpointError, match=f"{path}: unexpected: num_batches"):
            load(path, {"ema": parts}, tensors, ranks)
    with pytest.raises(CheckpointError, match="without a name"):
        load(path, {"a": parts, "b": parts}, tensors, ranks)


@pytest.mark.ranks(0)
def test_tied_weights_are_found_under_any_of_their_names(tmp_path: Path):
    ranks, values, (first, *others) = Group(), full(TENSORS), TENSORS
    write(tmp_path / "a")
    values["head.weight"] = values["emb.weight"]
    renamed = [dataclasses.replace(first, fqn="head.weight", aliases=("emb.weight",)), *others]
    untied = [dataclasses.replace(first, fqn=n, aliases=()) for n in ("emb.weight", "head.weight")]
    for tensors in (renamed, [*untied, *others]):
        parts = blank("rows", tensors, ranks)
        load(tmp_path / "a", {"ema": parts}, tensors, ranks)
        assert not differing(parts, parts_of("rows", tensors, values, ranks))
    save(tmp_path / "b", {"ema": parts}, tensors, state_of(), ranks)
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        seed_at(tmp_path / "b")


# Replacing.


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def can_exchange(request: pytest.FixtureRequest) -> bool:
    """Whether the file system can exchange two names."""
    return request.param


def exchanging(can_exchange: bool, also: Callable[[], None] = lambda: None) -> Any:
    exchange = files._exchange

    def patched(a: Path, b: Path) -> bool:
        also()
        return can_exchange and exchange(a, b)

    return mock.patch.object(files, "_exchange", patched)


@pytest.mark.ranks(2)
def test_a_save_replaces_the_last_one_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "a"
    for seed, cut in enumerate(("rows", "columns", "grid")):
        write(path, seed=seed, cut=cut)
        assert seed_at(path) == seed
    dist.barrier()
    assert beside(path) == []


@pytest.mark.ranks(2)
def test_what_is_no_checkpoint_is_not_replaced_and_files_of_others_stay(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path)
    others = ["file", "full/thesis.tex", "a/notes.txt", "a/config/x.json"]
    if ranks.rank == 0:
        for name in ("full", "empty", "a/config"):
            (tmp_path / name).mkdir()
        for name in others:
            (tmp_path / name).write_text("mine")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"file: exists and is no directory"):
        write(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no checkpoint \(it holds thesis.tex\)"):
        write(tmp_path / "full")
    write(tmp_path / "empty")
    for asynchronous in (False, True):
        with pytest.raises(CheckpointError, match=r"not part of the checkpoint \(config, notes"):
            write(path, seed=1, cut="last", asynchronous=asynchronous)
    assert seed_at(path) == 0
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    names = {p.name for p in path.iterdir() if p.suffix != ".safetensors"}
    assert names == {"config", "manifest.json", "notes.txt"}
    assert beside(path) == ["empty", "file", "full"]


@pytest.mark.ranks(0)
def test_a_link_is_followed(tmp_path: Path):
    write(tmp_path / "a")
    (tmp_path / "latest").symlink_to("a")
    write(tmp_path / "latest", seed=1)
    assert (tmp_path / "latest").is_symlink()
    assert seed_at(tmp_path / "a") == 1


@pytest.mark.ranks(0)
def test_a_link_to_itself_is_refused(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for refused in (write, lambda path, ranks: load(path, {}, [], ranks)):
        with pytest.raises(CheckpointError, match="symbolic links"):
            refused(tmp_path / "loop", Group())


@pytest.mark.ranks(0)
def test_a_path_that_may_not_be_searched_is_refused(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may search any directory
    try:
        for refused in (write, lambda path, ranks: load(path, {}, [], ranks)):
            with pytest.raises(CheckpointError, match="Permission denied"):
                refused(tmp_path / "closed" / "a", Group())
    finally:
        os.seteuid(user)


@pytest.mark.ranks(0, 2)
def test_a_directory_that_is_no_checkpoint_is_not_walked(tmp_path: Path):
    (tmp_path / "data" / "train" / "images").mkdir(parents=True, exist_ok=True)
    listed = []
    with mock.patch("os.scandir", lambda path, scan=os.scandir: listed.append(path) or scan(path)):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load(tmp_path, {}, [], Group())
    assert str(tmp_path / "data" / "train") not in map(str, listed)


@pytest.mark.ranks(2)
def test_a_file_that_appears_during_a_save_stays(tmp_path: Path, can_exchange: bool):
    """Also one that is being written, in a directory of an average as well."""
    path, averages = tmp_path / "a", ["fast", "slow"]
    write(path, names=averages)
    names = ("notes.txt", "slow/notes.txt", "below/manifest.json")
    opened = []

    def create_files() -> None:
        (path / "below").mkdir()
        for name in names:
            opened.append(open(path / name, "w"))
            opened[-1].write("mi")

    with exchanging(can_exchange, create_files):
        write(path, seed=1, names=averages)
    for file in opened:
        file.write("ne")
        file.close()
    dist.barrier()
    assert [(path / name).read_text() for name in names] == ["mine"] * 3
    assert seed_at(path, names=averages) == 1
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_what_is_no_checkpoint_is_never_put_in_the_place_of_one(tmp_path: Path):
    path, aside = tmp_path / "a", tmp_path / ".a.old-0123abcd"
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    assert files.find(path) == path
    with pytest.raises(CheckpointError, match="No such file"):
        seed_at(path)
    write(path, seed=1)
    assert (aside / "notes.txt").read_text() == "mine"
    (tmp_path / ".a.tmp-0123abcd").mkdir()
    with pytest.raises(FileNotFoundError):
        files.put_in_place(tmp_path / ".a.tmp-0123abcd", path)
    assert seed_at(path) == 1
    (path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(CheckpointError, match=r"no checkpoint of dist_ema \(manifest.json is"):
        write(path, seed=2)


@pytest.mark.ranks(2)
def test_the_working_directory_is_not_replaced(tmp_path: Path):
    before = Path.cwd()
    inside = tmp_path / "run" / "now"
    inside.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    os.chdir(inside)
    try:
        for path in (".", "..", inside):
            with pytest.raises(CheckpointError, match="holds the working directory"):
                write(Path(path))
        assert list(inside.iterdir()) == []
        dist.barrier()
        write(Path("below"), seed=1)
        assert seed_at(Path("below")) == 1
    finally:
        os.chdir(before)


@pytest.mark.ranks(2)
def test_two_jobs_that_save_to_one_path_lose_no_checkpoint(tmp_path: Path, can_exchange: bool):
    """Each rank is a job of its own."""
    ranks, path = Group(), tmp_path / "a"
    if ranks.rank == 0:
        write(path, Group.alone())
    dist.barrier()
    with exchanging(can_exchange):
        for seed in range(20):
            write(path, Group.alone(), seed=seed)
            assert (files.find(path) / "manifest.json").exists() or not can_exchange
    dist.barrier()
    assert seed_at(path) == 19
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_the_next_save_clears_what_killed_ones_left_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a"
    write(path)
    for name in (".a.tmp-0123abcd", ".a.old-0123abcd", ".a.mail-0123abcd"):
        (tmp_path / name / "below").mkdir(parents=True)
    others = [".a.tmp-0123abcd.txt", ".b.tmp-0123abcd", "a.tmp-0123abcd", ".a.tmp-notes"]
    for name in others:
        (tmp_path / name).mkdir()
    others.append(".a.tmp-01234567")
    (tmp_path / others[-1]).write_text("a file")
    with files.hidden_sibling(path, "tmp") as of_another_job:
        write(path)
        assert beside(path) == sorted([*others, of_another_job.name])
    assert beside(path) == sorted(others)


@pytest.mark.ranks(0)
def test_without_an_exchange_the_old_one_is_found_between_two_renames(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    with exchanging(False):
        for seed in (1, 2):
            write(path, seed=seed)
        assert seed_at(path) == 2
        assert beside(path) == []
        path.rename(tmp_path / ".a.old-0123abcd")
        (tmp_path / ".a.tmp-0123abcd").mkdir()
        assert seed_at(path) == 2
        assert not path.exists()
        with pytest.raises(CheckpointError, match="NaN"):
            save(path, {"ema": broken_parts(ranks)}, TENSORS, state_of(), ranks)
        assert seed_at(path) == 2
        write(path, seed=3)
        assert seed_at(path) == 3
        assert beside(path) == []


NUM_KILLS = int(os.environ.get("KILLS", "8"))


@pytest.mark.ranks(0)
@pytest.mark.timeout_s(120 + NUM_KILLS)
@pytest.mark.parametrize("what", kill.WRITERS)
def test_a_killed_save_or_export_leaves_the_last_or_the_one_before(what: str):
    """The full number, 200, is run by KILLS=200."""
    kill.run(what, NUM_KILLS)


# Refusals to write.


def broken_parts(ranks: Group) -> list[Fragment]:
    """Parts with NaN on the first rank that has some, Inf on the last."""
    values = full(TENSORS)
    values["emb.weight"][0] = torch.nan if ranks.rank == 0 else 1.0
    values["cube"][-1] = -torch.inf if ranks.rank == ranks.size - 1 else 1.0
    return parts_of("flat", TENSORS, values, ranks)


@pytest.mark.ranks(0, 3)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_average_that_is_not_finite_is_not_written(tmp_path: Path, asynchronous: bool):
    ranks, path = Group(), tmp_path / "a"
    write(path, seed=1)
    parts, options = broken_parts(ranks), {"asynchronous": asynchronous}
    with pytest.raises(CheckpointError, match=r"NaN or Inf in cube, emb\.weight; nothing is"):
        save(path, {"ema": parts}, TENSORS, state_of(), ranks, **options)
    assert seed_at(path) == 1
    assert beside(path) == []


@pytest.mark.ranks(0)
def test_large_finite_numbers_are_written(tmp_path: Path):
    values = {fqn: torch.full_like(value, 3e38) for fqn, value in full(TENSORS).items()}
    parts = parts_of("rows", TENSORS, values, Group())
    save(tmp_path / "a", {"ema": parts}, TENSORS, state_of(), Group())


@pytest.mark.ranks(2)
def test_ranks_that_do_not_hold_the_model_once_are_refused(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    parts = parts_of("rows", TENSORS, full(TENSORS), ranks)
    lacking = [p for p in parts if ranks.rank == 0 or p.meta.fqn != "norm.weight"]
    twice = parts_of("rows", TENSORS, full(TENSORS), Group.alone())
    for place, held, message in (
        (path, lacking, r"norm\.weight: boxes hold 4 of 7 elements"),
        (path, twice, r"emb\.weight: boxes at .* overlap"),
        (tmp_path / str(ranks.rank), parts, r"argument path is .* on rank 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save(place, {"ema": held}, TENSORS, state_of(), ranks)
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
    parts = parts_of("rows", TENSORS, full(TENSORS), Group())
    with pytest.raises(CheckpointError):
        save(tmp_path / "a", {"ema": parts}, TENSORS, state, Group())


@pytest.mark.ranks(2)
def test_tensors_that_do_not_match_are_all_named(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path)
    shapes = {**SHAPES, "conv.weight": (4, 3, 3, 3), "new.weight": (2, 2)}
    del shapes["bias"], shapes["cube"]
    tensors = infos(shapes)
    parts = blank("rows", tensors, ranks)
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            load(path, {"ema": parts}, tensors, ranks, strict=strict)
        assert str(caught.value) == (
            f"{path}: does not fit: conv.weight: the checkpoint has shape (4, 3, 3, 2), the model "
            "(4, 3, 3, 3); missing: new.weight; unexpected: bias, cube"
        )
    assert not differing(parts, blank("rows", tensors, ranks))

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
    values = {**full(TENSORS), "new.weight": torch.full((2, 2), -77.0)}
    assert not differing(parts, parts_of("rows", tensors, values, ranks))
