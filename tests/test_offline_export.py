"""Exports by one process from a sharded checkpoint: the same bytes, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_ema import ShardedEMA, cli
from dist_ema.checkpoint import CheckpointError
from dist_ema.checkpoint.manifest import dump, parse
from dist_ema.export import offline
from tests.grid import named
from tests.net import ALIASES, FROZEN, TRAINABLE
from tests.read_exports import contents, written
from tests.runs import same, start
from tests.worlds import WORLDS, World, rank, worlds
from tests.worlds_deepspeed import WORLDS as ZERO_WORLDS
from tests.worlds_fsdp1 import WORLDS as FSDP1_WORLDS

FILE = "model.safetensors"


def base_from(export: Path, base: Path) -> None:
    """A model's directory: what is not averaged as exported, anything in place of the rest."""
    state = {n: torch.full_like(t, -7) if n in TRAINABLE else t for n, t in written(export).items()}
    base.mkdir()
    save_file(state, base / FILE)


def rewrite(checkpoint: Path, **changes: object) -> None:
    """Give the manifest another state, with good checksums."""
    file = checkpoint / "manifest.json"
    about = parse(file.read_bytes())
    about.state.update(changes)  # type: ignore[attr-defined]
    file.write_bytes(dump(about))


OTHERS = [
    *named(ZERO_WORLDS, "z1_round_robin", "z2_bf16", "z3_bf16_cut"),
    *named(FSDP1_WORLDS, "full_flat", "hybrid"),
]
EVERY_CUT = [
    *worlds("plain", "ddp-3", "fsdp2-3", "fsdp2_columns-2", "hsdp", "fsdp2_tp").args[1],
    *(pytest.param(w, w.ranks[0], id=w.name) for w in OTHERS),
]


