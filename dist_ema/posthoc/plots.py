"""Plots of `dist-ema synthesize` and `dist-ema merge`. matplotlib is an optional dependency."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_ema.schedule import PowerFunction

_GREY = "#666666"  # of text and axes
_MAX_LABELS = 10  # of checkpoints
_MAX_LEGEND = 8  # lines that a legend lists; more have a color scale


class Plot:
    """An image file with one plot."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: matplotlib is not installed, or writes no file of this name.
        """
        try:
            self._figure: Any = importlib.import_module("matplotlib.figure").Figure(
                figsize=(7, 4), dpi=150, layout="constrained", facecolor="white"
            )
        except ImportError:
            raise ValueError(
                "--plot needs matplotlib, which is not installed; install it with: "
                "pip install matplotlib"
            ) from None
        kinds = self._figure.canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".").lower() not in kinds or not path.parent.is_dir():
            raise ValueError(
                f"--plot is {path}, wanted a file in an existing directory, ending in .png, .svg "
                "or .pdf"
            )
        self._path, self._axes = path, self._figure.add_subplot()

    def weights(self, weights: Mapping[str, float]) -> None:
        """Plot the weight of each checkpoint, oldest first."""
        names, n = [Path(path).name for path in weights], len(weights)
        every = -(-n // _MAX_LABELS)
        at = range(0, n, every)
        self._axes.bar(range(n), list(weights.values()), color="#4477aa")
        self._axes.axhline(0, color=_GREY, linewidth=0.8)
        is_long = sum(len(names[i]) for i in at) > 60
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
        self._axes.set_xticks(at, [_short(names[i]) for i in at], **turned)
        self._save("checkpoint, oldest first", "weight in the average")

    def profiles(self, profiles: Sequence[tuple[PowerFunction, float]]) -> None:
        """Plot what each update weighs in averages of some widths, and the residual of each fit.

        The profile is (gamma + 1) * t ** gamma, of t in [0, 1] (arXiv 2312.02696, eq. 2).
        """
        t = np.linspace(0, 1, 2001)[1:]
        ordered = sorted(profiles, key=lambda each: each[0].sigma_rel)
        cm = importlib.import_module("matplotlib.cm")
        colors = importlib.import_module("matplotlib.colors")
        scale = cm.ScalarMappable(
            colors.Normalize(ordered[0][0].sigma_rel, ordered[-1][0].sigma_rel), "viridis"
        )
        for schedule, residual in ordered:
            density = (schedule.gamma + 1) * t**schedule.gamma
            label = f"{schedule.sigma_rel:.4g} (residual {residual:.1%})"
            color = scale.to_rgba(schedule.sigma_rel)
            self._axes.plot(t, density, label=label, color=color)
        if len(ordered) <= _MAX_LEGEND:
            self._axes.legend(title="sigma_rel", frameon=False, labelcolor=_GREY, loc="upper left")
        else:
            bar = self._figure.colorbar(scale, ax=self._axes)
            bar.set_label("sigma_rel", color=_GREY)
            bar.ax.tick_params(colors=_GREY)
        self._axes.set_xlim(0, 1)
        self._axes.set_ylim(bottom=0)
        self._save("share of the run", "weight of an update, relative to the mean")

    def _save(self, x: str, y: str) -> None:
        self._axes.set_xlabel(x, color=_GREY)
        self._axes.set_ylabel(y, color=_GREY)
        self._axes.tick_params(colors=_GREY)
        for side, spine in self._axes.spines.items():
            spine.set(color=_GREY, visible=side in ("left", "bottom"))
        self._figure.savefig(self._path, transparent=False)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:10]}...{name[-11:]}"
