"""The page's plots: times against a size on logarithmic axes, with the floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import BLUE, GREY, RATIO_SHADES, STYLE, plt, save
from benchmarks.lab.page.page import PAGE, plot_of

LAYER_LINES = {"frozen": ("frozen nn.Linear", GREY), "peft": ("PEFT", BLUE), "ours": ("ours", RATIO_SHADES[2])}
STEP_LINES = {
    "AdamW fused": ("AdamW fused", BLUE),
    "shrinking": ("ours, shrinking", RATIO_SHADES[2]),
    "latched": ("ours, latched", RATIO_SHADES[1]),
}


def draw(results: Path) -> list[Path]:
    """The plots of every stored scaling.json."""
    paths = []
    for file in sorted(results.glob("*/scaling.json")):
        for name, axis in json.loads(file.read_text(encoding="utf-8"))["axes"].items():
            path = PAGE.parent / plot_of(file.parent, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            paths.append(save(_axis(axis), path))
    return paths


def _axis(axis: dict[str, Any]) -> Any:
    sizes = [row["size"] for row in axis["rows"]]
    step = axis["axis"] == "pairs"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for arm, (label, color) in (STEP_LINES if step else LAYER_LINES).items():
            medians = [row[arm]["ms"]["median"] for row in axis["rows"]]
            axes.plot(sizes, medians, marker="o", markersize=4, label=label, color=color)
        floor = [sum(row["floor"].values()) for row in axis["rows"]]
        axes.plot(sizes, floor, linestyle=":", color="#333333", label="floor" if step else "floor of a LoRA layer")
        axes.set(xscale="log", yscale="log", xlabel=f"{axis['axis']} ({axis['still']})", ylabel="milliseconds")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.legend()
    return figure
