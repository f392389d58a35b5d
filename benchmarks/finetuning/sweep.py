"""Many runs together: mean and 95 % interval over seeds, for each learning rate and arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval
from benchmarks.common.measure import summarize
from benchmarks.common.tables import aligned, csv_text, json_text, write_files
from benchmarks.finetuning.headline import headlines
from benchmarks.finetuning.result import Result, adapters, flat_summary, summary

_METRICS = (
    "accuracy",
    "difference",
    "loss",
    "train_loss",
    "shrinks_mean",
    "a_factor",
    "step_overhead_percent",
    "speedup_over_peft",
)


def sweep_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A record for each learning rate and arm. Differences are taken run by run, against PEFT on the same seed."""
    rows = []
    for lr in dict.fromkeys(result["recipe"]["lr"] for result in results):
        runs = [result for result in results if result["recipe"]["lr"] == lr]
        for name in runs[0]["arms"]:
            flat = [flat_summary(run, name) for run in runs]
            row: dict[str, Any] = {"lr": lr, "arm": name, "label": flat[0]["label"], "runs": len(flat)}
            for metric in _METRICS:
                values = [record[metric] for record in flat if record[metric] is not None]
                row[metric], row[f"{metric}_95"] = interval(values) if values else (None, None)
            rows.append(row)
    return rows


def sweep_summary(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Each arm's figures over all runs: the mean of the runs' ratios, and the memory, which one run measures."""
    runs = [summary(result) for result in results]
    found = {}
    for name in runs[0]:
        rows = [run[name] for run in runs]
        ratios = [row["speedup_over_peft"] for row in rows if row["speedup_over_peft"] is not None]
        mean, half = interval(ratios) if ratios else (None, None)
        found[name] = {"speedup_over_peft": mean, "speedup_over_peft_95": half}
        times = [row["step_ms_median"] for row in rows if row["step_ms_median"] is not None]
        found[name]["step_ms_median"] = summarize(times)["median"] if times else None
        for key in ("saved_mib", "peak_mib"):
            found[name][key] = next((row[key] for row in rows if row[key]), None)
    return found


def sweep_table(results: Sequence[Result]) -> str:
    rows = sweep_rows(results)
    heads = ["lr", "arm", "runs", "accuracy, %", "minus PEFT's", "held-out loss", "shrinking steps", "||A|| left, %"]
    cells = [[*heads, "over frozen, %", "PEFT's time over its own"]]
    for row in rows:
        figures = [
            _mean(row, "accuracy", 100), _mean(row, "difference", 100, "+.2f"), _mean(row, "loss", spec=".3f"),
            _mean(row, "shrinks_mean", spec=".1f"), _mean(row, "a_factor", 100),
            _mean(row, "step_overhead_percent", spec="+.1f"), _mean(row, "speedup_over_peft"),
        ]  # fmt: skip
        cells.append([f"{row['lr']:g}", row["label"], str(row["runs"]), *figures])
    settings = results[0]["settings"]
    seeds = sorted({result["settings"]["seed"] for result in results})
    answer = headlines(sweep_summary(results))
    if answer:
        answer += [f"Means and 95% intervals over {len(results)} runs; memory of the first run.", ""]
    return "\n".join(
        [
            *answer,
            *aligned(cells, left=2),
            "",
            f"{settings['model']} on {settings['data']}, {adapters(results[0])}, {settings['steps']} steps of "
            f"{settings['batch_size']}, "
            f"{settings['dtype']}, seeds {', '.join(map(str, seeds))}: means ± half the 95% interval over seeds.",
            "A difference whose interval holds 0 shows nothing.",
        ]
    )


def _mean(row: dict[str, Any], metric: str, factor: float = 1, spec: str = ".2f") -> str:
    value, half = row[metric], row[f"{metric}_95"]
    if value is None:
        return "-"
    text = format(factor * value, spec)
    return text if math.isnan(half) else f"{text} ± {format(factor * half, spec.lstrip('+'))}"


def write_sweep(results: Sequence[Result], directory: Path) -> list[Path]:
    rows = sweep_rows(results)
    found = sweep_summary(results)
    record = json_text(
        {
            "environment": results[-1]["environment"],
            "rows": rows,
            "summary": found,
            "headlines": headlines(found),
        }
    )
    texts = {"sweep.csv": csv_text(rows), "sweep.json": record, "sweep.txt": sweep_table(results) + "\n"}
    return write_files(directory, texts)


def draw_sweep(results: Sequence[Result], directory: Path) -> list[Path]:
    """Accuracy minus PEFT's for each shrink ratio, grouped by learning rate."""
    from benchmarks.common.plot_style import STYLE, colors, plt, save

    rows = [row for row in sweep_rows(results) if row["difference"] is not None]
    lrs = list(dict.fromkeys(row["lr"] for row in rows))
    palette = colors(list(results[0]["arms"]))
    names = list(dict.fromkeys(row["arm"] for row in rows))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
        for index, name in enumerate(names):
            mine = [row for row in rows if row["arm"] == name]
            x = [lrs.index(row["lr"]) + 0.8 * ((index + 0.5) / len(names) - 0.5) for row in mine]
            y = [100 * row["difference"] for row in mine]
            half = [0.0 if math.isnan(row["difference_95"]) else 100 * row["difference_95"] for row in mine]
            axis.errorbar(x, y, yerr=half, fmt="o", color=palette[name], capsize=3, label=mine[0]["label"])
        axis.axhline(0, color="black", linewidth=0.9)
        axis.set_xticks(range(len(lrs)), [f"lr {lr:g}" for lr in lrs])
        axis.set_xlim(-0.5, len(lrs) - 0.5)
        axis.margins(y=0.2)
        axis.set_ylabel("held-out accuracy minus PEFT's, points")
        axis.set_title("Against vanilla LoRA on the same seeds, mean and 95% interval", fontsize=12, fontweight="bold")
        axis.legend(ncols=2, fontsize=8)
        return [save(figure, directory / "sweep.png")]
