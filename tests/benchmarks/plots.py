"""Plots of committed results, for the README. Needs matplotlib, which is an optional dependency."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.report import Row


def draw(results: Path, directory: Path) -> list[Path]:
    """The plots for which there are results; none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.stderr.write("no plots: matplotlib is not installed\n")
        return []
    peers, ranks = report.read(results, "peers"), report.read(results, "ranks")
    drawn = []
    if peers is not None:
        drawn.append(_peers(peers["plain"], directory / "bench-peers.png"))
    if ranks is not None:
        drawn.append(_group(ranks["ranks"], directory / "bench-ranks.png"))
    return drawn


def _peers(rows: Sequence[Row], path: Path) -> Path:
    """Bars: an update of each library over the floor, a panel for each kind of weights."""
    from examples.plotting import OTHER, OWN, new_figure, save

    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    is_own = [way == "dist_ema" for way in ways]
    figure, panels = new_figure(8, 4.2, columns=len(kinds), sharey=True, squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        ratios = {row["way"]: row["over floor"] for row in rows if row["weights"] == kind}
        bars = panel.barh(
            ways,
            [ratios[way] for way in ways],
            color=[OWN if own else OTHER for own in is_own],
            hatch=["///" if own else "" for own in is_own],
            edgecolor=["white" if own else OTHER for own in is_own],
        )
        panel.bar_label(bars, fmt="%.2f", padding=4)
        panel.axvline(1, color="black", linestyle="--", linewidth=1)
        panel.margins(x=0.3)
        panel.set(title=kind, xticks=[])
        panel.grid(False)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("time of an update; 1 (dashed): torch._foreach_lerp_")
    return save(figure, path)


def _group(rows: Sequence[Row], path: Path) -> Path:
    """Marks, engines side by side: bytes and time of an update on more ranks; lines: 1/ranks."""
    from examples.plotting import new_figure, save

    rows = [row for row in rows if "bytes" in row]
    counts = sorted({row["ranks"] for row in rows})
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    figure, panels = new_figure(8, 4.2, columns=2, sharey=True)
    titles = {"bytes": "bytes a rank", "time": "time of an update"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for i, engine in enumerate(engines):
            of_engine = {row["ranks"]: row[column] for row in rows if row["engine"] == engine}
            at = [counts.index(n) + 0.14 * (i - (len(engines) - 1) / 2) for n in of_engine]
            panel.plot(at, list(of_engine.values()), linestyle="", markersize=7, label=engine)
        for x, n in enumerate(counts):
            panel.hlines(1 / n, x - 0.48, x + 0.48, "black", label="1/ranks" if x == 0 else None)
        panel.set(title=title, xlabel="ranks", xticks=range(len(counts)), xticklabels=counts)
        panel.grid(False, axis="x")
        panel.set_ylim(0, 1.2)
    panels[0].set_ylabel("over the whole model's")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=7, frameon=False)
    return save(figure, path)
