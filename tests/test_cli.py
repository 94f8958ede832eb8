"""The commands read a checkpoint without its model, its ranks or a process group."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import save_file
from torch import nn

from dist_ema import PowerFunction, ShardedEMA, cli
from dist_ema.checkpoint.reader import load
from dist_ema.core import environment
from dist_ema.core.group import Group
from tests.cuts import TENSORS, blank, full, infos, state_of, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two averages, as one process wrote them."""
    write(tmp_path / "a", Group.alone(), seed=1200, names="ab")
    return tmp_path / "a"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_inspect_shows_what_is_there(checkpoint: Path, capsys):
    status, out, err = run(capsys, "inspect", checkpoint)
    assert (status, err) == (0, "")
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].startswith(f"{checkpoint}: ")
    assert lines[1].startswith("written by 1 ranks, 20")
    assert lines[3] == "step 1200, 1200 updates"
    assert {
        "average a: 7 tensors, 189 elements, 756 B",
        "average b: 7 tensors, 189 elements, 756 B",
        "schedule Constant(decay=0.5), last decay 0.5",
        "emb.weight = head.weight  13 x 6         F32        1  312 B",
        "scale                     scalar         F32        1    4 B",
    } <= set(lines)


def test_inspect_fits_in_80_columns(tmp_path: Path, capsys):
    """A long name has a line of its own; it is not shortened."""
    names = [f"base_model.layers.{i}.self_attention.projection.weight" for i in (0, 11)]
    shapes = {**dict.fromkeys(names, (4096, 3)), "x" * 75: (2, 2), "bias": (8,)}
    write(tmp_path / "a", Group.alone(), tensors=infos(shapes))
    status, out, _ = run(capsys, "inspect", tmp_path / "a")
    _, *lines = out.splitlines()
    assert status == 0 and max(map(len, lines)) <= 80
    assert f"  {'x' * 75}" in lines
    assert lines[-1].split() == ["bias", "8", "F32", "1", "32", "B"]
    columns = {line.index(" F32 ") for line in lines if " F32 " in line}
    assert len(columns) == 1 and len(lines) == 7 + len(shapes) + 3


def test_commands_write_json(checkpoint: Path, tmp_path: Path, capsys):
    def written(*arguments: object, status: int = 0) -> Any:
        code, out, _ = run(capsys, *arguments, "--json")
        assert code == status
        return json.loads(out)

    summary = written("inspect", checkpoint)
    assert summary["state"] == state_of("ab", step=1200)
    assert summary["written"]["world_size"] == 1
    assert summary["averages"]["b"]["directory"] == "b"
    assert summary["averages"]["b"]["schedule"] == {"kind": "Constant", "decay": 0.5}
    assert summary["averages"]["a"]["tensors"]["emb.weight"] == {
        "shape": [13, 6], "dtype": "F32", "aliases": ["head.weight"], "num_boxes": 1, "nbytes": 312,
    }  # fmt: skip
    good = {"path": str(checkpoint), "problems": [], "num_boxes": 14, "nbytes": 1512}
    assert written("verify", checkpoint) == good | {"checksum": "xxh3_64"}
    exported = written("export", checkpoint, tmp_path / "out", "--name", "a")
    assert exported["files"] == ["model.safetensors"] and exported["library"] == "plain"
    merged = written("merge", tmp_path / "m", checkpoint, tmp_path / "out", "--name", "a")
    assert merged["path"] == str(tmp_path / "m") and merged["nbytes"] > exported["nbytes"]
    assert merged["weights"] == {str(checkpoint): 0.5, str(tmp_path / "out"): 0.5}
    next(checkpoint.rglob("shard-*")).unlink()
    assert len(written("verify", checkpoint, status=1)["problems"]) == 1


def test_env_shows_what_an_issue_report_needs(capsys):
    _, out, _ = run(capsys, "env", "--json")
    report = json.loads(out)
    assert report["libraries"]["torch"] == version("torch")
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["engines"]["FSDP1"] == "yes"
    assert "gloo" in report["backends"] and report["devices"] and report["dist_ema"]
    _, out, _ = run(capsys, "env")
    assert f"python: {report['python']}\n" in out
    assert any(line.split() == ["torch", version("torch")] for line in out.splitlines())


def test_env_names_the_version_that_an_engine_needs(monkeypatch):
    versions = {"torch": "2.7.1"}
    monkeypatch.setattr(environment, "_version", versions.get)
    engines = environment.environment()["engines"]
    assert engines["FSDP1"] == "no: needs torch 2.8 or newer, and 2.7.1 is installed"
    assert engines["DeepSpeed ZeRO"].startswith("no: needs deepspeed 0.16.4 or newer, which is not")


COMMANDS = ("inspect", "verify", "export", "synthesize", "merge", "env")


def test_help_has_examples_and_exit_codes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("", *COMMANDS):
        with pytest.raises(SystemExit) as caught:
            cli.main([*filter(None, [command]), "--help"])
        out = capsys.readouterr().out
        assert caught.value.code == 0 and max(map(len, out.splitlines())) <= 80
        assert f"examples:\n  dist-ema {command}" in out and "exit codes:\n  0  success" in out
        assert all(name in out for name in COMMANDS) if not command else "--json" in out


def test_an_interrupt_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_env", mock.Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "dist-ema: interrupted\n"


