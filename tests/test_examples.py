"""The examples run as they stand, each under every launcher that a CPU allows, for a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DIGITS = "examples/digits_diffusion.py"
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]

LAUNCHES = {
    "accelerate-ddp": [*ACCELERATE, "launch/accelerate/cpu-2.yaml", DIGITS],
    "accelerate-zero3": [*ACCELERATE, "launch/accelerate/zero3-cpu.yaml", DIGITS],
    "torchrun-fsdp1": [*TORCHRUN, DIGITS, "--fsdp1"],
    "torchrun-fsdp2": [*TORCHRUN, DIGITS, "--fsdp2"],
}


def run(command: list[str], **environment: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("launch", LAUNCHES)
def test_digits_train_average_export_and_load(launch: str, tmp_path: Path):
    # DeepSpeed's launcher reads the device from its own variable and takes no part in this one.
    variable = {} if "zero" in launch else {"ACCELERATE_USE_CPU": "true"}
    command = [*LAUNCHES[launch], "--steps", "3", "--samples", "8", "--out", str(tmp_path)]
    printed = run(command, **variable)
    assert "on 2 processes" in printed
    assert "bit-equal in a fresh process" in printed
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert (tmp_path / "ema" / "diffusion_pytorch_model.safetensors").exists()


def test_one_process_where_two_were_wanted_is_an_error_that_says_what_to_run(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"1 process\(es\) came up where 2 were wanted"):
        run([sys.executable, DIGITS, "--out", str(tmp_path)], ACCELERATE_USE_CPU="true")
