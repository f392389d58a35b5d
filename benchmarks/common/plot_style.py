"""The look of every plot: colors, style, panels, saving. Plots are drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

GREY, BLUE, GREEN, RED = "#8a8f98", "#2a6fbb", "#3d8f5f", "#d1495b"
# One color for each of the cost model's rivals, and ours.
RIVALS = {"eager (PEFT)": BLUE, "Unsloth": "#5b9aa0", "Axolotl": "#8d7fb8", "LoRAFusion": GREY, "ours": RED}
# The paper's shrink ratios, from the smallest to the largest.
RATIO_SHADES = ("#f0a202", "#e07a3f", RED, "#7a1f3d")
# Our arms of a fine-tuning run, as many as the full preset has: warm colors, so that they read as one family beside the rivals.
_STABLE = (RED, "#e07a3f", "#b5338a", "#7a1f3d", "#f0a202", "#9c6b3f")
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


def colors(names: list[str]) -> dict[str, str]:
    stable = iter(_STABLE * len(names))
    return {name: {"frozen": GREY, "peft": BLUE}.get(name) or next(stable) for name in names}


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path


def panels(rows: dict[str, dict[str, Any]], title: str, path: Path, **look: Any) -> None:
    """Lines against the learning rate: a row of panels for each label of the y axis, in it a panel for each title, and in that a
    line for each column of a DataFrame, whose index is the rate."""
    width, height = max(map(len, rows.values())), len(rows)
    with plt.rc_context(STYLE):
        size = (2.6 * max(width, 3) + 1.6, 3.2 * height + 0.5)
        figure, axes = plt.subplots(height, width, figsize=size, layout="constrained", squeeze=False, sharey="row")
        for line, (label, frames) in zip(axes, rows.items(), strict=True):
            for axis, (name, frame) in zip(line, frames.items(), strict=True):
                axis.set(title=name, xscale="log")
                frame.plot(
                    ax=axis, style="o-", markersize=3, legend=False, xlabel="learning rate", ylabel=label, **look
                )
        figure.suptitle(title, fontweight="bold")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        save(figure, path)
