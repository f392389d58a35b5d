"""The README's figure: what an 8B Llama's layer saves for backward, counted, and what LoRA adds to its time, predicted.

``python -m benchmarks.lab.page`` draws it from ``memory`` and the cost model's stored CSV.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import BLUE, GREEN, GREY, STYLE, plt, save
from benchmarks.common.tables import RESULTS, read_csv
from benchmarks.lab.page.memory import ACCELERATED, FROZEN, FUSED, PEFT, saved_mib
from benchmarks.lab.predict.ceilings import SLOW

FIGURE = RESULTS.parents[1] / "docs" / "_static" / "headline.png"
BARS = {
    FROZEN: ("frozen", GREY),
    PEFT: ("PEFT", BLUE),
    ACCELERATED: ("+ accelerate_peft", GREEN),
    FUSED: ("  with fuse_mlp", GREEN),
}
# The predicted layer, and the rivals that have dropout.
SHAPE = {"m": "8192", "n": "4096", "k": "4096", "r": "16"}
RIVALS = {"eager (PEFT)": ("PEFT", BLUE), "LoRAFusion": ("LoRAFusion", GREY)}


def draw(results: Path, path: Path = FIGURE) -> list[Path]:
    """Draw the figure to ``path``, if the prediction is in ``results``, which is benchmarks/results."""
    file = results / "predicted-h100" / "predicted_dropout_0.1.csv"
    if not file.is_file():
        return []
    row = next(row for row in read_csv(file) if all(row[key] == value for key, value in SHAPE.items()))
    # Large type: a README shows the figure at about 830 pixels.
    with plt.rc_context(STYLE | {"axes.grid": False, "font.size": 13}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
        _memory(left)
        _time(right, row)
    return [save(figure, path)]


def _memory(axis: Any) -> None:
    for place, (arm, (_, color)) in enumerate(BARS.items()):
        value = saved_mib(arm, 0.0)
        axis.barh(place, value, color=color, height=0.66)
        axis.text(value, place, f" {value:,.0f} MiB", va="center")
    axis.set_xlim(0, 1500)
    text = "One Llama-3-8B layer, 4,096 tokens, bfloat16, r 16, no dropout"
    _finish(axis, "Saved for backward (counted)", text, [label for label, _ in BARS.values()])


def _time(axis: Any, row: dict[str, str]) -> None:
    def added(name: str, end: str = "") -> float:
        ours, frozen = (
            sum(float(row[f"{arm} {phase}{suffix}"]) for phase in ("forward", "backward"))
            for arm, suffix in ((name, end), ("frozen", ""))
        )
        return 100 * (ours / frozen - 1)

    for place, (name, (_, color)) in enumerate(RIVALS.items()):
        axis.barh(place, added(name), color=color, height=0.66)
        axis.text(added(name), place, f" +{added(name):.0f} %", va="center")
    fast, slow = added("ours"), added("ours", SLOW)
    axis.barh(len(RIVALS), fast, color=GREEN, height=0.66)
    axis.barh(len(RIVALS), slow - fast, left=fast, color=GREEN, alpha=0.35, height=0.66)
    axis.text(slow, len(RIVALS), f" +{fast:.0f} to +{slow:.0f} %", va="center")
    axis.set_xlim(0, 1.35 * added("eager (PEFT)"))
    text = "One 4096 x 4096 layer, 8,192 rows, bfloat16, r 16, dropout 0.1, H100"
    _finish(axis, "Time that LoRA adds (predicted)", text, [label for label, _ in RIVALS.values()] + ["this library"])


def _finish(axis: Any, title: str, text: str, labels: list[str]) -> None:
    axis.set_title(title, fontsize=14, fontweight="bold", loc="left")
    axis.set_xlabel(textwrap.fill(text, 42), fontsize=11, color="#555555", ha="left", x=0)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
