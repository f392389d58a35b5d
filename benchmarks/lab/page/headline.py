"""The README's figure: what an 8B Llama's layer saves for backward, counted, and what LoRA adds to
its time, predicted.

``python -m benchmarks.lab.page`` draws it from ``benchmarks.lab.memory`` and the predictions'
stored CSV.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.plot_style import BLUE, GREEN, GREY, STYLE, plt, save
from benchmarks.common.tables import RESULTS
from benchmarks.lab.memory import ACCELERATED, FROZEN, FUSED, PEFT, saved_mib
from benchmarks.lab.predict.ceilings import Range

FIGURE = RESULTS.parents[1] / "docs" / "_static" / "headline.png"
MEMORY = {
    FROZEN: "frozen",
    PEFT: "PEFT",
    ACCELERATED: "+ accelerate_peft",
    FUSED: "  with fuse_mlp",
}
# The predicted layer, and the rivals that have dropout.
SHAPE = "m == 8192 and n == 4096 and k == 4096 and r == 16"
TIME = {"eager (PEFT)": "PEFT", "LoRAFusion": "LoRAFusion", "ours": "this library"}


def draw(results: Path, path: Path = FIGURE) -> list[Path]:
    """Draw the figure to ``path``, if the prediction is in ``results``, which is
    benchmarks/results.
    """
    file = results / "predicted-h100" / "predicted_dropout_0.1.csv"
    if not file.is_file():
        return []
    row = pd.read_csv(file).query(SHAPE).iloc[0]
    # What each arm adds to the frozen layer's time, in percent.
    added = [Range(*(100 * row[f"{arm} {end}"] - 100 for end in Range._fields)) for arm in TIME]
    saved = [saved_mib(arm, 0.0) for arm in MEMORY]
    # Large type: a README shows the figure at about 830 pixels.
    with plt.rc_context(STYLE | {"axes.grid": False, "font.size": 13}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
        left.barh(range(4), saved, color=(GREY, BLUE, GREEN, GREEN), height=0.66)
        for place, (known, color) in enumerate(zip(added, (BLUE, GREY, GREEN), strict=True)):
            right.barh(place, known.low, color=color, height=0.66)
            width = known.high - known.low
            right.barh(place, width, left=known.low, color=color, alpha=0.35, height=0.66)
            right.plot([known.middle] * 2, [place - 0.33, place + 0.33], color="black", linewidth=2)
        text = "One Llama-3-8B layer, 4,096 tokens, bfloat16, r 16, no dropout"
        words = {
            label: (value, f" {value:,.0f} MiB")
            for label, value in zip(MEMORY.values(), saved, strict=True)
        }
        _finish(left, "Saved for backward (counted)", text, words, 1500)
        text = (
            "One 4096 x 4096 layer, 8,192 rows, bfloat16, r 16, dropout 0.1, H100. "
            "Pale: a model's range; line: its middle"
        )
        words = {
            label: (known.high, f" {known.middle:.0f} % ({known.low:.0f} to {known.high:.0f})")
            for label, known in zip(TIME.values(), added, strict=True)
        }
        _finish(right, "Time LoRA may add (predicted)", text, words, 1.6 * added[0].high)
    return [save(figure, path)]


def _finish(
    axis: Any, title: str, text: str, words: dict[str, tuple[float, str]], limit: float
) -> None:
    """``words``: by label, what stands behind a bar, and where."""
    for place, (value, word) in enumerate(words.values()):
        axis.text(value, place, word, va="center")
    axis.set_title(title, fontsize=14, fontweight="bold", loc="left")
    axis.set_xlabel(textwrap.fill(text, 42), fontsize=11, color="#555555", ha="left", x=0)
    axis.set(
        xlim=(0, limit),
        ylim=(len(words) - 0.4, -0.6),
        xticks=[],
        yticks=range(len(words)),
        yticklabels=words,
    )
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
