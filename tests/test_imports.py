"""A file imports only from lower layers, and never a library that the user did not import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dist_ema"

# From the bottom to the top; modules of one layer do not import one another. "" is the package.
LAYERS = [
    {
        "core",
        "posthoc",
        "core.accelerator",
        "checkpoint.checksums",
        "checkpoint.collector",
        "checkpoint.directory",
        "hints",
        "core.layout",
        "core.names",
        "posthoc.profiles",
        "core.group",
        "core.requirements",
        "schedule",
    },
    {
        "batchnorm",
        "checkpoint.boxed",
        "checkpoint.manifest",
        "core.engine",
        "export.card",
        "export.format",
        "export.replace",
        "core.lerp",
    },
    {"checkpoint", "export", "export.layouts", "export.writing", "options"},
    {"core.replicas", "core.storage", "core.swap"},
    {"engines.plain", "engines.dtensor", "engines.fsdp1", "engines.deepspeed"},
    {
        "checkpoint.agreement",
        "checkpoint.background",
        "checkpoint.parsing",
        "checkpoint.snapshot",
        "checkpoint.visibility",
        "core.plan",
    },
    {"checkpoint.blocks", "checkpoint.shards", "checkpoint.stateful", "engines"},
    {
        "checkpoint.consolidated",
        "checkpoint.reader",
        "checkpoint.verify",
        "checkpoint.writer",
        "core.gather",
        "core.teacher",
    },
    {"core.average", "checkpoint.matching", "checkpoint.regions", "posthoc.snapshots"},
    {"checkpoint.api", "checkpoint.combine", "export.live", "export.offline"},
    {"ema", "posthoc.synthesize"},
    {"cli"},
    {"integrations", "integrations.base"},
    {"integrations.accelerate", "integrations.lightning", "integrations.transformers"},
    {"", "__main__"},
]
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}

FOREIGN = {"deepspeed", "accelerate", "transformers", "diffusers", "peft", "lightning"}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def inside(dotted: str) -> str:
    return dotted.removeprefix("dist_ema").removeprefix(".")


def is_known(name: str) -> bool:
    return name.split(".")[0] == "dist_ema" and inside(name) in LAYER_OF


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import below this node with the dotted name that it takes, lazy ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield node, dotted if is_known(dotted) else str(node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name


def run_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements of a module outside functions; those under TYPE_CHECKING never run."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            for child in getattr(node, field, []):
                todo += child.body if isinstance(child, ast.ExceptHandler) else [child]


def test_every_file_has_a_layer():
    found = {module_name(path) for path in FILES}
    assert sorted(found - set(LAYER_OF)) == [], "files without a layer"
    assert sorted(set(LAYER_OF) - found) == [], "layers without a file"


def test_no_module_is_in_two_layers():
    assert sum(map(len, LAYERS)) == len(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "dist_ema")
def test_imports_point_down(path: Path):
    own = LAYER_OF.get(module_name(path), len(LAYERS))
    taken = {inside(n) for _, n in imports(ast.parse(path.read_text())) if is_known(n)}
    assert sorted(name for name in taken if LAYER_OF[name] >= own) == []


def test_engines_never_import_one_another():
    engines = {name for name in LAYER_OF if name.startswith("engines.")} - {"core.engine"}
    for path in FILES:
        if module_name(path) in engines:
            taken = {inside(n) for _, n in imports(ast.parse(path.read_text()))}
            assert not taken & engines, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "dist_ema")
def test_no_foreign_library_is_imported_at_the_top(path: Path):
    own = {path.stem} if path.parent.name == "integrations" else set()
    for statement in run_at_import(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            taken = {name.split(".")[0] for _, name in imports(statement)}
            assert not taken & (FOREIGN - own), f"{path.name}:{statement.lineno}"


def test_importing_the_package_imports_no_foreign_library():
    program = f"import sys, dist_ema; print(*set({FOREIGN!r}) & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


NO_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Block())
import runpy
sys.argv = ["dist_ema", *sys.argv[1:]]
runpy.run_module("dist_ema", run_name="__main__")
"""


@pytest.mark.ranks(0)
def test_the_command_line_needs_no_torch(tmp_path: Path):
    import torch

    from dist_ema import ShardedEMA

    ShardedEMA(torch.nn.Linear(2, 2)).save(tmp_path / "ema")
    for arguments in (["--help"], ["inspect", tmp_path / "ema"], ["verify", tmp_path / "ema"]):
        done = subprocess.run(
            [sys.executable, "-c", NO_TORCH, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT.parent,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.ranks(0)
def test_the_package_imports_nothing_before_it_is_used():
    code = (
        "import sys, dist_ema; assert 'torch' not in sys.modules; assert 'Warmup' in dir(dist_ema);"
        "from dist_ema import *; assert set(dist_ema.__all__) <= set(globals())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_an_average_in_one_process_imports_no_sharded_tensors():
    """They take a second to import."""
    program = (
        "import sys, torch; from dist_ema import ShardedEMA;"
        "ShardedEMA(torch.nn.Linear(2, 2)).update();"
        "print([name for name in sys.modules if name in"
        " ('torch.distributed.tensor', 'torch.distributed.checkpoint', 'torch.distributed.fsdp')])"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