def test_plots_are_images_or_say_what_is_missing(tmp_path: Path, capsys, monkeypatch):
    for name in ("step-1", "step-2"):
        (tmp_path / name).mkdir()
        save_file(full(TENSORS), tmp_path / name / "model.safetensors")
    merge = ("merge", tmp_path / "out", tmp_path / "step-*", "--plot")
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, PowerFunction(sigma_rel=0.1))
    ema.update()
    ema.save(tmp_path / "ema")
    sweep = ("synthesize", tmp_path / "ema", "--out", tmp_path / "swept", "--sweep", "0.1:0.2:0.05")
    for image, command in (("a.png", merge), ("b.png", (*sweep, "--plot"))):
        assert run(capsys, *command, tmp_path / image)[0] == 0
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    for name in ("out", "swept"):
        shutil.rmtree(tmp_path / name)
    status, _, err = run(capsys, *merge, tmp_path / "a.txt")
    assert status == 2 and "ending in .png, .svg or .pdf" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command in (merge, (*sweep, "--plot")):
        status, out, err = run(capsys, *command, tmp_path / "c.png")
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert "install it with: pip install matplotlib" in err
    assert not {"out", "swept", "c.png"} & {entry.name for entry in tmp_path.iterdir()}


def test_inspect_takes_plain_safetensors(tmp_path: Path, capsys):
    save_file(full(TENSORS), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        status, out, _ = run(capsys, "inspect", path)
        assert status == 0
        assert "average (without a name): 7 tensors" in out


def test_verify_finds_nothing_in_a_good_checkpoint_and_names_every_damage(checkpoint: Path, capsys):
    good = f"{checkpoint}: good; 14 parts, 1.51 kB, xxh3_64\n"
    assert run(capsys, "verify", checkpoint) == (0, good, "")
    shards = sorted(checkpoint.rglob("shard-*"))
    with open(shards[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    shards[1].unlink()
    status, out, _ = run(capsys, "verify", checkpoint)
    lines = out.splitlines()
    assert status == 1
    assert f"{shards[0]}: tensor cube is altered" in lines[0]
    assert lines[1] == f"{shards[1]}: No such file or directory"
    assert lines[2] == f"{checkpoint}: damaged, 2 problems"


def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path: Path, capsys):
    for command in ("inspect", "verify"):
        status, out, err = run(capsys, command, tmp_path / "absent")
        assert (status, out) == (1, "")
        assert err.startswith(f"dist-ema: {tmp_path}/absent: No such file or directory")
        assert err.count("\n") == 1
    save_file(full(TENSORS), tmp_path / "model.safetensors")
    status, _, err = run(capsys, "verify", tmp_path)
    assert status == 1
    assert "no checksums to compare" in err


def test_averages_in_a_directory_of_weights_are_named(checkpoint: Path, tmp_path: Path, capsys):
    # A checkpoint of accelerate or the Trainer: raw weights, with the average in a directory.
    status, _, err = run(capsys, "inspect", tmp_path)
    wanted = f"dist-ema: {tmp_path}: is not a checkpoint, but holds ['a']: give the path of one\n"
    assert (status, err) == (1, wanted)
    save_file(full(TENSORS), tmp_path / "model.safetensors")
    inside = "averages are in ['a']: give the path of one\n"
    status, _, err = run(capsys, "verify", tmp_path)
    assert status == 1
    assert err.endswith(f"no checksums to compare; {inside}")
    for arguments, done in (((), "shown"), ((tmp_path / "out",), "exported")):
        status, _, err = run(capsys, "export" if arguments else "inspect", tmp_path, *arguments)
        assert status == 0
        assert err == f"dist-ema: {tmp_path}: its own weights are {done}, but {inside}"
    assert run(capsys, "inspect", tmp_path / "model.safetensors")[::2] == (0, "")
    parts = blank("flat", TENSORS, Group.alone())
    with pytest.warns(
        UserWarning, match=r"its own weights are loaded, but averages are in \['a'\]"
    ):
        load(tmp_path, {"ema": parts}, TENSORS, Group.alone())


def test_a_command_that_makes_no_sense_ends_with_2(capsys):
    for arguments in ([], ["destroy"], ["inspect"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: dist-ema" in capsys.readouterr().err


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys):
    write(tmp_path / "a", Group.alone(), tensors=infos({"a\x1b[2J\u202eb": (2,)}))
    status, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert status == 0
    assert "a\\x1b[2J\\u202eb" in out


def test_a_checkpoint_put_aside_is_read(checkpoint: Path, capsys):
    aside = checkpoint.with_name(".a.old-01234567")
    checkpoint.rename(aside)
    status, out, _ = run(capsys, "verify", checkpoint)
    assert status == 0
    assert out.startswith(f"{aside}: good")


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_verify_shows_its_progress_on_a_terminal(checkpoint: Path, has_tqdm, monkeypatch, capfd):
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.main(["verify", str(checkpoint)]) == 0
        stderr.flush()
        is_shown = bool(select.select([main], [], [], 10 * has_tqdm)[0])
        assert is_shown == has_tqdm and (not is_shown or b"%" in os.read(main, 65536))
    os.close(main)


PROGRAM = """
import sys, types
package = types.ModuleType("dist_ema")
package.__path__ = [sys.argv[1]]
sys.modules["dist_ema"] = package  # without what its __init__ imports
from dist_ema import cli
status = cli.main(["verify", sys.argv[2]])
print(status, [name for name in sys.modules if name == "torch" or "engines" in name])
"""


def test_the_commands_import_no_engine_and_no_torch(checkpoint: Path):
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "dist_ema"), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_module_is_the_command(tmp_path: Path):
    write(tmp_path / "a", Group.alone())
    (tmp_path / "a" / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "dist_ema", "verify", tmp_path / "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "manifest.json: is not the manifest" in done.stderr
