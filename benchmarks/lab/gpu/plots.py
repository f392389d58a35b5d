"""Two plots of a GPU's results: times over the frozen layer's by M and r, and the regret of the tables' choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.gpu.report import pick
from benchmarks.lab.gpu.section import Row

SHADES = {"eager": "#8a8f98", "peft": "#2a6fbb", "compiled": "#5b9aa0", "ours": "#d1495b"}


def draw(rows: dict[str, list[Row]], machine: Row, out: Path, dry: bool) -> list[Path]:
    """Draw the plots for which there are rows."""
    import matplotlib.pyplot as plt

    from benchmarks.common.plot_style import STYLE, save

    title = f"{machine.get('gpu')}, bf16, CUDA graphs, commit {machine.get('commit')}"
    if dry:
        title = "DRY RUN, not a measurement"
    layer, regret = pick(rows.get("layer", []), mode="graph"), pick(rows.get("regret", []))
    paths = []
    with plt.rc_context(STYLE):
        if layer:
            paths.append(save(times(plt, layer, title), out / "times.png"))
        if regret:
            paths.append(save(choices(plt, regret, title), out / "choices.png"))
    return paths


def times(plt: Any, layer: Sequence[Row], title: str) -> Any:
    """Plot forward and backward over the frozen layer, against M at one rank and against the rank at one M."""
    sizes = {(row["n"], row["k"]) for row in layer}
    n, k = (4096, 4096) if (4096, 4096) in sizes else min(sizes)
    ranks, rows = {row["r"] for row in layer}, {row["m"] for row in layer}
    r, m = 16 if 16 in ranks else min(ranks), 8192 if 8192 in rows else max(rows)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", squeeze=False)
    for line, p in zip(axes, (0.1, 0.0), strict=True):
        for ax, (axis, fixed, value) in zip(line, (("m", "r", r), ("r", "m", m)), strict=True):
            chosen = pick(layer, n=n, k=k, dropout=p, direction="both", **{fixed: value})
            for arm, shade in SHADES.items():
                points = sorted(
                    (row[axis], row["over_frozen"]) for row in pick(chosen, arm=arm) if "over_frozen" in row
                )
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=shade, label=arm)
            if ax.lines:
                ax.legend()
            ax.axhline(1, color="#444444", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_xlabel(f"{axis} ({fixed} = {value}, {n}x{k}, dropout {p:g})")
            ax.set_ylabel("forward + backward over frozen")
    figure.suptitle(title, fontsize=10)
    return figure


def choices(plt: Any, regret: Sequence[Row], title: str) -> Any:
    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for direction, shade in (("forward", "#2a6fbb"), ("backward", "#d1495b")):
        timed = pick(regret, direction=direction)
        chosen = sorted(100 * row["regret"] for row in timed if row["kernel"] == row["chosen"])
        ax.plot(range(1, len(chosen) + 1), chosen, marker="o", markersize=3, color=shade, label=direction)
    ax.set(xlabel="calls, by regret", ylabel="tables' choice over the best kernel, % longer")
    ax.legend()
    figure.suptitle(title, fontsize=10)
    return figure
