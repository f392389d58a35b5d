"""The README's figure: what LoRA adds to a training step, measured on a CPU, and to a layer, predicted for an H100.

``python -m benchmarks.lab.page`` draws it from stored results: a main job with dropout, one without, the cost model's CSV.
"""

from __future__ import annotations

import json
import textwrap
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.common.plot_style import BLUE, RED, RIVALS, STYLE, plt, save
from benchmarks.common.tables import RESULTS, read_csv
from benchmarks.lab.cost_model.__main__ import SLOW

FIGURE = RESULTS.parents[1] / "docs" / "_static" / "headline.png"
# The machine and the directories of its two main jobs.
MACHINE = "epyc-avx2-2core"
JOBS = {"dropout 0.05": "quick", "no dropout": "quick_no_dropout"}
ARMS = {
    "peft": ("PEFT", BLUE),
    "accelerated": ("+ accelerate_peft", RED),
    "stable": ("our layers (apply_lora)", "#e58a96"),
}
# The predicted layer.
SHAPE = {"m": "8192", "n": "4096", "k": "4096", "r": "16"}


def draw(results: Path, path: Path = FIGURE) -> list[Path]:
    """Draw the figure to ``path``, if all of it is in ``results``, which is benchmarks/results."""
    files = {label: results / MACHINE / job / "result.json" for label, job in JOBS.items()}
    if not all(file.is_file() for file in files.values()):
        return []
    jobs = {label: json.loads(file.read_text(encoding="utf-8")) for label, file in files.items()}
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        _measured(left, jobs)
        _predicted(right, results / "predicted-h100")
    return [save(figure, path)]


def _measured(axis: Any, jobs: dict[str, dict[str, Any]]) -> None:
    labels, places, ticks = [], count(), []
    for condition, job in jobs.items():
        _group(axis, next(places), condition)
        for start, (label, color) in ARMS.items():
            row = next(row for name, row in job["summary"].items() if name.startswith(start))
            middle, half = row["step_overhead_percent"], row["step_overhead_percent_95"]
            place = next(places)
            axis.barh(place, middle, color=color, height=0.7, xerr=half, ecolor="#444444")
            faster = row["speedup_over_peft"]
            text = f" {middle:+.0f} %" + (f"   {faster:.2f}x PEFT's speed" if faster else "")
            axis.text(max(middle + half, 0), place, text, va="center", fontsize=9)
            labels.append(label)
            ticks.append(place)
    axis.set_yticks(ticks, labels)
    axis.set_ylim(ticks[-1] + 0.6, -0.5)
    axis.set_xlim(right=1.75 * axis.get_xlim()[1])
    axis.axvline(0, color="#444444", linewidth=0.8)
    _head(axis, "MEASURED: what LoRA adds to a training step,\n% of the frozen model's time", conditions(jobs))


def conditions(jobs: dict[str, dict[str, Any]]) -> str:
    """What a reader must know of the measured panel."""
    job = next(iter(jobs.values()))
    settings, recipe, environment = job["settings"], job["recipe"], job["environment"]
    steps = " and ".join(str(min(row["steps"] for row in each["summary"].values())) for each in jobs.values())
    commits = " and ".join(dict.fromkeys(each["environment"]["commit"][:7] for each in jobs.values()))
    return (
        f"SmolLM2-135M, all linear layers, r {recipe['r']}, {settings['dtype']}, batch {settings['batch_size']}; arms take turns "
        f"on each batch, {steps} steps, 95 % intervals; {environment['cpu']}, {environment['cores']} cores without AVX-512, "
        f"torch {environment['torch']}, PEFT {environment['peft']} with fused AdamW, commits {commits}"
    )


def _predicted(axis: Any, directory: Path) -> None:
    labels, ticks, place, widest = [], [], 0, 0.0
    for dropout in ("0.1", "0"):
        row = next(
            row
            for row in read_csv(directory / f"predicted_dropout_{dropout}.csv")
            if all(row[key] == value for key, value in SHAPE.items())
        )
        frozen = _time(row, "frozen")
        _group(axis, place, "no dropout" if dropout == "0" else f"dropout {dropout}")
        place += 1
        for name, color in RIVALS.items():
            if name != "ours" and f"{name} forward" in row:
                added = 100 * (_time(row, name) / frozen - 1)
                axis.barh(place, added, color=color, height=0.7)
                axis.text(added, place, f" {added:+.0f} %", va="center", fontsize=9)
                labels.append(name.removeprefix("eager (").rstrip(")"))
                ticks.append(place)
                place, widest = place + 1, max(widest, added)
        fast, slow = (100 * (_time(row, "ours", end) / frozen - 1) for end in ("", SLOW))
        axis.barh(place, fast, color=RED, height=0.7)
        axis.barh(place, slow - fast, left=fast, color=RED, alpha=0.35, height=0.7)
        axis.text(slow, place, f" {fast:+.0f} to {slow:+.0f} %", va="center", fontsize=9)
        labels.append("this library")
        ticks.append(place)
        place += 1
    axis.set_yticks(ticks, labels)
    axis.set_ylim(ticks[-1] + 0.6, -0.5)
    axis.set_xlim(0, 1.3 * widest)
    text = (
        "Layer of 4096 x 4096, 8192 rows, r 16, bfloat16, forward and backward; bytes and operations over an H100's ceilings. "
        "Ours: its products reach 0.85 to 1.0 of the vendor's rate. Unsloth has no dropout. No GPU has run this library yet."
    )
    _head(axis, "PREDICTED for an H100: what LoRA adds to a layer,\n% of the frozen layer's time", text)


def _time(row: dict[str, str], name: str, end: str = "") -> float:
    return float(row[f"{name} forward{end}"]) + float(row[f"{name} backward{end}"])


def _group(axis: Any, place: float, text: str) -> None:
    axis.annotate(text, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=9, style="italic")


def _head(axis: Any, title: str, text: str) -> None:
    axis.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axis.set_xlabel("\n".join(textwrap.wrap(text, 78)), fontsize=8, color="#555555", ha="left", x=0, labelpad=8)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
