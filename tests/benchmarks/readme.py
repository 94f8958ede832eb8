"""The part of the README that tells of speed and scale, made of committed results."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.report import Row

BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->"
ENGINES = {
    "plain": "one process",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
FILES = ("save", "load", "gather_state_dict", "export rank0", "export direct")


def write(results: Path, readme: Path) -> None:
    """Put what the results tell between the two marks of the README."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + "\n" + told(results) + "\n" + END + after)


def told(results: Path) -> str:
    """All suites must have been run."""
    found = {}
    for suite in ("update", "peers", "ranks", "swap", "scale"):
        tables = report.read(results, suite)
        if tables is None:
            raise SystemExit(f"{results}: no {suite}.json; run bash launch/bench.sh {suite}")
        found[suite] = tables
    about = report.about(results, "update")
    backend = "NCCL" if about["device"] == "cuda" else "gloo"
    parts = [
        _text(
            f"On {about['cpu']}, {about['cores']} cores, torch {about['torch']}, {backend}. Ratios "
            "within one run, medians of interleaved rounds; all rows are in "
            f"`{results.relative_to(report.ROOT)}/`."
        ),
        _text(
            "An update over `torch._foreach_lerp_` of fp32 tensors as many and as long (bf16: of "
            "as many bytes), all ranks at once; *compiled* is what `torch.compile` makes of an "
            "update from bf16, in one pass, over the same; *two averages* over one. Hot, "
            "call after call, then, behind the comma, after other work and a pause, as in a "
            "training step:"
        ),
        _update(found["update"]["update"]),
        "Time of an update of others over ours, in one process, and on FSDP2 with two ranks:",
        _peers(found["peers"]),
        "Bytes and time of an update on four ranks over those on one:",
        _group(found["ranks"]["ranks"]),
        "![Time of an update of each library](examples/bench-peers.png)",
        "![Bytes and time of an update on 1, 2 and 4 ranks](examples/bench-ranks.png)",
        _text(
            "Into the average and out of it, 1 GB of fp32 weights (resident memory beyond what was "
            "held; the first time also what libraries set up once):"
        ),
        _swap(found["swap"]["swap"]),
        "Files, over a plain write and sync of the same bytes by one process (268 MB):",
        _files(found["swap"]["files"]),
        _text(
            "A model of 70.6 billion parameters on 1,024 ranks, simulated on one core, one rank at "
            "a time (seconds of `ShardedEMA(model)`; a rank asked by all has most to answer):"
        ),
        _scale(found["scale"]["construction"]),
    ]
    return "\n\n".join(parts) + "\n"


def _text(words: str) -> str:
    return textwrap.fill(words, 100, break_on_hyphens=False)


def _update(rows: Sequence[Row]) -> str:
    lines = []
    for kind in _kinds(rows, "weights"):
        by = {row["engine"]: row for row in rows if row["weights"] == kind}
        over = [_hot_and_cold(by.get(engine, {}), "update/floor") for engine in ENGINES]
        compiled = _hot_and_cold(by["plain"], "compiled")
        lines.append([kind, *over, compiled, by["plain"]["two"]])
    columns = [*ENGINES.values(), "compiled, one process", "two averages, one process"]
    return _table(["weights of this rank", *columns], lines)


def _peers(tables: dict[str, list[Row]]) -> str:
    alone = tables["plain"]
    fsdp2 = [row for row in tables["engines"] if row["engine"] == "fsdp2"]
    columns = [(alone, kind, kind) for kind in _kinds(alone, "weights")]
    columns += [(fsdp2, kind, f"FSDP2, {kind}") for kind in _kinds(fsdp2, "weights")]
    lines = []
    for way in _kinds([*alone, *fsdp2], "way"):
        if way != "dist_ema":
            cells = [_beside(rows, way, kind) for rows, kind, _ in columns]
            lines.append([way, *cells])
    return _table(["", *(name for _, _, name in columns)], lines)


def _beside(rows: Iterable[Row], way: str, kind: str) -> Any:
    row = next((row for row in rows if row["way"] == way and row["weights"] == kind), {})
    if row.get("fails with"):
        return textwrap.shorten("fails: " + row["fails with"], 60, placeholder=" ...")
    return _hot_and_cold(row, "over dist_ema")


def _hot_and_cold(row: Row, column: str) -> Any:
    """Both figures; the hot one alone where the results have no other."""
    both = (row.get(column), row.get(f"{column} cold"))
    return ", ".join(_shown(figure) for figure in both if figure is not None)


def _group(rows: Sequence[Row]) -> str:
    four = [row for row in rows if row["ranks"] == 4]
    return _table(
        ["", *(row["engine"] for row in four)],
        [[what, *(row[what] for row in four)] for what in ("bytes", "time")],
    )


def _swap(rows: Sequence[Row]) -> str:
    columns = ["engine", "ranks", "in/copy", "out/copy", "extra MB", "extra MB, first"]
    fp32 = [row for row in rows if "bf16" not in row["weights"]]
    return _table(columns, [[row[c] for c in columns] for row in fp32])


def _files(rows: Sequence[Row]) -> str:
    lines = []
    for engine in _kinds(rows, "engine"):
        by = {row["what"]: row for row in rows if row["engine"] == engine}
        lines.append([engine, by["save"]["ranks"], *(by[what].get("over write") for what in FILES)])
    return _table(["engine", "ranks", *FILES], lines)


def _scale(rows: Sequence[Row]) -> str:
    columns = ["mesh", "rank", "seconds", "plan MB", "average MB", "sent MB", "received MB"]
    return _table(columns, [[row[c] for c in columns] for row in rows])


def _kinds(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _table(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    return report.grid(columns, (map(_shown, line) for line in lines))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return "" if value is None else str(value)
