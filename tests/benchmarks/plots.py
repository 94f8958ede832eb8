"""Plots of committed results, for the README. Needs matplotlib, which is an optional dependency."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.report import Row

OWN, OTHER = "#1b6ca8", "#b8b8b8"


def draw(results: Path, directory: Path) -> list[Path]:
    """The plots for which there are results; none without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        sys.stderr.write("no plots: matplotlib is not installed\n")
        return []
    peers, ranks = report.read(results, "peers"), report.read(results, "ranks")
    drawn = []
    directory.mkdir(parents=True, exist_ok=True)
    if peers is not None:
        drawn.append(_peers(peers["plain"], directory / "bench-peers.png"))
    if ranks is not None:
        drawn.append(_group(ranks["ranks"], directory / "bench-ranks.png"))
    return drawn


def _peers(rows: Sequence[Row], path: Path) -> Path:
    """Bars: an update of each library over the floor, a panel for each kind of weights."""
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure, panels = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3), sharey=True)
    for panel, kind in zip(_listed(panels), kinds, strict=True):
        found = {row["way"]: row["over floor"] for row in rows if row["weights"] == kind}
        bars = panel.barh(
            ways,
            [found[way] for way in ways],
            color=[OWN if w == "dist_ema" else OTHER for w in ways],
        )
        panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.margins(x=0.25)
        panel.set_title(f"{kind} tensors", fontsize=9)
        panel.invert_yaxis()
    figure.supxlabel("time of an update over torch._foreach_lerp_ on the same tensors", fontsize=9)
    return _saved(figure, path)


def _group(rows: Sequence[Row], path: Path) -> Path:
    """Lines: bytes of the average and time of an update on more ranks, and 1/ranks."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "bytes" in row]
    counts = sorted({row["ranks"] for row in rows})
    figure, panels = plt.subplots(1, 2, figsize=(8, 3))
    titles = {
        "bytes": "bytes a rank, over one fp32 copy",
        "time": "time of an update, over all of it",
    }
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            of_engine = {row["ranks"]: row[column] for row in rows if row["engine"] == engine}
            at = sorted(of_engine)
            panel.plot(at, [of_engine[n] for n in at], marker="o", markersize=4, label=engine)
        panel.plot(counts, [1 / n for n in counts], "k:", linewidth=1, label="1/ranks")
        panel.set_xticks(counts)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("ranks")
        panel.set_title(title, fontsize=9)
    panels[-1].legend(fontsize=8)
    return _saved(figure, path)


def _listed(panels: Any) -> list[Any]:
    return list(panels) if hasattr(panels, "__len__") else [panels]


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return path
