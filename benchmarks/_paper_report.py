"""Tables, CSV and plots of ``benchmarks.paper``'s runs."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._paper_runs import ADAMW, OPTIMIZERS, Run
from benchmarks._statistics import interval
from benchmarks.report import aligned, write_csv, write_text, write_zipped

Records = Sequence[dict[str, Any]]
# Every run's record, from which the command can go on elsewhere.
RECORDS = "records.jsonl.gz"
COSTS = ("optimizer_ms", "seconds", "state_bytes")
# What the fields that ablations change are by default.
PLAIN = {"r": 8, "targets": "query-value", "stop_condition": "norm", "adapters": "fp32", "rounding": "stochastic"}


def run_of(record: dict[str, Any]) -> Run:
    return Run(**record["run"])


class Setting(NamedTuple):
    """What runs have in common that are compared with each other."""

    model: str
    task: str
    dtype: str
    steps: int


def setting_of(record: dict[str, Any]) -> Setting:
    return Setting(*(record["run"][name] for name in Setting._fields))


def plain(records: Records, setting: Setting) -> list[dict[str, Any]]:
    """The runs of a setting that no ablation has changed."""
    return [
        record
        for record in records
        if setting_of(record) == setting and all(record["run"][name] == value for name, value in PLAIN.items())
    ]


def score(record: dict[str, Any], split: str) -> float:
    """Accuracy; of language modelling, the loss turned around, so that more is better. A run that diverged has the worst."""
    found = record[split]
    if found is None:
        return 0.0 if record["run"]["task"] != "plays" else -20.0
    return found["accuracy"] if found["accuracy"] is not None else -found["loss"]


def best(records: Records, screening: int) -> dict[str, tuple[float, float]]:
    """For each optimizer the learning rate and shrink ratio that are best on validation examples, over the first seeds."""
    groups: dict[tuple[str, float, float], list[float]] = defaultdict(list)
    for record in records:
        run = run_of(record)
        if run.seed < screening:
            groups[run.optimizer, run.lr, run.shrink_ratio].append(score(record, "validation"))
    found: dict[str, tuple[float, float]] = {}
    for name in OPTIMIZERS:
        mine = {
            key[1:]: statistics.fmean(values)
            for key, values in groups.items()
            if key[0] == name and len(values) == screening
        }
        if mine:
            found[name] = max(mine, key=lambda key: mine[key])
    return found


def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p of a mean as large, were every difference as likely of either sign."""
    size = abs(sum(differences))
    signs = product((1, -1), repeat=len(differences))
    return statistics.fmean(
        abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= size - 1e-12 for row in signs
    )


def means(records: Iterable[dict[str, Any]], *keys: str) -> dict[str, float | None]:
    """Over the records that have it; None where none has."""
    values = {key: [record[key] for record in records if key in record] for key in keys}
    return {key: statistics.fmean(found) if found else None for key, found in values.items()}


def headline(records: Records, screening: int) -> list[dict[str, Any]]:
    """Each optimizer at its best, and its difference from AdamW at AdamW's best, seed by seed."""
    chosen = best(records, screening)
    scores = {
        name: {
            run_of(r).seed: r
            for r in records
            if (run_of(r).optimizer, run_of(r).lr, run_of(r).shrink_ratio) == (name, *key)
        }
        for name, key in chosen.items()
    }
    rows = []
    for name, (lr, ratio) in chosen.items():
        mine = scores[name]
        mean, half = interval([score(r, "test") for r in mine.values()])
        row: dict[str, Any] = {
            "optimizer": name,
            "arm": Run("", "", name, lr, ratio).arm,
            "lr": lr,
            "shrink_ratio": ratio,
            "seeds": len(mine),
            "test": mean,
            "test_95": half,
        }
        shared = [seed for seed in mine if seed in scores.get(ADAMW, {})]
        if name != ADAMW and len(shared) > 1:
            differences = [score(mine[seed], "test") - score(scores[ADAMW][seed], "test") for seed in shared]
            row["difference"], row["difference_95"] = interval(differences)
            row["pairs"], row["p"] = len(shared), sign_flip(differences)
        row |= means(mine.values(), "shrinks", "a_left", "a_over_start", "b_norm", *COSTS)
        rows.append(row)
    return rows


