"""The README's figure, in four panels: what an 8B Llama's layer and a layer's experts keep for
backward (counted), the bytes that LoRA moves through memory (counted), and the time of a step that
trains eight adapters (measured).

``python -m benchmarks.lab.page`` draws it from ``benchmarks.lab.memory``,
``benchmarks.lab.mixtures``, ``benchmarks.lab.arithmetic`` and the results stored in
benchmarks/results.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from benchmarks.common.arms import OURS, PLAIN
from benchmarks.common.plot_style import BLUE, GREEN, GREY, ORANGE, STYLE, plt, save
from benchmarks.common.records import read_records
from benchmarks.common.tables import RESULTS
from benchmarks.lab import arithmetic, mixtures
from benchmarks.lab.memory import ACCELERATED, FROZEN, FUSED, PEFT, saved_mib

FIGURE = RESULTS.parents[1] / "docs" / "_static" / "headline.png"
ADAPTERS = Path("xeon-avx512bf16-2core") / "adapters_of_rows.csv"

MEMORY = {
    FROZEN: "frozen",
    PEFT: "PEFT",
    ACCELERATED: "accelerate_peft",
    FUSED: "and fuse_mlp",
}
BF16_ADAPTERS = "PEFT, bf16 adapters"
MEMORY_TOKENS = 4096
MOVED = {PEFT: "PEFT", PLAIN: PLAIN, OURS: "this library"}
TOKENS = (16, 64, 256)

# Every other label's bar is this library's, and green.
COLORS = {"frozen": GREY, "PEFT": BLUE, BF16_ADAPTERS: BLUE, PLAIN: ORANGE}
BAR = 0.62


class Bar(NamedTuple):
    label: str
    color: str
    value: float
    # What stands behind the bar.
    text: str


def draw(results: Path, path: Path = FIGURE) -> list[Path]:
    """Draw the figure to ``path``, if what it shows is in ``results``, which is
    benchmarks/results.
    """
    if not (results / ADAPTERS).is_file():
        return []
    # Large type: a README shows the figure at about 830 pixels.
    with plt.rc_context(STYLE | {"axes.grid": False, "font.size": 13}):
        figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
        figure.get_layout_engine().set(hspace=0.08, wspace=0.04)
        caption = "One {} for backward: 4,096 tokens, bfloat16, r 16, without dropout"
        layer = caption.format("Llama-3-8B layer keeps")
        experts = caption.format("Qwen3-30B-A3B layer's experts keep")
        _draw_counted(axes[0, 0], "Memory of a layer (counted)", layer, layer_mib(), "MiB")
        _draw_counted(axes[0, 1], "Memory of experts (counted)", experts, experts_mib(), "MiB")
        moved = (
            "Beyond the frozen 4096 x 4096 layer, forward and backward: 8,192 tokens, "
            "bfloat16, r 16, without dropout"
        )
        _draw_counted(axes[1, 0], "Bytes LoRA moves (counted)", moved, moved_mb(), "MB")
        _draw_adapters(axes[1, 1], results / ADAPTERS)
    return [save(figure, path)]


def layer_mib() -> dict[str, float]:
    """MiB that a decoder layer of Llama 3 8B keeps for backward, by the names of MEMORY, and by the
    best that PEFT and plain PyTorch do.
    """
    ours = {
        label: saved_mib(arm, dropout=0.0, tokens=MEMORY_TOKENS) for arm, label in MEMORY.items()
    }
    others = {
        BF16_ADAPTERS: saved_mib(PEFT, dropout=0.0, float32=False, tokens=MEMORY_TOKENS),
        PLAIN: saved_mib(PLAIN, dropout=0.0, tokens=MEMORY_TOKENS),
    }
    bars = ours | others
    return {label: bars[label] for label in ("frozen", "PEFT", *others, *[*ours][2:])}


def experts_mib() -> dict[str, float]:
    """MiB that the experts of a layer of Qwen3 30B-A3B keep, by the names of MEMORY."""
    mixture = mixtures.MIXTURES["Qwen3 30B-A3B"]
    return {
        label: mixtures.experts_mib(mixture, arm, MEMORY_TOKENS) for arm, label in MEMORY.items()
    }


def moved_mb() -> dict[str, float]:
    """MB that LoRA reads and writes in forward and backward of a 4096 x 4096 layer, beyond what the
    frozen layer does, by the names of MOVED.
    """
    layer = arithmetic.LAYERS[0]
    frozen = sum(arithmetic.moved(FROZEN, layer, dropout=False))
    return {
        label: (sum(arithmetic.moved(arm, layer, dropout=False)) - frozen) / 1e6
        for arm, label in MOVED.items()
    }


def adapters_ratios(file: Path) -> dict[int, float]:
    """The time of one step of eight adapters over PEFT's eight steps, by tokens an adapter."""
    rows = read_records(file)
    rows = rows[(rows["arm"] == "adapters_of_rows") & (rows["metric"] == "over_rival")]
    ratios = rows.set_index("case")["median"]
    return {tokens: ratios[f"8 adapters x {tokens} tokens, bf16"] for tokens in TOKENS}


def _draw_counted(
    axis: Axes, title: str, caption: str, counts: dict[str, float], unit: str
) -> None:
    bars = [
        Bar(label, COLORS.get(label, GREEN), count, f" {count:,.0f} {unit}")
        for label, count in counts.items()
    ]
    _draw_bars(axis, bars)
    _finish(axis, title, caption, bars, limit=1.35 * max(counts.values()))


def _draw_adapters(axis: Axes, file: Path) -> None:
    ratios = adapters_ratios(file)
    bars = [Bar("PEFT, one by one", BLUE, 1.0, " 1")]
    bars += [
        Bar(f"{tokens} tokens each", GREEN, ratio, f" {ratio:.2f}")
        for tokens, ratio in ratios.items()
    ]
    _draw_bars(axis, bars)
    _finish(
        axis,
        "8 adapters, one step (measured)",
        "Time of training all eight, PEFT's time = 1. Llama of width 576, bfloat16, r 16, on a CPU",
        bars,
        limit=1.35,
    )


def _draw_bars(axis: Axes, bars: list[Bar]) -> None:
    for place, bar in enumerate(bars):
        axis.barh(place, bar.value, color=bar.color, height=BAR)


def _finish(axis: Axes, title: str, caption: str, bars: list[Bar], limit: float) -> None:
    """Label the bars, or what stands in their places, and take away what nobody reads."""
    for place, bar in enumerate(bars):
        axis.text(bar.value, place, bar.text, va="center")
    axis.set_title(title, fontsize=14, fontweight="bold", loc="left")
    axis.set_xlabel(textwrap.fill(caption, 44), fontsize=11, color="#555555", ha="left", x=0)
    axis.set(
        xlim=(0, limit),
        ylim=(len(bars) - 0.4, -0.6),
        xticks=[],
        yticks=range(len(bars)),
        yticklabels=[bar.label for bar in bars],
    )
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
