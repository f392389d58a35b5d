"""Lines against the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.plot_style import STYLE, plt, save


def panels(rows: dict[str, dict[str, pd.DataFrame]], title: str, path: Path, **look: Any) -> None:
    """A row of panels for each label of the y axis, a panel for each title, and in it a line for each column of its frame."""
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
