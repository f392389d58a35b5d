"""PNG plots of a result."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import STYLE, colors, plt, save
from benchmarks.finetuning.arms import FROZEN, PEFT
from benchmarks.finetuning.experiment import Result
from benchmarks.finetuning.report import Row, adapters, change, disturbed, summary


def draw(result: Result, directory: Path) -> list[Path]:
    """Draw all plots whose figures were measured: summary.png and loss.png."""
    if any(len(run["series"]["loss"]) < 2 for record in result["arms"].values() for run in record["runs"][:1]):
        return []
    with plt.rc_context(STYLE):
        return [save(_summary(result), directory / "summary.png"), save(_loss(result), directory / "loss.png")]


def _conditions(result: Result, width: float) -> str:
    settings, recipe, environment = result["settings"], result["recipe"], result["environment"]
    on_gpu = settings["device"].startswith("cuda")
    machine = environment["gpu"] if on_gpu else f"{environment['cpu']}, {environment['cores']} cores"
    if disturbed(result):
        machine += ", DISTURBED by other programs"
    versions = f"torch {environment['torch']}, PEFT {environment['peft']}, commit {environment['commit']}"
    text = (
        f"{settings['model']} on {settings['data']}, {adapters(result)}, lr {recipe['lr']:g}, λ {recipe['shrink_ratio']:g}, "
        f"{settings['dtype']}, {machine}, {versions}"
    )
    return "\n".join(textwrap.wrap(text, int(13 * width)))


def _summary(result: Result) -> Any:
    """Time, memory and held-out loss side by side, with the conditions beneath."""
    rows, metric = summary(result), result["task"]["metric"]
    panels = [
        (title, key, spec)
        for title, key, spec in (
            ("Time of a training step, ms", "step_ms_median", ",.0f"),
            ("Saved for backward, MiB", "saved_mib", ",.0f"),
            ("Peak memory, MiB", "peak_mib", ",.0f"),
            (f"Held-out {metric}", metric, ".3f"),
        )
        if any(row[key] for row in rows.values())
    ]
    width = 2.5 + 2.7 * len(panels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, 1.5 + 0.6 * len(rows)), layout="constrained", squeeze=False
    )
    figure.supxlabel(_conditions(result, width), fontsize=8, color="#555555")
    palette = colors(list(rows))
    for axis, (title, key, spec) in zip(axes[0], panels, strict=True):
        widest = max(row[key] or 0 for row in rows.values())
        for position, (name, row) in enumerate(rows.items()):
            if row[key] is not None:
                axis.barh(position, row[key], color=palette[name], height=0.62)
            # At a fixed place, so that the labels can be read as a column.
            axis.text(1.05 * widest, position, _label(row, rows, key, spec), va="center", fontsize=9)
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows.values()] if axis is axes[0][0] else [])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 1.8 * widest)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.grid(visible=False)
    return figure


def _label(row: Row, rows: dict[str, Row], key: str, spec: str) -> str:
    """A bar's figure; of time and memory also the change against PEFT's."""
    if row[key] is None:
        return "not measured"
    peft = rows.get(PEFT, {}).get(key)
    if row["arm"] in (FROZEN, PEFT) or not peft or key in ("loss", "accuracy"):
        return format(row[key], spec)
    # As the verdict has it: of all steps together.
    ratio = 1 / row["speedup_over_peft"] if key == "step_ms_median" else row[key] / peft
    return f"{row[key]:{spec}}\n{change(ratio)} than PEFT"


def _loss(result: Result) -> Any:
    """The training loss of each arm: the mean over seeds, and each seed thin."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    figure.supxlabel(_conditions(result, 7.5), fontsize=8, color="#555555")
    for (name, color), style in zip(colors(list(result["arms"])).items(), ("-", "-", ":", "--"), strict=False):
        losses = [run["series"]["loss"] for run in result["arms"][name]["runs"]]
        for loss in losses:
            axis.plot(range(1, len(loss) + 1), loss, color=color, alpha=0.2, linewidth=0.8)
        means = [sum(step) / len(step) for step in zip(*losses, strict=False)]
        axis.plot(range(1, len(means) + 1), means, style, color=color, label=result["arms"][name]["label"])
    axis.set(xlabel="step", ylabel="training loss (cross entropy)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure
