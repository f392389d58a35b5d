"""Plots of ``benchmarks.lab.paper``'s runs: score against learning rate, and differences from AdamW."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.optimizers import SHRINK_RATIOS
from benchmarks.common.plot_style import BLUE, GREEN, GREY, RATIO_SHADES, STYLE, plt, save
from benchmarks.lab.paper import ablations
from benchmarks.lab.paper.scores import (
    PLAIN,
    Records,
    Setting,
    fallen,
    headline,
    plain,
    rates,
    same_rate,
    seeds,
    setting_of,
    settings,
)
from benchmarks.lab.paper.training import ADAMW, LORA_PLUS, RIEMANNIAN, RITE, STABLE, arm_of

# The same color in all plots, whichever ratios they show.
COLORS = {ADAMW: BLUE, LORA_PLUS: GREEN, RIEMANNIAN: GREY, RITE: "#9467bd"} | {
    arm_of(STABLE, ratio): shade for ratio, shade in zip(SHRINK_RATIOS, RATIO_SHADES, strict=True)
}


def draw(records: Records, out: Path) -> list[Path]:
    paths = []
    for setting in settings(records):
        name = "_".join(map(str, setting))
        mine = plain(records, setting)
        ablated = ablations.rows([record for record in records if setting_of(record) == setting])
        with plt.rc_context(STYLE):
            # A single rate, as of the edge, needs no plot.
            if len({record["run"]["lr"] for record in mine}) > 1:
                paths.append(save(_figure(mine, setting), out / f"{name}.png"))
            if ablated:
                paths.append(save(_ablations(ablated, setting), out / f"{name}_ablations.png"))
    return paths


def _figure(records: Records, setting: Setting) -> Any:
    loss = setting.task == "plays"
    found = [row for row in headline(records) if "difference" in row]
    # Without enough seeds to choose a best rate there is no third panel.
    size, widths = ((14, 5.6), (1.2, 1.2, 1)) if found else ((10, 4.7), (1.2, 1.2))
    figure, (left, middle, *rest) = plt.subplots(
        1, len(widths), figsize=size, layout="constrained", width_ratios=widths
    )
    title = f"{setting}: LoRA r 8 on query and value"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    rows = rates(records)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        values = [-row["test"] if loss else 100 * row["test"] for row in mine]
        left.plot([row["lr"] for row in mine], values, "o-", markersize=4, color=COLORS[arm], label=arm)
    left.set(xscale="log", xlabel="learning rate", ylabel="test loss, nats a token" if loss else "test accuracy, %")
    left.set_title(f"every learning rate, means over {seeds(records)}", fontsize=12)
    figure.legend(loc="outside lower center", ncols=4, fontsize=13)
    factor = -1 if loss else 100
    beside = same_rate(records)
    # A run that fell to one class is off by tens of points; a mean with it would only show how many fell.
    broken = fallen(records)
    kept = [-row["test"] for row in rows if (row["arm"], row["lr"]) not in broken]
    if loss and kept:
        # A loss has no upper end: with broken runs in view, all others would be one line.
        margin = 0.05 * (max(kept) - min(kept) or 1)
        left.set_ylim(min(kept) - margin, max(kept) + margin)
    for arm in dict.fromkeys(row["arm"] for row in beside):
        mine = [row for row in beside if row["arm"] == arm and not {(arm, row["lr"]), (ADAMW, row["lr"])} & broken]
        values = [factor * row["difference"] for row in mine]
        middle.plot([row["lr"] for row in mine], values, "o-", markersize=4, color=COLORS[arm])
    middle.axhline(0, color="#333333", linewidth=0.8)
    middle.set(
        xscale="log",
        xlim=left.get_xlim(),
        xlabel="learning rate",
        ylabel=f"minus AdamW's, {'nats a token' if loss else 'points'}",
    )
    middle.set_title(f"minus AdamW's at the same rate{', where no run broke' if broken else ''}", fontsize=12)
    for axes in (left, middle):
        axes.set_xticks(ticks := sorted({row["lr"] for row in rows}), [f"{lr:g}" for lr in ticks])
        axes.minorticks_off()
    if found:
        _at_their_best(rest[0], found, loss)
    return figure


def _at_their_best(axes: Any, found: Records, loss: bool) -> None:
    factor = -1 if loss else 100
    for place, row in enumerate(found):
        half = abs(factor) * row["difference_95"]
        axes.errorbar(factor * row["difference"], place, xerr=half, fmt="o", capsize=4, color=COLORS[row["arm"]])
    names = [f"{row['arm']}\nlr {row['lr']:g}, {row['pairs']} seeds" for row in found]
    axes.set_yticks(range(len(found)), names, fontsize=11)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set(
        xlabel="loss minus AdamW's (left is better)" if loss else "accuracy minus AdamW's, points",
        ylim=(-0.6, len(found) - 0.4),
    )
    axes.set_title("each at its best, seed by seed, 95 %", fontsize=12)


def _ablations(rows: Records, setting: Setting) -> Any:
    """Score against rank for every optimizer, and Stable-LoRA minus AdamW under each change."""
    loss = setting.task == "plays"
    factor = -1 if loss else 100
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", width_ratios=(1, 1.1))
    figure.suptitle(f"{setting}: each optimizer at its best for r 8", fontsize=14, fontweight="bold")
    _against_rank(left, rows, loss)
    found = [row for row in rows if row["arm"].startswith(STABLE) and row["minus_adamw"] is not None][::-1]
    for place, row in enumerate(found):
        right.errorbar(factor * row["minus_adamw"], place, xerr=abs(factor) * row["minus_adamw_95"], fmt="o", capsize=4,
                       color=COLORS[row["arm"]])  # fmt: skip
    right.set_yticks(
        range(len(found)), [f"{ablations.change(row)}\n{row['seeds']} seeds" for row in found], fontsize=10
    )
    right.axvline(0, color="#333333", linewidth=0.8)
    right.set(xlabel=f"Stable-LoRA minus AdamW, {'nats a token' if loss else 'points'}", ylim=(-0.6, len(found) - 0.4))
    right.set_title("with the same thing changed in both, seed by seed, 95 %", fontsize=12)
    return figure


def _against_rank(axes: Any, rows: Records, loss: bool) -> None:
    factor = -1 if loss else 100
    others = [name for name in PLAIN if name != "r"]
    ranked = {row["arm"] for row in rows if row["r"] is not None}
    ranks = [row for row in rows if row["arm"] in ranked and all(row[name] is None for name in others)]
    if not ranks:
        axes.set_axis_off()
        return
    for place, arm in enumerate(arms := list(dict.fromkeys(row["arm"] for row in ranks))):
        mine = sorted(
            (row["r"] or PLAIN["r"], factor * row["test"], abs(factor) * row["test_95"])
            for row in ranks
            if row["arm"] == arm
        )
        # Shift arms sideways; otherwise intervals hide each other.
        shift = 1.06 ** (place - (len(arms) - 1) / 2)
        axes.errorbar([r * shift for r, *_ in mine], [y for _, y, _ in mine], yerr=[e for *_, e in mine], fmt="o-", markersize=4,
                      capsize=2, linewidth=1, color=COLORS[arm], label=arm)  # fmt: skip
    axes.set(xscale="log", xlabel="rank", ylabel="test loss, nats a token" if loss else "test accuracy, %")
    axes.set_xticks(ticks := sorted({row["r"] or PLAIN["r"] for row in ranks}), [str(r) for r in ticks])
    axes.minorticks_off()
    # A run that fell to one class is off by tens of points.
    middle = statistics.median(factor * row["test"] for row in ranks)
    axes.set_ylim(*((middle - 0.2, middle + 0.2) if loss else (middle - 5, middle + 4)))
    axes.set_title("against rank, means and 95 % intervals over seeds", fontsize=12)
    axes.figure.legend(loc="outside lower center", ncols=5, fontsize=12, frameon=False)
