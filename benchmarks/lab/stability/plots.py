"""Plots of ``benchmarks.lab.stability``'s runs; each stands alone."""

from __future__ import annotations

import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import BLUE, GREEN, GREY, RATIO_SHADES, STYLE, plt, save
from benchmarks.lab.stability.report import (
    FIRST,
    LATER,
    TASKS,
    Found,
    Records,
    best_lrs,
    gamma,
    laws_of,
    present,
    regime_rows,
    steps_of,
)
from benchmarks.lab.stability.training import ADAMW, ARMS, LORA_PLUS, NEAR_ZERO, STABLE

COLORS = dict(zip((arm.name for arm in ARMS), (BLUE, GREY, GREEN, *RATIO_SHADES), strict=True))
# Stable-LoRA's largest ratio has the largest effect.
SHOWN = (ADAMW, NEAR_ZERO, LORA_PLUS, STABLE[-1])
PARTS = {"delta_1": "δ1 = s dB A Z", "delta_2": "δ2 = s B dA Z", "delta_3": "δ3 = s dB dA Z", "delta": "whole change"}


def draw(found: Found, out: Path) -> list[Path]:
    plots = {
        "latch": _latch(found),
        "exponents": _exponents(found["deltas"]),
        "sizes": _sizes(found["deltas"]),
        "norms": _norms(found["deltas"]),
        "learning_rates": _learning_rates(found),
    }
    task = TASKS[found["family"]][0]
    for figure in plots.values():
        note = textwrap.fill(f"{task}, r 8. {figure.get_supxlabel()}", int(13 * figure.get_figwidth()))
        figure.supxlabel(note, fontsize=9, color="#666666")
    return [save(figure, out / f"{name}.png") for name, figure in plots.items()]


def _legend(figure: Any, axis: Any) -> None:
    """One legend for all panels, beside them, in a size that a page can show."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=10, frameon=False)


def _figure(rows: int, columns: int, title: str, note: str, height: float = 3.2, share_y: bool = True) -> Any:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.1 * columns + 2.4, height * rows + 0.9), layout="constrained", squeeze=False,
            sharey=share_y,
        )  # fmt: skip
    figure.suptitle(textwrap.fill(title, int(8 * figure.get_figwidth())), fontsize=12, fontweight="bold")
    figure.supxlabel(note)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shades(count: int) -> list[Any]:
    return [plt.get_cmap("viridis")(0.9 * i / max(1, count - 1)) for i in range(count)]


def _latch(found: Found) -> Any:
    """Latch step and what is left of A against the learning rate, a line a width, a column a ratio."""
    rows, steps = regime_rows(found["runs"], found["steps"]), found["steps"]
    ratios = sorted({row["ratio"] for row in rows})
    widths = sorted({row["width"] for row in rows})
    figure, axes = _figure(
        2, len(ratios), "When shrinking stops, and what it has done by then",
        f"Medians over seeds; dots at {steps} steps had not latched. Dotted: the least steps that B needs, 1 / (lr sqrt(3n)).",
        2.8, share_y=False,
    )  # fmt: skip
    for column, ratio in enumerate(ratios):
        top, bottom = axes[0][column], axes[1][column]
        for width, color in zip(widths, _shades(len(widths)), strict=True):
            mine = [row for row in rows if row["ratio"] == ratio and row["width"] == width]
            lrs = [row["lr"] for row in mine]
            top.plot(
                lrs, [max(row["shrinks"], 0.5) for row in mine], "o-", markersize=3, color=color, label=f"n {width}"
            )
            top.plot(lrs, [min(row["bound"], steps) for row in mine], ":", color=color, linewidth=0.9)
            bottom.plot(lrs, [100 * row["a_left"] for row in mine], "o-", markersize=3, color=color)
        top.set(xscale="log", yscale="log", title=f"λ {ratio:g}")
        bottom.set(xscale="log", xlabel="learning rate", ylim=(0, 103))
        if column:
            top.tick_params(labelleft=False)
            bottom.tick_params(labelleft=False)
    axes[0][0].set_ylabel("shrinking steps")
    axes[1][0].set_ylabel("||A|| left by shrinking, %")
    _legend(figure, axes[0][-1])
    return figure


def _exponents(deltas: Records) -> Any:
    """Exponents over training, a column a law, a row a part."""
    names, laws = ("delta_1", "delta_2", "delta"), laws_of(deltas)
    figure, axes = _figure(
        len(names), len(laws), "How each part of an output change goes with width: the exponent γ in n, over training",
        "Bands: 95 % over widths and seeds. Dotted: what the theory gives (δ1: at the first step, and later). Stable is 0.", 2.5,
    )  # fmt: skip
    steps = steps_of(deltas)
    for column, (law, rate) in enumerate(laws.items()):
        for row, part in enumerate(names):
            axis = axes[row][column]
            for arm in SHOWN:
                found = [(step, gamma(deltas, arm.name, law, step, part)) for step in steps]
                points = [(step, *value) for step, value in found if value is not None]
                if not points:
                    continue
                xs, means, halves = zip(*points, strict=True)
                axis.plot(xs, means, "o-", markersize=3, color=COLORS[arm.name], label=arm.name)
                low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
                axis.fill_between(xs, low, high, color=COLORS[arm.name], alpha=0.15, linewidth=0)
            expected = {"delta_1": (FIRST[law], LATER[law]), "delta_2": (1 - 2 * rate.power,)}.get(part, (LATER[law],))
            for value in expected:
                axis.axhline(value, linestyle=":", color="#333333", linewidth=1)
            axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
            axis.set_xscale("log")
            if row == 0:
                axis.set_title(f"lr {law}")
            if column == 0:
                axis.set_ylabel(f"γ of {PARTS[part]}", fontsize=10)
            if row == len(names) - 1:
                axis.set_xlabel("step")
    _legend(figure, axes[0][-1])
    return figure


def _sizes(deltas: Records) -> Any:
    """The parts' sizes against width late in training, a row an arm, a column a law."""
    step, laws = [step for step in steps_of(deltas) if step <= 100][-1], laws_of(deltas)
    figure, axes = _figure(
        len(SHOWN), len(laws), f"The parts of the output change at step {step}", "Root mean squares; log means over seeds.",
        2.3,
    )  # fmt: skip
    shades = ("#2a6fbb", "#d1495b", "#f0a202", "#333333")
    for row, arm in enumerate(SHOWN):
        for column, law in enumerate(laws):
            axis = axes[row][column]
            mine = [r for r in deltas if (r["arm"], r["law"], r["step"]) == (arm.name, law, step)]
            widths = sorted({r["width"] for r in mine})
            for part, color in zip(PARTS, shades, strict=True):
                values = [_log_mean([r[part] for r in mine if r["width"] == width]) for width in widths]
                axis.plot(widths, values, "o-", markersize=3, color=color, label=PARTS[part])
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(widths[::2], [str(width) for width in widths[::2]])
            axis.minorticks_off()
            if row == 0:
                axis.set_title(f"lr {law}")
            if row == len(SHOWN) - 1:
                axis.set_xlabel("n")
        axes[row][0].set_ylabel(arm.name, fontsize=10)
    _legend(figure, axes[0][-1])
    return figure


def _log_mean(values: list[float]) -> float:
    above = [math.log(value) for value in values if value > 0]
    return math.exp(statistics.fmean(above)) if above else math.nan


def _norms(deltas: Records) -> Any:
    """||A||/n and ||B||/m over training for the widest network."""
    width, laws = max(row["width"] for row in deltas), laws_of(deltas)
    arms = [arm for arm in (ADAMW, LORA_PLUS, STABLE[0], STABLE[-1]) if arm in present(deltas)]
    figure, axes = _figure(
        1, len(laws), f"The pair's norms over training, n = m = {width}",
        "Solid ||A||/n, dashed ||B||/m: log means over seeds. Crosses: Stable-LoRA pairs that had latched by then.",
        3.4,
    )  # fmt: skip
    for column, law in enumerate(laws):
        axis = axes[0][column]
        for arm in arms:
            mine = [r for r in deltas if (r["arm"], r["law"], r["width"]) == (arm.name, law, width)]
            steps = steps_of(mine)
            for name, style in (("a_norm", "-"), ("b_norm", "--")):
                values = [_log_mean([r[name] for r in mine if r["step"] == step]) / width for step in steps]
                label = arm.name if name == "a_norm" else None
                axis.plot(steps, values, style, color=COLORS[arm.name], linewidth=1.4, label=label)
                if name == "a_norm" and arm in STABLE:
                    latched = [s for s in steps if all(r["stable"] for r in mine if r["step"] == s)]
                    marked = [v for s, v in zip(steps, values, strict=True) if s in latched]
                    axis.plot(latched, marked, "x", color=COLORS[arm.name], markersize=5)
        axis.set(xscale="log", yscale="log", title=f"lr {law}", xlabel="step")
    axes[0][0].set_ylabel("norm over width")
    _legend(figure, axes[0][-1])
    return figure


def _learning_rates(found: Found) -> Any:
    """Held-out loss against the learning rate, a line a width, a column an arm; the best is marked."""
    arms, runs = SHOWN, found["runs"]
    grid = [run for run in runs if run["law"] == "grid"]
    widths = sorted({run["width"] for run in grid})
    best = {(row["arm"], row["width"]): row["lr"] for row in best_lrs(runs)}
    figure, axes = _figure(
        1, len(arms), "Does the best learning rate stay?",
        f"Held-out loss ({TASKS[found['family']][1]}); stars: the best.", 3.4,
    )  # fmt: skip
    for axis, arm in zip(axes[0], arms, strict=True):
        for width, color in zip(widths, _shades(len(widths)), strict=True):
            mine = [run for run in grid if (run["arm"], run["width"]) == (arm.name, width)]
            lrs = sorted({run["lr"] for run in mine})
            losses = [_log_mean([min(r["loss"], 10.0) for r in mine if r["lr"] == lr]) for lr in lrs]
            axis.plot(lrs, losses, "o-", markersize=3, color=color, label=f"n {width}")
            star = lrs.index(best[arm.name, width])
            axis.plot(lrs[star], losses[star], "*", color=color, markersize=11)
        axis.set(xscale="log", title=arm.name, xlabel="learning rate")
    drawn = [loss for axis in axes[0] for line in axis.lines for loss in line.get_ydata()]
    if max(drawn) > 10 * min(drawn):
        axes[0][0].set_yscale("log")  # of all panels, which share it
    axes[0][0].set_ylabel("held-out loss")
    _legend(figure, axes[0][-1])
    return figure
