"""Exports by one process from a sharded checkpoint: the same bytes, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_ema import cli
from dist_ema.checkpoint import CheckpointError
from dist_ema.checkpoint.manifest import dump
from dist_ema.checkpoint.parsing import parse
from dist_ema.export import offline
from tests.net import FROZEN, TRAINABLE
from tests.runs import start
from tests.worlds import World, rank, worlds
from tests.worlds_deepspeed import WORLDS as ZERO_WORLDS
from tests.worlds_fsdp1 import WORLDS as FSDP1_WORLDS

FILE = "model.safetensors"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def base_from(export: Path, base: Path) -> None:
    """A model's directory: what is not averaged as exported, anything in place of the rest."""
    state = {n: torch.full_like(t, -7) if n in TRAINABLE else t for n, t in read(export).items()}
    base.mkdir()
    save_file(state, base / FILE)


def read(export: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(export.glob("*.safetensors")) for n, t in load_file(f).items()}


def rewrite(checkpoint: Path, **changes: object) -> None:
    """Give the manifest another state, with good checksums."""
    file = checkpoint / "manifest.json"
    about = parse(file.read_bytes(), "")
    about.state.update(changes)  # type: ignore[attr-defined]
    file.write_bytes(dump(about))


SOME = [
    *(w for w in ZERO_WORLDS if w.name in ("z1_round_robin", "z2_bf16", "z3_bf16_cut")),
    *(w for w in FSDP1_WORLDS if w.name in ("full_flat", "hybrid")),
]
further_worlds = pytest.mark.parametrize(
    ("world", "num_ranks"), [pytest.param(w, w.ranks[0], id=w.name) for w in SOME]
)


def same_bytes(world: World, tmp_path: Path) -> None:
    run = start(world).train(2)
    run.ema.save(tmp_path / "sharded")
    for dtype, size in ((None, "5GB"), (torch.bfloat16, 500)):
        for method in ("direct", "rank0"):
            run.ema.export(tmp_path / method, dtype=dtype, max_shard_size=size, method=method)
        if rank() == 0:
            wanted = contents(tmp_path / "rank0")
            assert contents(tmp_path / "direct") == wanted
            base = tmp_path / f"base-{size}"
            if dtype is None:
                base_from(tmp_path / "rank0", base)
            offline.export(
                tmp_path / "sharded",
                tmp_path / "offline",
                dtype=dtype,
                max_shard_size=size,
                base=tmp_path / "base-5GB",
            )
            assert contents(tmp_path / "offline") == wanted


@worlds("plain", "ddp-3", "fsdp2-3", "fsdp2_columns-2", "hsdp", "fsdp2_tp")
def test_all_three_ways_write_the_same_bytes(world: World, tmp_path):
    same_bytes(world, tmp_path)


@further_worlds
def test_all_three_ways_write_the_same_bytes_under_other_engines(world: World, tmp_path):
    same_bytes(world, tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sharded checkpoint, an export of the same average, and a base, in one directory."""
    from tests.worlds import WORLDS

    plain = next(w for w in WORLDS if w.name == "plain")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "other"], "no average named 'other'"),
        ([], "several averages"),
        (["--name", "slow", "--dtype", "int8"], "dtype is 'int8'"),
        (["--name", "slow", "--max-shard-size", "lots"], "max_shard_size"),
        (["--name", "slow", "--weights-name", "../x.safetensors"], "weights_name"),
    ],
)
def test_a_bad_argument_is_refused(saved: Path, arguments, message: str, capsys):
    out = saved / "out"
    base = ["--base", str(saved / "base")]
    assert cli.main(["export", str(saved / "sharded"), str(out), *base, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_what_is_in_neither_checkpoint_nor_base_is_told(saved: Path, capsys):
    out = saved / "out"
    assert cli.main(["export", str(saved / "sharded"), str(out), "--name", "slow"]) == 1
    told = capsys.readouterr().err
    assert all(name in told for name in FROZEN) and "--base" in told
    state = load_file(saved / "base" / FILE)
    del state["frozen.bias"]
    save_file(state, saved / "base" / FILE)
    with pytest.raises(CheckpointError, match=r"lacks frozen\.bias"):
        offline.export(saved / "sharded", out, name="slow", base=saved / "base")
    state["frozen.bias"] = torch.zeros(2)
    save_file(state, saved / "base" / FILE)
    with pytest.raises(CheckpointError, match=r"frozen\.bias has shape \(2,\), wanted \(7,\)"):
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


@pytest.mark.parametrize(
    "change",
    [
        {"texts": {"../evil.json": "{}"}},
        {"texts": {"config.json": 3}},
        {"weights_name": "../evil.safetensors"},
        {"names": {"a": 1}},
        {"dtype_at": {"config.json": [["dtype"]]}},
        {"library": "other"},
    ],
)
def test_a_card_that_makes_no_sense_is_refused(saved: Path, change):
    told = json.loads((saved / "sharded" / "manifest.json").read_bytes().split(b"\n", 1)[1])
    model = told["state"]["model"]
    model["card"] |= change
    rewrite(saved / "sharded", model=model)
    with pytest.raises(ValueError, match="malformed"):
        offline.export(saved / "sharded", saved / "out", name="slow", base=saved / "base")
    assert not (saved / "out").exists()
    assert not list(saved.glob("evil*")) and not list(saved.parent.glob("evil*"))


def test_without_a_card_the_base_says_what_the_model_is(saved: Path):
    rewrite(saved / "sharded", model={})
    config = {"model_type": "x", "torch_dtype": "bfloat16"}
    (saved / "base" / "config.json").write_text(json.dumps(config))
    told = offline.export(saved / "sharded", saved / "out", name="slow", base=saved / "base")
    assert told["library"] == "transformers"
    config = json.loads((saved / "out" / "config.json").read_text())
    assert config == {"dtype": "float32", "model_type": "x"}
    found, wanted = read(saved / "out"), read(saved / "export")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
