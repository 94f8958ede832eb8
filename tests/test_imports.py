"""A file imports only from lower layers, and never a library that the user did not import."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dist_ema"

# Files and packages of `dist_ema` from the bottom to the top: each imports from lower ones only.
ROOMS = [
    "schedule",
    "core",
    "options",
    "engines",
    "batchnorm",
    "checkpoint",
    "export",
    "ema",
    "posthoc",
    "cli",
    "integrations",
    "",
    "__main__",
]

FOREIGN = {"deepspeed", "accelerate", "transformers", "diffusers", "peft", "lightning"}
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILES, MAX_LINES = 55, 14_382


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path) for path in FILES}


def inside(dotted: str) -> str:
    return dotted.removeprefix("dist_ema").removeprefix(".")


def room(name: str) -> str:
    return name.split(".")[0]


def is_known(name: str) -> bool:
    return room(name) == "dist_ema" and inside(name) in MODULES


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


def taken(path: Path) -> set[str]:
    """The modules of `dist_ema` that a file imports, except for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return {inside(name) for _, name in imports(tree) if is_known(name)}


def test_every_file_is_in_a_room():
    assert sorted({room(name) for name in MODULES}) == sorted(ROOMS)


def test_imports_point_down():
    own = {module_name(path): taken(path) for path in FILES}
    upward = [
        (name, other)
        for name, others in own.items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert upward == []
    graph = {name: others - {name} for name, others in own.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises if there is a cycle


def test_there_are_few_files_and_lines():
    lines = sum(len(path.read_text().splitlines()) for path in FILES)
    assert len(FILES) <= MAX_FILES
    assert lines <= MAX_LINES


def test_engines_never_import_one_another():
    engines = {n for n in MODULES if n.startswith("engines.")} - {"engines.plain"}
    for path in FILES:
        if module_name(path) in engines:
            assert not taken(path) & engines, path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "dist_ema")
def test_no_foreign_library_is_imported_at_the_top(path: Path):
    own = {path.stem} if path.parent.name == "integrations" else set()
    for statement in run_at_import(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            packages = {name.split(".")[0] for _, name in imports(statement)}
            assert not packages & (FOREIGN - own), f"{path.name}:{statement.lineno}"


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
        "import sys, dist_ema; dist_ema.Warmup(0.9); assert 'torch' not in sys.modules;"
        "assert 'ShardedEMA' in dir(dist_ema);"
        "from dist_ema import *; assert set(dist_ema.__all__) <= set(globals())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_an_average_in_one_process_imports_no_more_of_torch_than_an_optimizer():
    """Sharded tensors, checkpoints and compilers take a second to import."""
    program = (
        "import sys, torch; model = torch.nn.Linear(2, 2); torch.optim.SGD(model.parameters());"
        "before = set(sys.modules); from dist_ema import ShardedEMA; ShardedEMA(model).update();"
        "heavy = ('torch.distributed.', 'torch._dynamo', 'torch._inductor');"
        "print([name for name in set(sys.modules) - before if name.startswith(heavy)])"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
