"""Whether updates became slower than those of another commit, or of committed results."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.report import Row

SLOWER = 1.15
COLUMNS = ("update/floor", "update/floor cold", "two")
ROUNDS = 3  # processes of each commit, in turn

Found = dict[tuple[str, str, str], list[float]]


def compare(against: str, arguments: list[str]) -> list[str]:
    """A line for each figure of the suite `update` that is more than 15 % above another's.

    Args:
        against: a commit, whose library is run with these benchmarks, alternating with this one on
            this machine; or an `update.json`, whose figures are from another time.
        arguments: of both, `--check` for example.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        older, out = Path(folder, "older"), Path(folder, "out")
        if Path(against).is_file():
            before = figures(report.read(Path(against).parent, Path(against).stem)["update"])
            return slower(before, measured([report.ROOT], out, arguments)[0])
        tree = ["git", "-C", str(report.ROOT), "worktree"]
        subprocess.run([*tree, "add", "--quiet", "--detach", str(older), against], check=True)
        try:
            shutil.rmtree(older / "tests")
            shutil.copytree(report.ROOT / "tests", older / "tests")
            return slower(*measured([older, report.ROOT], out, arguments))
        finally:
            subprocess.run([*tree, "remove", "--force", str(older)], check=True)


def measured(checkouts: list[Path], out: Path, arguments: list[str]) -> list[Found]:
    """All figures of each checkout, from processes that take turns."""
    every: list[Found] = [{} for _ in checkouts]
    command = [sys.executable, "-m", "tests.benchmarks", "update", "--out", str(out), *arguments]
    for _ in range(ROUNDS):
        for checkout, found in zip(checkouts, every, strict=True):
            environment = os.environ | {"PYTHONPATH": str(checkout)}
            subprocess.run(
                command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL
            )
            for key, values in figures(report.read(out, "update")["update"]).items():
                found.setdefault(key, []).extend(values)
    return every


def figures(rows: Iterable[Row]) -> Found:
    return {(r["engine"], r["weights"], c): [r[c]] for r in rows for c in COLUMNS if c in r}


def slower(
    before: Mapping[tuple[str, str, str], list[float]],
    after: Mapping[tuple[str, str, str], list[float]],
) -> list[str]:
    """Print the medians of all figures, and return the lines of those that grew by over 15 %."""
    lines = []
    for key in sorted(before.keys() & after.keys()):
        old, new = statistics.median(before[key]), statistics.median(after[key])
        line = f"{', '.join(key)}: {old:.2f} -> {new:.2f}"
        print(line)
        if new > SLOWER * old:
            lines.append(line)
    return lines
