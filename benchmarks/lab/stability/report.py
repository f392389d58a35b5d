"""Tables and CSV files of ``benchmarks.lab.stability``'s runs."""

from __future__ import annotations

import csv
import gzip
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval, log_slope
from benchmarks.common.optimizers import SHRINK_RATIOS
from benchmarks.common.tables import aligned, csv_text, rounded, write_files
from benchmarks.lab.stability.training import ADAMW, ARMS, DELTAS, LAWS, Arm, Law

PLANTED, TRANSFORMERS = "planted", "transformers"
# A task in words, and how to read its losses.
TASKS = {
    PLANTED: ("planted task", "1 is no learning"),
    TRANSFORMERS: ("2-layer Transformers over characters, plays to headlines", "nats a character"),
}
Found = dict[str, Any]
Records = Sequence[dict[str, Any]]
# The theory's exponents in n for a learning rate of n^-c: of delta_1 at the first step, when A is as drawn, and later, when A is
# what the steps made of it. delta_2 and delta_3 have 1 - 2c throughout.
FIRST = {name: -law.power for name, law in LAWS.items()}
LATER = {name: max(-law.power, 1 - 2 * law.power) for name, law in LAWS.items()}


def steps_of(deltas: Records) -> list[int]:
    return sorted({record["step"] for record in deltas})


def gamma(deltas: Records, arm: str, law: str, step: int, part: str) -> tuple[float, float] | None:
    """The exponent of a part's size in n, over widths and seeds."""
    rows = [row for row in deltas if (row["arm"], row["law"], row["step"]) == (arm, law, step)]
    return log_slope([row["width"] for row in rows], [row[part] for row in rows])


def _shown(slope: float | None, half: float | None) -> str:
    return "-" if slope is None else f"{slope:+.2f} ± {half:.2f}"


def present(records: Records) -> list[Arm]:
    names = {record["arm"] for record in records}
    return [arm for arm in ARMS if arm.name in names]


def laws_of(records: Records) -> dict[str, Law]:
    names = {record["law"] for record in records}
    return {name: law for name, law in LAWS.items() if name in names}


def gamma_rows(deltas: Records, step: int) -> list[dict[str, Any]]:
    rows = []
    for law in laws_of(deltas):
        for arm in present(deltas):
            row: dict[str, Any] = {"law": law, "arm": arm.name, "step": step}
            for part in (*DELTAS, "a_z"):
                row[part], row[f"{part}_95"] = gamma(deltas, arm.name, law, step, part) or (None, None)
            rows.append(row)
    return rows


def gamma_table(deltas: Records, step: int) -> list[str]:
    cells = [["lr", "arm", "delta_1", "delta_2", "delta_3", "whole", "A Z"]]
    for row in gamma_rows(deltas, step):
        parts = ("delta_1", "delta_2", "delta_3", "delta", "a_z")
        cells.append([row["law"], row["arm"], *(_shown(row[part], row[f"{part}_95"]) for part in parts)])
    return aligned(cells, left=2)