def rates(records: Records) -> list[dict[str, Any]]:
    """Validation and test score of every arm and learning rate."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[run_of(record).arm, run_of(record).lr].append(record)
    rows = []
    for (arm, lr), mine in sorted(groups.items()):
        row: dict[str, Any] = {"arm": arm, "lr": lr, "seeds": len(mine), "diverged": sum(r["diverged"] for r in mine)}
        for split in ("validation", "test"):
            row[split], row[f"{split}_95"] = interval([score(r, split) for r in mine])
        rows.append(row | means(mine, "shrinks", "a_left", "a_over_start"))
    return rows


def same_rate(records: Records) -> list[dict[str, Any]]:
    """Every arm less AdamW at the same learning rate, seed by seed."""
    scores: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for record in records:
        run = run_of(record)
        scores[run.arm, run.lr][run.seed] = score(record, "test")
    rows = []
    for (arm, lr), mine in sorted(scores.items()):
        base = scores.get((ADAMW, lr), {})
        shared = [seed for seed in mine if seed in base]
        if arm != ADAMW and shared:
            difference, half = interval([mine[seed] - base[seed] for seed in shared])
            rows.append({"arm": arm, "lr": lr, "seeds": len(shared), "difference": difference, "difference_95": half})
    return rows


def _points(value: float, loss: bool, spec: str = ".1f") -> str:
    return format(-value, "+.3f" if spec.startswith("+") else ".3f") if loss else format(100 * value, spec)


def _interval(value: float, half: float, loss: bool, spec: str = ".1f") -> str:
    """With half the width of its interval, where there is one."""
    size = "" if math.isnan(half) else f" ± {_points(-half if loss else half, loss, spec.lstrip('+'))}"
    return _points(value, loss, spec) + size


def rate_table(records: Records, loss: bool) -> list[str]:
    rows = rates(records)
    lrs = sorted({row["lr"] for row in rows})
    cells = [["arm", *(f"lr {lr:g}" for lr in lrs)]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = {row["lr"]: row for row in rows if row["arm"] == arm}
        texts = []
        for lr in lrs:
            if lr not in mine:
                texts.append("-")
                continue
            row = mine[lr]
            shrunk = "" if row["a_left"] is None else f" ({100 * row['a_left']:.0f} % of A)"
            texts.append(f"{_points(row['test'], loss)}{shrunk}")
        cells.append([arm, *texts])
    return aligned(cells)


def same_rate_table(records: Records, loss: bool) -> list[str]:
    rows = same_rate(records)
    lrs = sorted({row["lr"] for row in rows})
    cells = [["minus AdamW at the same rate", *(f"lr {lr:g}" for lr in lrs)]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = {row["lr"]: row for row in rows if row["arm"] == arm}
        cells.append([arm, *(_points(mine[lr]["difference"], loss, "+.1f") if lr in mine else "-" for lr in lrs)])
    return aligned(cells)


def headline_table(rows: Records, loss: bool) -> list[str]:
    cells = [["optimizer at its best", "lr", "seeds", "test", "minus AdamW's", "p", "A left", "step, ms", "state, KiB"]]
    for row in rows:
        difference = p = "-"
        if "difference" in row:
            difference = _interval(row["difference"], row["difference_95"], loss, "+.2f")
            p = f"{row['p']:.3f} ({row['pairs']})"
        left = "-" if row["a_left"] is None else f"{100 * row['a_left']:.0f} %"
        cells.append(
            [row["arm"], f"{row['lr']:g}", str(row["seeds"]), _interval(row["test"], row["test_95"], loss), difference, p, left,
             f"{row['optimizer_ms']:.2f}", f"{row['state_bytes'] / 1024:,.0f}"]
        )  # fmt: skip
    return aligned(cells)


def settings(records: Records) -> list[Setting]:
    return list(dict.fromkeys(map(setting_of, records)))


def ablation_rows(records: Records) -> list[dict[str, Any]]:
    """Runs with a field of PLAIN changed, grouped by all but the seed, each after what it was changed from, over the same seeds;
    with the difference from that seed by seed."""
    groups: dict[Run, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        run = run_of(record)
        groups[replace(run, seed=0)][run.seed] = record
    changed = {run: {name: getattr(run, name) for name in PLAIN if getattr(run, name) != PLAIN[name]} for run in groups}
    rows = []
    for plain_run in dict.fromkeys(replace(run, **PLAIN) for run in groups if changed[run]):
        mine = [run for run in groups if replace(run, **PLAIN) == plain_run and changed[run]]
        seeds = sorted({seed for run in mine for seed in groups[run]})
        base = {seed: groups[plain_run][seed] for seed in seeds if seed in groups.get(plain_run, {})}
        rows += [_ablation_row(plain_run, base, {}, {})] if base else []
        rows += [_ablation_row(run, groups[run], base, changed[run]) for run in mine]
    return rows


def _ablation_row(
    run: Run, mine: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], changed: dict[str, Any]
) -> dict[str, Any]:
    mean, half = interval([score(record, "test") for record in mine.values()])
    row: dict[str, Any] = {"model": run.model, "task": run.task, "arm": run.arm, "lr": run.lr}
    row |= {name: changed.get(name) for name in PLAIN} | {"seeds": len(mine), "test": mean, "test_95": half}
    shared = [seed for seed in mine if seed in base]
    differences = [score(mine[seed], "test") - score(base[seed], "test") for seed in shared]
    row["difference"], row["difference_95"] = interval(differences) if len(shared) > 1 else (None, None)
    return row | means(mine.values(), "shrinks", "a_left", "a_over_start", *COSTS)


def ablation_table(rows: Records) -> list[str]:
    cells = [["model, task", "arm", "lr", "changed", "seeds", "test", "minus unchanged", "||A|| / start", "state, KiB"]]
    for row in rows:
        loss = row["task"] == "plays"
        changed = ", ".join(f"{name} {row[name]}" for name in PLAIN if row[name] is not None) or "nothing"
        difference = "-"
        if row["difference"] is not None:
            difference = _interval(row["difference"], row["difference_95"], loss, "+.2f")
        cells.append(
            [f"{row['model']}, {row['task']}", row["arm"], f"{row['lr']:g}", changed, str(row["seeds"]),
             _interval(row["test"], row["test_95"], loss), difference, f"{row['a_over_start']:.3f}",
             f"{row['state_bytes'] / 1024:,.0f}"]
        )  # fmt: skip
    return aligned(cells, left=2)


def table(records: Records, screening: int) -> str:
    lines: list[str] = []
    for setting in settings(records):
        mine, loss = plain(records, setting), setting.task == "plays"
        if not mine:
            continue
        what = "held-out loss, nats a token" if loss else "accuracy, %"
        lines += [
            f"{setting.model} on {setting.task}, {setting.dtype}, {setting.steps} steps, r 8, query and value: "
            f"{what} on test examples",
            "",
            f"Every arm and learning rate, means over seeds (the first {screening}, more where it was chosen)",
            *rate_table(mine, loss),
            "",
            *same_rate_table(mine, loss),
            "",
            f"Learning rate and lambda chosen on validation examples, {screening} seeds; differences seed by seed, 95 % "
            "intervals, p by sign flips",
            *headline_table(headline(mine, screening), loss),
            "",
        ]
    if rows := ablation_rows(records):
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
        for key in (
            "shrinks",
            "a_left",
            "a_over_start",
            "b_norm",
            "latched",
            "pairs",
            "seconds",
            "optimizer_ms",
            "state_bytes",
        ):
            row[key] = record.get(key)
        rows.append({name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in row.items()})
    return rows


def write(records: Records, out: Path, screening: int) -> list[Path]:
    from benchmarks import _paper_plots

    rows = [
        setting._asdict() | row for setting in settings(records) for row in headline(plain(records, setting), screening)
    ]
    write_text(out / "table.txt", table(records, screening))
    write_csv(out / "runs.csv", flat(records))
    write_csv(out / "headline.csv", rows)
    write_csv(out / "ablations.csv", ablation_rows(records))
    write_zipped(out / RECORDS, "".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
    names = ("table.txt", "runs.csv", "headline.csv", "ablations.csv", RECORDS)
    return [out / name for name in names] + _paper_plots.draw(records, out, screening)


def read_records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
