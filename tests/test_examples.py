"""The examples run as they stand, each under every launcher that a CPU allows, for a few steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import ACCELERATE, run, run_on, under_accelerate

DIGITS = "examples/digits_diffusion.py"
CPU = {"ACCELERATE_USE_CPU": "true"}  # DeepSpeed's launcher takes no part in the variable

LAUNCHES: dict[str, Callable[..., str]] = {
    "accelerate-ddp": lambda *args: run(
        [*ACCELERATE, "launch/accelerate/cpu-2.yaml", DIGITS, *args], **CPU
    ),
    "accelerate-zero3": lambda *args: under_accelerate("zero3-cpu", DIGITS, *args),
    "torchrun-fsdp1": lambda *args: run_on(2, DIGITS, "--fsdp1", *args),
    "torchrun-fsdp2": lambda *args: run_on(2, DIGITS, "--fsdp2", *args),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_digits_train_average_export_and_load(launch: str, tmp_path: Path):
    printed = LAUNCHES[launch]("--steps", "3", "--samples", "8", "--out", str(tmp_path))
    assert "on 2 processes" in printed
    assert "bit-equal in a fresh process" in printed
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert (tmp_path / "ema" / "diffusion_pytorch_model.safetensors").exists()


def test_one_process_where_two_were_wanted_is_an_error_that_says_what_to_run(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"1 process\(es\) came up where 2 were wanted"):
        run([sys.executable, DIGITS, "--out", str(tmp_path)], **CPU)
