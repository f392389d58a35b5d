"""The page's plots: times against a size, one plot for each axis of a suite's file."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import STYLE, plt, save
from benchmarks.lab.page.page import PAGE, plot_of


def draw(results: Path) -> list[Path]:
    paths = []
    for file in sorted(results.glob("*/suite*.json")):
        axes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
            if axis := entry["extra_info"].get("axis"):
                axes[axis["name"]].append(entry["extra_info"])
        for name, reports in axes.items():
            path = PAGE.parent / plot_of(file, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            paths.append(save(_axis(name, reports), path))
    return paths


def _axis(name: str, reports: list[dict[str, Any]]) -> Any:
    """Median times and the floor, on logarithmic axes."""
    sizes = [report["axis"]["size"] for report in reports]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for arm in reports[0]["arms"]:
            medians = [report["arms"][arm]["ms"]["median"] for report in reports]
            axes.plot(sizes, medians, marker="o", markersize=4, label=arm)
        axes.plot(sizes, [sum(report["floor_ms"].values()) for report in reports], "k:", label="floor")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="milliseconds")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.legend()
    return figure
