"""One style for all plots here: large type for small screens, and lines that differ in more than
colour, on a solid light background."""

from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

OWN, OTHER = "#0b5394", "#c9c9c9"  # this project's bar, and the bars of others
LINES = (
    cycler(color=[OWN, "#d55e00", "#009e73", "#8c4a9e", "#8a6d00", "#444444"])
    + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3))])
    + cycler(marker=["o", "s", "^", "D", "v", "x"])
)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes: one, or an array of them."""
    matplotlib.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": LINES,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 12,
            "grid.color": "#dddddd",
            "legend.framealpha": 0.9,
            "legend.columnspacing": 1.2,
            "legend.handlelength": 2.6,
            "legend.handletextpad": 0.4,
            "lines.markersize": 5,
        }
    )
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    return path
