"""Tables and plots of ``benchmarks.research stability``. Summaries in CSV files are stored; the tables come from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common.intervals import interval, log_slope
from benchmarks.common.tables import write_text
from benchmarks.research.plots import panels
from benchmarks.research.runner import RECORDS, load
from benchmarks.research.stability import ADAMW, ARMS, GRID, LAWS, LORA_PLUS, NEAR_ZERO, PARTS

KEYS = ["task", "steps"]
STABLE = [arm for arm in ARMS if ARMS[arm].shrink_ratio]


def exponents(records: pd.DataFrame) -> pd.DataFrame:
    """The exponent in n of each part's size, and half the width of its 95 % interval over widths and seeds."""
    rows, keys = [], [*KEYS, "step", "law", "arm"]
    for key, mine in records[records.step.notna()].groupby(keys):
        row = dict(zip(keys, key, strict=True))
        for part in PARTS:
            row[part], row[f"{part}_95"] = log_slope(mine.width, mine[part]) or (None, None)
        rows.append(row)
    return pd.DataFrame(rows)


def grid(records: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss (geometric mean) and shrinking steps (median) over seeds; the fewest steps that B needs to reach A from PEFT's
    start; and what shrinking left of A."""
    groups = records[records.law == GRID].groupby([*KEYS, "arm", "width", "lr"])
    rows = groups.agg(
        loss=("log_loss", "mean"), shrinks=("shrinks", "median"), latched=("latched", "sum"), seeds=("seed", "size")
    )
    rows = rows.reset_index()
    kept = 1 - rows.arm.map(lambda arm: ARMS[arm].shrink_ratio)
    bound = 1 / (np.sqrt(3 * rows.width) * rows.lr)
    return rows.assign(loss=np.exp(rows.loss), bound=bound, a_left=kept**rows.shrinks)


def best_lrs(records: pd.DataFrame) -> pd.DataFrame:
    """Each arm's learning rate with the least loss, that loss, and its ratio to AdamW's least with a 95 % interval, seed by seed."""
    rows = []
    for (task, steps, width), mine in records[records.law == GRID].groupby([*KEYS, "width"]):
        losses = mine.pivot(index="seed", columns=["arm", "lr"], values="log_loss")
        best = losses.mean().groupby("arm").idxmin()
        for arm, column in best.items():
            mean, half = interval((losses[column] - losses[best[ADAMW]]).dropna())
            row = {"task": task, "steps": steps, "width": width, "arm": arm, "lr": column[1], "seeds": len(losses)}
            ratios = {"ratio": mean, "ratio_low": mean - half, "ratio_high": mean + half}
            rows.append(row | {name: np.exp(x) for name, x in ({"loss": losses[column].mean()} | ratios).items()})
    return pd.DataFrame(rows)


SUMMARIES = {"exponents": exponents, "grid": grid, "best_lr": best_lrs}


def tables(slopes: pd.DataFrame, cells: pd.DataFrame, best: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By title."""
    powers = {law: LAWS[law][1] for law in slopes.law.unique()}
    theory = {
        law: {"delta_1 at step 1": -c, "later": max(-c, 1 - 2 * c), "delta_2, delta_3": 1 - 2 * c}
        for law, c in powers.items()
    }
    found = {"Exponents in n that the theory gives": pd.DataFrame(theory)}
    steps = sorted(slopes.step.unique())
    for step in dict.fromkeys((1, max(step for step in steps if step <= 20), steps[-1])):
        rows = slopes[slopes.step == step].drop(columns=[*KEYS, "step"]).set_index(["law", "arm"])
        found[f"Exponents found at step {step:g}, and half the width of their 95 % intervals"] = rows.round(2)
    most = cells[cells.arm == STABLE[-1]]
    for name in ("shrinks", "bound", "latched", "a_left"):
        found[f"{STABLE[-1]}: {name}"] = most.pivot(index="width", columns="lr", values=name)
    for name in ("lr", "loss", "ratio", "ratio_low", "ratio_high"):
        found[f"At the best learning rate of the grid: {name}"] = best.pivot(index="arm", columns="width", values=name)
    slope = {arm: log_slope(rows.width, rows.lr) or (np.nan, np.nan) for arm, rows in best.groupby("arm")}
    found["Exponent in n of the best learning rate"] = pd.DataFrame(slope, ["exponent", "95 %"]).T.round(2)
    return found


def write(source: Path, out: Path) -> str:
    """Write summaries of the runs in ``source``, or read stored ones; write and return the tables, and draw the plots."""
    if (source / RECORDS).exists():
        records = load(source / RECORDS)
        # A run that diverged counts as ten times as bad as one that learned nothing.
        records["log_loss"] = np.log(records.loss.clip(1e-12, 10))
        for name, summary in SUMMARIES.items():
            write_text(out / f"{name}.csv", summary(records).to_csv(index=False, float_format="%.6g"))
        source = out
    found = [pd.read_csv(source / f"{name}.csv") for name in SUMMARIES]
    text = ""
    for (task, steps), cells in found[1].groupby(KEYS):
        mine = [rows[(rows.task == task) & (rows.steps == steps)] for rows in found]
        text += f"{task}: widths {cells.width.min()} to {cells.width.max()}, {cells.seeds.max()} seeds, {steps} steps, r 8\n\n"
        for title, rows in tables(*mine).items():
            text += f"{title}\n{rows.to_string(float_format='{:.5g}'.format, na_rep='-')}\n\n"
        lines = {arm: rows.pivot(index="lr", columns="width") for arm, rows in cells.drop(columns=KEYS).groupby("arm")}
        shrinking = {"shrinking steps (median)": "shrinks", "share of A that they left": "a_left"}
        rows = {label: {arm: lines[arm][name] for arm in STABLE} for label, name in shrinking.items()}
        title = f"When shrinking stops within {steps} steps, and what it has done by then"
        panels(rows, title, out / f"{task}_latch.png", colormap="viridis")
        losses = {arm: lines[arm].loss for arm in (ADAMW, NEAR_ZERO, LORA_PLUS, STABLE[-1])}
        panels(
            {"held-out loss": losses},
            "Held-out loss by width",
            out / f"{task}_learning_rates.png",
            colormap="viridis",
            logy=True,
        )
    write_text(out / "table.txt", text)
    return text
