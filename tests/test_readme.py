"""The README runs as it stands, and what it names is there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.integrations.lightning import EMACallback
from tests.readme import README, ROOT, Block, blocks
from tests.scripts import BIN, run, run_on, under_accelerate
from tests.test_examples import CPU

SCRIPT = "tests/readme.py"
LAUNCHES: dict[str, Callable[[Path], str]] = {
    "torchrun": lambda cwd: run_on(2, SCRIPT, "torchrun", cwd=cwd),
    "deepspeed": lambda cwd: run_on(2, SCRIPT, "deepspeed", cwd=cwd),
    "accelerate": lambda cwd: under_accelerate("cpu-2", SCRIPT, "accelerate", cwd=cwd, **CPU),
    "python": lambda cwd: run_on(1, SCRIPT, "python", cwd=cwd),
    "afterwards": lambda cwd: run_on(1, SCRIPT, "afterwards", cwd=cwd),
}
TEXT = README.read_text()
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks under torchrun ran."""
    directory = tmp_path_factory.mktemp("readme")
    LAUNCHES["torchrun"](directory)
    return directory


def is_command(block: Block) -> bool:
    return block.language == "bash" and block.code.startswith("dist-ema")


def test_every_block_is_run():
    for block in blocks():
        if block.language == "python":
            assert block.launch in LAUNCHES, f"line {block.line}: no comment says how it is run"
            assert block.num_ranks == (2 if block.launch not in ("python", "afterwards") else 1)
        else:
            assert block.language == "bash" and block.launch is None, f"line {block.line}"
    assert {block.launch for block in blocks()} == {None, *LAUNCHES}


def test_blocks_under_torchrun_and_commands_after_them(trained: Path):
    with safe_open(trained / "run/model/model.safetensors", "pt") as exported:
        assert exported.get_slice("head.weight").get_shape() == [1, 8]
    printed = ""
    for block in blocks():
        if is_command(block):
            printed += run(
                ["bash", "-euc", block.code], trained, PATH=f"{BIN}:{os.environ['PATH']}"
            )
        elif block.launch == "afterwards":
            LAUNCHES["afterwards"](trained)
    assert "ema-001000: good; " in printed
    assert len(re.findall(r"sigma_rel-0\.\d+: sigma_rel .* residual", printed)) == 4
    low = load_file(trained / "run/from-checkpoint/model.safetensors")
    assert {tensor.dtype for tensor in low.values()} == {torch.bfloat16}
    same = load_file(trained / "run/model-bf16/model.safetensors")
    assert all(torch.equal(low[name], same[name]) for name in same)


@pytest.mark.parametrize(
    ("launch", "made"),
    [
        ("accelerate", ["state/ema/manifest.json", "adapter/adapter_model.safetensors"]),
        ("deepspeed", ["averaged/model.safetensors"]),
        ("python", ["averaged/config.json", "averaged/model.safetensors", "last.ckpt"]),
    ],
)
def test_blocks_under_other_launchers(launch: str, made: list[str], tmp_path: Path):
    LAUNCHES[launch](tmp_path)
    for path in made:
        assert (tmp_path / "run" / path).exists()


def test_every_constructor_in_a_table_builds():
    names = {name: getattr(dist_ema, name) for name in dist_ema.__all__}
    names |= {"EMACallback": EMACallback, "model": nn.Linear(2, 2), "d": 0.9, "u": 3, "k": 2}
    names |= {"model_parts": [nn.Linear(2, 2)], "f": 0.05, "s": 1}
    found = re.findall(r"`((?:ShardedEMA|EMACallback)\([^`]*=[^`]*\))`", PROSE)
    assert len(set(found)) >= 8
    for code in found:
        if "..." not in code:
            eval(code, names)


def test_every_member_of_an_average_is_there():
    ema = ShardedEMA(nn.Linear(2, 2))
    reached_for = {"module", "store"}  # of other libraries, told of as errors
    for name in {*re.findall(r"\bema\.(\w+)", TEXT)} - {"py", "safetensors", *reached_for}:
        assert hasattr(ema, name), name
    for name in reached_for:
        with pytest.raises(AttributeError, match="average_parameters"):
            getattr(ema, name)


def test_every_path_and_every_link_leads_somewhere():
    paths = re.findall(r"\b(?:examples|launch|tests|dist_ema|\.ci)/[\w./*-]*", TEXT)
    paths += [p for p in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in p]
    assert len(paths) > 40
    for path in paths:
        path = path.rstrip(".")
        if not path.startswith("tests/benchmarks/results"):  # made by the command beside it
            assert list(ROOT.glob(path)), path
    headings = re.findall(r"^#+ (.*)$", PROSE, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    assert {*re.findall(r"\]\(#([\w-]+)\)", TEXT)} <= anchors
