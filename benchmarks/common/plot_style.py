"""The look of every plot: colors, style, saving. Plots are drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

GREY, BLUE, GREEN, RED, ORANGE = "#8a8f98", "#2a6fbb", "#3d8f5f", "#d1495b", "#e07a3f"
STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
