"""The commands read a checkpoint without its model, its ranks or a process group."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dist_ema import cli
from dist_ema.checkpoint.writer import save
from dist_ema.core.group import Group
from tests.cuts import TENSORS, full, infos, parts_of, state_of, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two averages, as one process wrote them."""
    ranks = Group.alone()
    averages = {n: parts_of("flat", TENSORS, full(TENSORS, i), ranks) for i, n in enumerate("ab")}
    save(tmp_path / "a", averages, TENSORS, state_of("ab", step=1200), ranks)
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
    assert lines[2] == "step 1200, 1200 updates"
    assert "average a: 7 tensors, 189 elements, 756 B" in lines
    assert "average b: 7 tensors, 189 elements, 756 B" in lines
    assert "schedule Constant(decay=0.5), last decay 0.5" in lines
    assert "emb.weight = head.weight  13 x 6         F32        1  312 B" in lines
    assert "scale                     scalar         F32        1    4 B" in lines


def test_inspect_writes_json(checkpoint: Path, capsys):
    status, out, _ = run(capsys, "inspect", "--json", checkpoint)
    told = json.loads(out)
    assert status == 0
    assert told["state"] == state_of("ab", step=1200)
    assert told["written"]["world_size"] == 1
    assert told["averages"]["b"]["directory"] == "b"
    assert told["averages"]["b"]["schedule"] == {"kind": "Constant", "decay": 0.5}
    assert told["averages"]["a"]["tensors"]["emb.weight"] == {
        "shape": [13, 6],
        "dtype": "F32",
        "aliases": ["head.weight"],
        "num_boxes": 1,
        "nbytes": 312,
    }


def test_inspect_takes_plain_safetensors(tmp_path: Path, capsys):
    save_file(full(TENSORS), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        status, out, _ = run(capsys, "inspect", path)
        assert status == 0
        assert "average (without a name): 7 tensors" in out


def test_verify_finds_nothing_in_a_good_checkpoint(checkpoint: Path, capsys):
    status, out, err = run(capsys, "verify", checkpoint)
    assert (status, err) == (0, "")
    assert out == f"{checkpoint}: good; 14 boxes, 1.51 kB, xxh3_64\n"


def test_verify_names_every_damage(checkpoint: Path, capsys):
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


def test_a_command_that_makes_no_sense_ends_with_2(capsys):
    for arguments in ([], ["destroy"], ["inspect"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: dist-ema" in capsys.readouterr().err


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys):
    tensors = infos({"a\x1b[2J\u202eb": (2,)})
    ranks = Group.alone()
    parts = parts_of("rows", tensors, full(tensors), ranks)
    save(tmp_path / "a", {"ema": parts}, tensors, state_of(), ranks)
    status, out, _ = run(capsys, "inspect", tmp_path / "a")
    assert status == 0
    assert "a\\x1b[2J\\u202eb" in out


def test_a_checkpoint_put_aside_is_read(checkpoint: Path, capsys):
    aside = checkpoint.with_name(".a.old-01234567")
    checkpoint.rename(aside)
    status, out, _ = run(capsys, "verify", checkpoint)
    assert status == 0
    assert out.startswith(f"{aside}: good")


@pytest.mark.parametrize("bar", ["tqdm", "none"])
def test_verify_shows_its_progress_on_a_terminal(checkpoint: Path, bar: str, monkeypatch, capfd):
    if bar == "none":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.main(["verify", str(checkpoint)]) == 0
        stderr.flush()
        assert select.select([main], [], [], 10)[0], "nothing was shown"
        said = os.read(main, 65536).decode()
    os.close(main)
    assert "%" in said


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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "dist_ema"), str(checkpoint)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_module_is_the_command(tmp_path: Path):
    write(tmp_path / "a", Group.alone())
    (tmp_path / "a" / "manifest.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "dist_ema", "verify", tmp_path / "a"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "manifest.json: is not the manifest" in done.stderr
