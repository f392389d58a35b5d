"""Tables and CSV files of ``benchmarks.lab.paper``'s runs."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common.intervals import interval
from benchmarks.common.tables import aligned, csv_text, rounded, write_files
from benchmarks.lab.paper import ablations
from benchmarks.lab.paper.scores import (
    FALLEN,
    SCREENING,
    Records,
    arm_and_rate,
    by_seed,
    fallen,
    fisher,
    headline,
    plain,
    rates,
    run_of,
    same_rate,
    score,
    seeds,
    settings,
)
from benchmarks.lab.paper.training import ADAMW

# Every run's record; the command can continue from it elsewhere.
RECORDS = "records.jsonl.gz"
# The interval of so few runs is wider than the scale.
FEW = 2


def _points(value: float, loss: bool, decimals: int = 1, sign: str = "") -> str:
    """Points of accuracy; or a loss in nats, the negated score, with two more decimals."""
    return format(-value if loss else 100 * value, f"{sign}.{decimals + 2 * loss}f")


def _interval(value: float, half: float, loss: bool, decimals: int = 1, sign: str = "") -> str:
    """With half the width of its interval, unless that is nan."""
    size = "" if math.isnan(half) else f" ± {_points(-half if loss else half, loss, decimals)}"
    return _points(value, loss, decimals, sign) + size


def _by_rate(title: str, rows: Records, text: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table of rows with an arm and a learning rate: a line for each arm, a column for each rate."""
    lrs = sorted({row["lr"] for row in rows})
    cells = [[title, *(f"lr {lr:g}" for lr in lrs)]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = {row["lr"]: text(row) for row in rows if row["arm"] == arm}
        cells.append([arm, *(mine.get(lr, "-") for lr in lrs)])
    return aligned(cells) if rows else []


def rate_table(records: Records, loss: bool) -> list[str]:
    def text(row: dict[str, Any]) -> str:
        shrunk = "" if row["a_left"] is None else f" ({100 * row['a_left']:.0f} % of A)"
        return f"{_points(row['test'], loss)}{shrunk}"

    return _by_rate("arm", rates(records), text)


def same_rate_table(records: Records, loss: bool) -> list[str]:
    def text(row: dict[str, Any]) -> str:
        half = row["difference_95"] if row["seeds"] > FEW else math.nan
        return _interval(row["difference"], half, loss, sign="+")

    return _by_rate("minus AdamW at the same rate", same_rate(records), text)


def fallen_table(records: Records, loss: bool) -> list[str]:
    """How many runs broke at each rate, Fisher's p against AdamW's (unless no count could pass at 5 %), and the others' score.
    Empty if no run broke."""
    groups: dict[tuple[str, float], list[float]] = {
        key: [score(run, "test") for run in mine.values()] for key, mine in by_seed(records, arm_and_rate).items()
    }
    bound = FALLEN.get(records[0]["run"]["task"], -math.inf)
    lrs = sorted({lr for _, lr in fallen(records)})
    broken = f"above {-bound:g} nats" if loss else f"below {100 * bound:.0f} %"
    cells = []
    for arm in sorted({arm for arm, _ in groups}):
        texts = []
        for lr in lrs:
            scores = groups.get((arm, lr), [])
            others = [score for score in scores if score >= bound]
            mean, half = interval(others) if len(others) > FEW else (sum(others) / max(1, len(others)), math.nan)
            reached = f", {_interval(mean, half, loss)}" if others else ""
            fell, beside = len(scores) - len(others), groups.get((ADAMW, lr), [])
            chance = ""
            if arm != ADAMW and fisher(len(scores), len(scores), 0, len(beside)) < 0.05:
                chance = f" (p {fisher(fell, len(scores), sum(score < bound for score in beside), len(beside)):.2f})"
            texts.append(f"{fell} of {len(scores)}{chance}{reached}" if scores else "-")
        cells.append([arm, *texts])
    tested = ", Fisher's p against AdamW's" if any("(p " in text for row in cells for text in row) else ""
    header = [f"runs {broken}{tested}, and the others", *(f"lr {lr:g}" for lr in lrs)]
    return aligned([header, *cells]) if lrs else []


def headline_table(rows: Records, loss: bool) -> list[str]:
    cells = [["optimizer at its best", "lr", "seeds", "test", "minus AdamW's", "p", "A left", "step, ms", "state, KiB"]]
    for row in rows:
        difference = p = "-"
        if "difference" in row:
            difference = _interval(row["difference"], row["difference_95"], loss, 2, "+")
            p = f"{row['p']:.3f} ({row['pairs']})"
        left = "-" if row["a_left"] is None else f"{100 * row['a_left']:.0f} %"
        cells.append(
            [row["arm"], f"{row['lr']:g}", str(row["seeds"]), _interval(row["test"], row["test_95"], loss), difference, p,
             left, f"{row['optimizer_ms']:.2f}", f"{row['state_bytes'] / 1024:,.0f}"]
        )  # fmt: skip
    return aligned(cells)


def ablation_table(rows: Records) -> list[str]:
    heads = [
        "model, task",
        "arm",
        "lr",
        "changed",
        "seeds",
        "test",
        "minus unchanged",
        "minus AdamW's",
        "||A|| / start",
    ]
    cells = [[*heads, "state, KiB"]]
    for row in rows:
        loss = row["task"] == "plays"
        differences = [
            "-" if row[key] is None else _interval(row[key], row[f"{key}_95"], loss, 2, "+")
            for key in ("difference", "minus_adamw")
        ]
        cells.append(
            [f"{row['model']}, {row['task']}", row["arm"], f"{row['lr']:g}", ablations.change(row), str(row["seeds"]),
             _interval(row["test"], row["test_95"], loss), *differences, f"{row['a_over_start']:.3f}",
             f"{row['state_bytes'] / 1024:,.0f}"]
        )  # fmt: skip
    return aligned(cells, left=2)


def table(records: Records) -> str:
    lines: list[str] = []
    for setting in settings(records):
        mine, loss = plain(records, setting), setting.task == "plays"
        if not mine:
            continue
        what = "loss, nats a token (less is better)," if loss else "accuracy, %"
        lines += [
            f"{setting}, r 8, query and value: {what} on test examples",
            "",
            f"Every arm and learning rate, means over {seeds(mine)}",
            *rate_table(mine, loss),
            "",
            *([*beside, ""] if (beside := same_rate_table(mine, loss)) else []),
            *([*broken, ""] if (broken := fallen_table(mine, loss)) else []),
        ]
        if chosen := headline(mine):
            lines += [
                f"Learning rate and lambda chosen on validation examples, {SCREENING} seeds; differences seed by seed, 95 % "
                "intervals, p by sign flips",
                *headline_table(chosen, loss),
                "",
            ]
    if rows := ablations.rows(records):
        lines += [
            "One thing changed at a time, learning rate and lambda as chosen above; differences seed by seed",
            *ablation_table(rows),
        ]
    return "\n".join(lines) + "\n"


def flat(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        row = asdict(run_of(record)) | {"diverged": record["diverged"]}
        for split in ("validation", "test"):
            row |= {f"{split}_{name}": (record[split] or {}).get(name) for name in ("loss", "accuracy")}
        row["train_loss"] = record["train_loss"][-1] if record["train_loss"] else None
        row |= {key: record.get(key) for key in ("shrinks", "a_left", "a_over_start", "b_norm", "latched", "pairs")}
        row |= {key: record.get(key) for key in ("seconds", "optimizer_ms", "state_bytes")}
        rows.append(rounded(row, 5))
    return rows


def write(records: Records, out: Path) -> list[Path]:
    rows = [setting._asdict() | row for setting in settings(records) for row in headline(plain(records, setting))]
    at_rates = [setting._asdict() | row for setting in settings(records) for row in rates(plain(records, setting))]
    files = {
        "table.txt": table(records),
        "runs.csv": csv_text(flat(records)),
        "rates.csv": csv_text(at_rates),
        "headline.csv": csv_text(rows),
        "ablations.csv": csv_text(ablations.rows(records)),
        RECORDS: "".join(json.dumps(record, sort_keys=True) + "\n" for record in records),
    }
    return write_files(out, files)


def read_records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