@pytest.mark.parametrize(("world", "num_ranks"), EVERY_CUT)
def test_all_three_ways_write_the_gathered_average(world: World, tmp_path: Path):
    run = start(world).train(2)
    run.ema.save(tmp_path / "sharded")
    for dtype, size in ((None, "5GB"), (torch.bfloat16, 500)):
        options: Any = {"dtype": dtype, "max_shard_size": size}
        state = run.ema.gather_state_dict(dtype=dtype)
        for method in ("direct", "rank0"):
            run.ema.export(tmp_path / method, method=method, **options)
        if rank() == 0:
            same(written(tmp_path / "direct"), {n: state[n] for n in state.keys() - ALIASES.keys()})
            wanted = contents(tmp_path / "rank0")
            assert contents(tmp_path / "direct") == wanted
            base = tmp_path / "base"
            if not base.exists():
                base_from(tmp_path / "rank0", base)
            offline.export(tmp_path / "sharded", tmp_path / "offline", base=base, **options)
            assert contents(tmp_path / "offline") == wanted


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sharded checkpoint, an export of the same average, and a base, in one directory."""
    [plain] = named(WORLDS, "plain")
    run = start(plain, {"fast": 0.5, "slow": 0.9}).train(2)
    run.ema.save(tmp_path / "sharded")
    run.ema.export(tmp_path / "export", name="slow")
    base_from(tmp_path / "export", tmp_path / "base")
    return tmp_path


def test_the_command_writes_an_export(saved: Path, capsys):
    arguments = ["export", str(saved / "sharded"), str(saved / "out"), "--name", "slow"]
    assert cli.main([*arguments, "--base", str(saved / "base")]) == 0
    assert contents(saved / "out") == contents(saved / "export")
    assert "in the layout of plain, model.safetensors" in capsys.readouterr().out
    arguments += ["--dtype", "bf16", "--max-shard-size", "1KB", "--weights-name", "m.safetensors"]
    assert cli.main([*arguments, "--base", str(saved / "base")]) == 0
    assert (saved / "out" / FILE).exists()  # another name, so it stays
    index = json.loads((saved / "out" / "m.safetensors.index.json").read_text())
    file = saved / "out" / index["weight_map"]["emb.weight"]
    assert load_file(file)["emb.weight"].dtype == torch.bfloat16


def test_a_bad_argument_is_refused(saved: Path, capsys):
    command = ["export", str(saved / "sharded"), str(saved / "out"), "--base", str(saved / "base")]
    for arguments, message in (
        (["--name", "other"], "no average named 'other'"),
        ([], "several averages"),
        (["--name", "slow", "--dtype", "int8"], "dtype is 'int8'"),
        (["--name", "slow", "--max-shard-size", "lots"], "max_shard_size"),
        (["--name", "slow", "--weights-name", "../x.safetensors"], "weights_name"),
    ):
        assert cli.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (saved / "out").exists()


def test_a_checkpoint_is_no_place_for_an_export(saved: Path, capsys):
    sharded, command = saved / "sharded", ["--name", "slow", "--base", str(saved / "base")]
    for path in (sharded, saved / "here" / ".." / "sharded"):
        assert cli.main(["export", str(sharded), str(path), *command]) == 2
        error = capsys.readouterr().err
        assert "is a checkpoint of save" in error and "export to another directory" in error
    assert sorted(e.name for e in sharded.iterdir()) == ["fast", "manifest.json", "slow"]
    (saved / "out").mkdir()
    (saved / "out" / "manifest.json").write_text('{"name": "a web app"}')  # not ours
    assert cli.main(["export", str(sharded), str(saved / "out"), *command]) == 0


def test_what_is_in_neither_checkpoint_nor_base_is_listed(saved: Path, capsys):
    out = saved / "out"
    assert cli.main(["export", str(saved / "sharded"), str(out), "--name", "slow"]) == 1
    error = capsys.readouterr().err
    assert all(name in error for name in FROZEN) and "--base" in error
    state = load_file(saved / "base" / FILE)
    del state["frozen.bias"]
    for bias, message in (
        ({}, r"frozen\.bias is missing"),
        ({"frozen.bias": torch.zeros(2)}, r"frozen\.bias has shape \(2,\), wanted \(7,\)"),
    ):
        save_file(state | bias, saved / "base" / FILE)
        with pytest.raises(CheckpointError, match=message):
            offline.export(saved / "sharded", out, name="slow", base=saved / "base")
    assert not out.exists()


def test_an_altered_checkpoint_is_refused_and_the_old_export_stays(saved: Path):
    before = contents(saved / "export")
    file = next((saved / "sharded" / "slow").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="altered"):
        offline.export(saved / "sharded", saved / "export", name="slow", base=saved / "base")
    assert contents(saved / "export") == before
    assert not [entry for entry in saved.iterdir() if entry.name.startswith(".")]


def test_a_malformed_layout_is_refused(saved: Path):
    body = (saved / "sharded" / "manifest.json").read_bytes().split(b"\n", 1)[1]
    model = json.loads(body)["state"]["model"]
    for change in (
        {"texts": {"../evil.json": "{}"}},
        {"texts": {"config.json": 3}},
        {"weights_name": "../evil.safetensors"},
        {"texts": {"config.json": "[]"}},
        {"names": {"a": 1}},
        {"names": 0},
        {"ignored": "weight"},
        {"dtype_at": {"config.json": [["dtype"]]}},
        {"library": "other"},
    ):
        rewrite(saved / "sharded", model=model | {"card": model["card"] | change})
        with pytest.raises(ValueError, match="malformed"):
            offline.export(saved / "sharded", saved / "out", name="slow", base=saved / "base")
    assert not (saved / "out").exists()
    assert not list(saved.glob("evil*")) and not list(saved.parent.glob("evil*"))


def test_the_name_of_a_model_is_no_path(tmp_path: Path):
    models = {"unet": torch.nn.Linear(3, 2), "text": torch.nn.Linear(2, 2)}
    ShardedEMA(models, 0.5).save(tmp_path / "ema")
    for name in ("../evil", "/tmp/evil", "a/b", ".hidden"):
        cards = {name: {"library": "plain"}, "text": {"library": "plain"}}
        rewrite(tmp_path / "ema", model={"cards": cards, "others": {}})
        with pytest.raises(CheckpointError, match="cannot name models"):
            offline.export(tmp_path / "ema", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ema"]


def test_without_a_layout_the_base_says_what_the_model_is(saved: Path):
    rewrite(saved / "sharded", model={})
    config = {"model_type": "x", "torch_dtype": "bfloat16"}
    (saved / "base" / "config.json").write_text(json.dumps(config))
    done = offline.export(saved / "sharded", saved / "out", name="slow", base=saved / "base")
    assert done["library"] == "transformers"
    config = json.loads((saved / "out" / "config.json").read_text())
    assert config == {"dtype": "float32", "model_type": "x"}
    same(written(saved / "out"), written(saved / "export"))