def _log_losses(runs: Records) -> dict[tuple[str, int], dict[float, dict[int, float]]]:
    """By arm and width, learning rate and seed of the grid."""
    found: dict[tuple[str, int], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        if run["law"] == "grid":
            # A run that diverged counts as ten times as bad as one that learned nothing.
            found[run["arm"], run["width"]][run["lr"]][run["seed"]] = math.log(min(max(run["loss"], 1e-12), 10.0))
    return found


def best_lrs(runs: Records) -> list[dict[str, Any]]:
    """Each arm's and width's learning rate with the least mean log loss on held-out examples, and the ratio of that loss to
    AdamW's at AdamW's best, seed by seed."""
    losses, rows = _log_losses(runs), []
    best = {key: min(by_lr, key=lambda lr: statistics.fmean(by_lr[lr].values())) for key, by_lr in losses.items()}
    for (arm, width), lr in best.items():
        mine = losses[arm, width][lr]
        mean, half = interval([*mine.values()])
        row: dict[str, Any] = {"arm": arm, "width": width, "lr": lr}
        row |= {"log_loss": mean, "log_loss_95": half, "seeds": len(mine)}
        base = losses[ADAMW.name, width][best[ADAMW.name, width]] if arm != ADAMW.name else {}
        if len(shared := [seed for seed in mine if seed in base]) > 1:
            row["log_ratio"], row["log_ratio_95"] = interval([mine[seed] - base[seed] for seed in shared])
        rows.append(row)
    return rows


def ratio_table(runs: Records) -> list[str]:
    rows = best_lrs(runs)
    widths = sorted({row["width"] for row in rows})
    cells = [["arm", *(f"n {width}" for width in widths)]]
    # Ratios within a percent of 1 need more than two digits.
    far = max((abs(row["log_ratio"]) for row in rows if "log_ratio" in row), default=0.0)
    digits = 2 if far > 0.01 else 4
    for arm in present(runs):
        mine = {row["width"]: row for row in rows if row["arm"] == arm.name}
        if all("log_ratio" in row for row in mine.values()):
            cells.append([arm.name, *(_ratio(mine[width], digits) for width in widths)])
    return aligned(cells)


def _ratio(row: dict[str, Any], digits: int) -> str:
    low, middle, high = (math.exp(row["log_ratio"] + sign * row["log_ratio_95"]) for sign in (-1, 0, 1))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def best_table(runs: Records) -> list[str]:
    rows = best_lrs(runs)
    widths = sorted({row["width"] for row in rows})
    cells = [["arm", *(f"n {width}" for width in widths), "exponent"]]
    for arm in present(runs):
        mine = {row["width"]: row for row in rows if row["arm"] == arm.name}
        slope = log_slope(widths, [mine[width]["lr"] for width in widths]) or (None, None)
        bests = [f"{mine[width]['lr']:g}: {math.exp(mine[width]['log_loss']):.3g}" for width in widths]
        cells.append([arm.name, *bests, _shown(*slope)])
    return aligned(cells)


def regime_rows(runs: Records, steps: int) -> list[dict[str, Any]]:
    """When the latch comes and what shrinking has done by then, for each ratio, width and learning rate of the grid."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["law"] == "grid":
            groups[run["arm"], run["width"], run["lr"]].append(run)
    rows = []
    for arm in present(runs):
        for (name, width, lr), mine in sorted(groups.items()):
            if name != arm.name or not arm.shrink_ratio:
                continue
            shrinks = statistics.median(run["shrinks"] for run in mine)
            row: dict[str, Any] = {"ratio": arm.shrink_ratio, "width": width, "lr": lr}
            # The fewest steps that B needs, from PEFT's start.
            row |= {"bound": 1 / (math.sqrt(3 * width) * lr), "shrinks": shrinks}
            row |= {"latched": sum(run["latched_at"] is not None for run in mine), "seeds": len(mine)}
            rows.append(row | {"a_left": (1 - arm.shrink_ratio) ** shrinks, "steps": steps})
    return rows


def regime_table(rows: Records) -> list[str]:
    ratio = max(row["ratio"] for row in rows)
    mine = [row for row in rows if row["ratio"] == ratio]
    lrs = sorted({row["lr"] for row in mine})
    cells = [["width", *(f"lr {lr:g}" for lr in lrs)]]
    for width in sorted({row["width"] for row in mine}):
        of_width = {row["lr"]: row for row in mine if row["width"] == width}
        texts = []
        for lr in lrs:
            row = of_width[lr]
            more = "" if row["latched"] == row["seeds"] else "+"
            texts.append(f"{row['shrinks']:g}{more} ({row['bound']:.0f}) {100 * row['a_left']:.0f} %")
        cells.append([f"{width}", *texts])
    return aligned(cells)


def table(found: Found) -> str:
    deltas, runs, steps = found["deltas"], found["runs"], found["steps"]
    last = max(steps_of(deltas))
    seeds, widths = sorted({run["seed"] for run in runs}), sorted({run["width"] for run in runs})
    rows = regime_rows(runs, steps)
    first = [["lr", "delta_1, first step", "delta_1, later", "delta_2, delta_3"]]
    first += [
        [name, f"{FIRST[name]:+.2f}", f"{LATER[name]:+.2f}", f"{1 - 2 * law.power:+.2f}"]
        for name, law in laws_of(deltas).items()
    ]
    lines = [
        f"{TASKS[found['family']][0]}, widths {widths[0]} to {widths[-1]}, {len(seeds)} seeds, {steps} steps, r 8",
        "",
        "Exponents in n that the theory gives",
        *aligned(first),
    ]
    probed = steps_of(deltas)
    middle = [step for step in probed if step <= 20][-1]
    for step in dict.fromkeys((1, middle, last)):
        title = f"Exponents found at step {step}, with 95 % intervals over widths and seeds"
        lines += ["", title, *gamma_table(deltas, step)]
    lines += [
        "",
        f"Shrinking steps until the latch (least by the bound), and what they left of A; lambda {max(SHRINK_RATIOS):g}; + where "
        "some seed never latched",
        *regime_table(rows),
        "",
        f"Best learning rate of the grid: held-out loss there ({TASKS[found['family']][1]}), and how it goes with n",
        *best_table(runs),
        "",
        "That loss over AdamW's at its best: geometric means over seeds, 95 % intervals",
        *ratio_table(runs),
    ]
    return "\n".join(lines) + "\n"


def write(found: Found, out: Path) -> list[Path]:
    deltas, runs = found["deltas"], found["runs"]
    files = {
        "table.txt": table(found),
        "exponents.csv": csv_text([row for step in steps_of(deltas) for row in gamma_rows(deltas, step)]),
        # Losses differ by less than a part in a thousand: all digits that float32 has.
        "runs.csv": csv_text([rounded(run, 8) for run in runs]),
        "latch.csv": csv_text(regime_rows(runs, found["steps"])),
        "best_lr.csv": csv_text(best_lrs(runs)),
        # The steps' parts as measured, to four digits.
        "deltas.csv.gz": csv_text([rounded(row, 4) for row in deltas]),
    }
    return write_files(out, files)


def read(directory: Path) -> Found:
    """What :func:`write` has stored in ``directory``, as runs and deltas again."""

    def rows(text: str) -> list[dict[str, Any]]:
        return [
            {name: cell if name in ("arm", "law") else json.loads(cell or "null") for name, cell in row.items()}
            for row in csv.DictReader(text.splitlines())
        ]

    deltas = rows(gzip.decompress((directory / "deltas.csv.gz").read_bytes()).decode())
    runs, latch = (rows((directory / name).read_text(encoding="utf-8")) for name in ("runs.csv", "latch.csv"))
    first = (directory / "table.txt").read_text(encoding="utf-8")
    family = next(name for name, (task, _) in TASKS.items() if first.startswith(task))
    return {"runs": runs, "deltas": deltas, "steps": latch[0]["steps"], "family": family}
