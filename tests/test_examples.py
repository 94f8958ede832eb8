"""The demo's example runs as it stands, under every launcher that a CPU allows, for three steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scripts import CPU, run_on, under_accelerate

SPIRALS = "examples/spirals_diffusion.py"

LAUNCHES: dict[str, Callable[..., str]] = {
    "accelerate-ddp": lambda *args: under_accelerate("cpu-2", SPIRALS, *args, **CPU),
    "accelerate-zero3": lambda *args: under_accelerate("zero3-cpu", SPIRALS, *args),
    "torchrun-fsdp1": lambda *args: run_on(2, SPIRALS, "--torch", "fsdp1", *args),
    "torchrun-fsdp2": lambda *args: run_on(2, SPIRALS, "--torch", "fsdp2", *args),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_spirals_train_average_export_and_load(launch: str, tmp_path: Path):
    short = ["--steps", "3", "--samples", "50", "--out", str(tmp_path)]
    printed = LAUNCHES[launch](*short)
    assert "on 2 process(es)" in printed
    averaged = float(re.search(r"step 3, .* averaged (\d\.\d+)", printed)[1])
    digest = re.search(r"the average, 30 tensors: sha256 (\w{16})", printed)[1]
    assert (tmp_path / "spirals.png").stat().st_size > 1000
    printed = run_on(1, SPIRALS, "read", *short)
    assert f"sha256 {digest}, every bit as at the end of the training" in printed
    loaded = float(re.search(r"from_pretrained: held-out loss (\d\.\d+)", printed)[1])
    # The configuration of ZeRO-3 computes in bf16, the model that is read in fp32.
    assert loaded == pytest.approx(averaged, rel=0.02 if "zero3" in launch else 1e-4)
    if launch == "accelerate-ddp":
        printed = run_on(1, SPIRALS, "resume", "--processes", "1", *short, **CPU)
        assert "resumed at step 3 on 1 process(es)" in printed
        assert f"sha256 {digest}, every bit as at the end of the training" in printed
        assert "step 6, held-out loss" in printed  # three more
    if launch == "torchrun-fsdp2":
        (tmp_path / "sha256").write_text("0" * 64)
        with pytest.raises(AssertionError, match="had at the end of the training 0000000000000000"):
            run_on(1, SPIRALS, "read", *short)


def test_one_process_where_two_were_wanted_is_an_error_that_says_what_to_run(tmp_path: Path):
    with pytest.raises(AssertionError, match=r"1 process\(es\) came up where 2 were wanted"):
        run_on(1, SPIRALS, "--out", tmp_path, **CPU)
