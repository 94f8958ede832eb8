"""The pages' code runs as it is printed, and what the pages name exists."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torch import nn

from dist_ema import ShardedEMA
from tests.readme import BLOCK, LAUNCHES, ROOT, blocks, pages
from tests.scripts import BIN, CPU, run, run_on, under_accelerate

SCRIPT = "tests/readme.py"
PAGES = pages()
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
PROSE = {page: BLOCK.sub("", text) for page, text in TEXTS.items()}
LAUNCHED = [
    (page, launch)
    for page in PAGES
    for launch in dict.fromkeys(block.launch for block in blocks(page))
    if launch not in ("", "afterwards")
]
# Files below `run/` that the blocks of a page and launch write.
MADE = {
    ("README.md", "torchrun"): ["model/model.safetensors", "exported/model.safetensors"],
    ("README.md", "accelerate"): ["state/ema/manifest.json", "adapter/adapter_model.safetensors"],
    ("README.md", "deepspeed"): ["averaged/model.safetensors"],
    ("README.md", "python"): ["averaged/config.json", "averaged/model.safetensors"],
    ("dist_ema/GUIDE.md", "python"): ["last.ckpt"],
    ("dist_ema/GUIDE.md", "torchrun"): [
        "gan/critic/model.safetensors",
        "from-checkpoint/model.safetensors",
        "sweep/sigma_rel-0.05/manifest.json",
        "chosen/model.safetensors",
        "merged/model.safetensors",
    ],
    ("examples/README.md", "accelerate"): [
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("pipeline/model_index.json", "checkpoint-8/ema/manifest.json"),
    ],
    ("examples/README.md", "fsdp2"): ["policy/adapter_model.safetensors"],
    ("examples/README.md", "python"): ["adapter/adapter_model.safetensors"],
    ("examples/README.md", "torchrun"): [
        "gpt/average/manifest.json",
        "gpt/model/model.safetensors",
    ],
}


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 250


def test_the_readme_lists_the_tested_versions():
    """Oldest and newest of launch/versions.txt, and those of launch/constraints.txt."""
    lines = (ROOT / "launch/versions.txt").read_text().splitlines()
    names, *versions = [line.split() for line in lines if not line.startswith("#")]
    pins = (ROOT / "launch/constraints.txt").read_text()
    for number, name in enumerate(names):
        pinned = re.search(rf"^{name}==(\S+)", pins, re.M)
        assert pinned
        cells = [name, versions[0][number], pinned[1], versions[-1][number]]
        assert f"| {' | '.join(cells)} |" in TEXTS["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_says_how_it_runs(page: str):
    for block in blocks(page):
        runs = block.launch in LAUNCHES  # see tests/readme.py for the comment above a block
        assert runs == (block.language == "python"), f"{page}, line {block.line}: {block.launch!r}"


def run_blocks(page: str, launch: str, cwd: Path) -> None:
    if launch == "accelerate":
        under_accelerate("cpu-2", SCRIPT, page, launch, cwd=cwd, **CPU)
    else:
        num_ranks = 1 if launch in ("python", "afterwards") else 2
        run_on(num_ranks, SCRIPT, page, launch, cwd=cwd)


@pytest.mark.parametrize(("page", "launch"), LAUNCHED)
def test_blocks_run(page: str, launch: str, tmp_path: Path):
    """With those under torchrun, also the page's `dist-ema` commands and "afterwards" blocks."""
    run_blocks(page, launch, tmp_path)
    if launch == "torchrun":
        if any(block.launch == "afterwards" for block in blocks(page)):
            run_blocks(page, "afterwards", tmp_path)
        for block in blocks(page):
            if block.language == "bash" and block.code.startswith("dist-ema"):
                path = f"{BIN}:{os.environ['PATH']}"
                run(["bash", "-euc", block.code], tmp_path, PATH=path)
    for path in MADE.get((page, launch), []):
        assert (tmp_path / "run" / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_member_of_an_average_exists(page: str):
    ema = ShardedEMA(nn.Linear(2, 2))
    of_others = {"module", "store"}  # of other libraries: named as errors
    for name in {*re.findall(r"\bema\.(\w+)", TEXTS[page])} - {"py", "safetensors"}:
        if name in of_others:
            with pytest.raises(AttributeError, match="average_parameters"):
                getattr(ema, name)
        else:
            assert hasattr(ema, name), name


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_link_exists(page: str):
    """Links are relative to the page; paths in the text to the repository or to the page."""
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (here / path).resolve() if path else ROOT / page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text()), target
    named = re.findall(r"\b(?:examples|launch|tests|dist_ema|\.ci)/[\w./*-]*", TEXTS[page])
    for path in named:
        path = path.rstrip(".")
        assert [*ROOT.glob(path), *here.glob(path)], path


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M)
    words = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-") for heading in words}
