"""Results as JSON and as Markdown, with the machine and the versions that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "deepspeed", "diffusers", "ema-pytorch", "torch-ema", "safetensors", "numpy",
)  # fmt: skip

Row = Mapping[str, Any]


@dataclass
class Table:
    """Rows with the same columns, and what their figures are."""

    name: str
    title: str
    note: str
    rows: list[Row] = field(default_factory=list)

    def markdown(self) -> str:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [[_shown(row.get(c, "")) for c in columns] for row in self.rows]
        return f"## {self.title}\n\n{self.note}\n\n{grid(columns, cells)}\n"


def grid(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines)


def environment(device: str) -> dict[str, Any]:
    """The machine, what else it does, and what ran."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "device": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def directory_for(device: str) -> Path:
    """Where results of this kind of machine lie."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return RESULTS / name.lower().replace(" ", "-")


def write(
    directory: Path, suite: str, tables: Sequence[Table], about: Mapping[str, Any], command: str
) -> None:
    """SUITE.json and SUITE.md."""
    directory.mkdir(parents=True, exist_ok=True)
    told = {
        "suite": suite,
        "command": command,
        "environment": about,
        "tables": [
            {"name": t.name, "title": t.title, "note": t.note, "rows": t.rows} for t in tables
        ],
    }
    (directory / f"{suite}.json").write_text(json.dumps(told, indent=1) + "\n")
    lines = [f"# {suite}", "", f"`{command}`", ""]
    lines.append("; ".join(f"{key}: {_shown(value)}" for key, value in about.items()))
    text = "\n".join(lines) + "\n\n" + "\n".join(t.markdown() for t in tables)
    (directory / f"{suite}.md").write_text(text)
    sys.stdout.write(text)
    sys.stdout.flush()


def read(directory: Path, suite: str) -> dict[str, list[Row]] | None:
    """The rows of each table of a suite that was run, by the table's name."""
    told = _told(directory, suite)
    return None if told is None else {table["name"]: table["rows"] for table in told["tables"]}


def about(directory: Path, suite: str) -> dict[str, Any] | None:
    """The machine and the versions of a suite that was run."""
    told = _told(directory, suite)
    return None if told is None else told["environment"]


def _told(directory: Path, suite: str) -> dict[str, Any] | None:
    path = directory / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
