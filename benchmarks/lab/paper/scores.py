"""Scores, choices and differences, seed by seed, from the records of ``benchmarks.lab.paper``'s runs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from benchmarks.common.intervals import interval
from benchmarks.lab.paper.training import ADAMW, OPTIMIZERS, Run, arm_of

Key = TypeVar("Key")
Records = Sequence[dict[str, Any]]
# Runs that differ in nothing but the seed.
Seeds = dict[int, dict[str, Any]]
# Seeds of the screening, which chooses what gets further seeds.
SCREENING = 2
COSTS = ("optimizer_ms", "seconds", "state_bytes")
# Below this score training has broken: little more accuracy than always answering one class (42 to 50 %); for the plays, a loss
# above SmolLM2's before any training (``--preset untrained``).
FALLEN = {"sarcasm": 0.6, "reuters-52": 0.5, "plays": -4.086}
# Defaults of the fields that ablations change.
PLAIN = {"r": 8, "targets": "query-value", "stop_condition": "norm", "adapters": "fp32", "rounding": "stochastic"}


def run_of(record: dict[str, Any]) -> Run:
    return Run(**record["run"])


def by_seed(records: Records, key: Callable[[Run], Key]) -> dict[Key, Seeds]:
    """Groups of runs with equal keys, in the order of the keys' first runs."""
    groups: dict[Key, Seeds] = defaultdict(dict)
    for record in records:
        run = run_of(record)
        groups[key(run)][run.seed] = record
    return groups


def arm_and_rate(run: Run) -> tuple[str, float]:
    return run.arm, run.lr


class Setting(NamedTuple):
    """What all compared runs share."""

    model: str
    task: str
    dtype: str
    steps: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.model} on {self.task}, {self.dtype}, {self.steps} step{'s' * (self.steps > 1)}, batch {self.batch_size}"


def setting_of(record: dict[str, Any]) -> Setting:
    return Setting(*(record["run"][name] for name in Setting._fields))


def settings(records: Records) -> list[Setting]:
    return sorted(set(map(setting_of, records)))


def plain(records: Records, setting: Setting) -> list[dict[str, Any]]:
    """The runs of a setting without ablations."""
    return [
        record
        for record in records
        if setting_of(record) == setting and all(record["run"][name] == value for name, value in PLAIN.items())
    ]


def score(record: dict[str, Any], split: str) -> float:
    """Accuracy, or the negated loss of language modeling: more is better. A run that diverged has the worst."""
    found = record[split]
    if found is None:
        return 0.0 if record["run"]["task"] != "plays" else -20.0
    return found["accuracy"] if found["accuracy"] is not None else -found["loss"]


def best(records: Records) -> dict[str, tuple[float, float]]:
    """Each optimizer's best learning rate and shrink ratio on validation examples, over the first seeds. Optimizers with an
    incomplete screening are left out."""
    groups = by_seed([record for record in records if record["run"]["seed"] < SCREENING], chosen_by_screening)
    found: dict[str, tuple[float, float]] = {}
    for name in OPTIMIZERS:
        mine = {key[1:]: [*group.values()] for key, group in groups.items() if key[0] == name}
        # Rates that already have their seeds must not win because others have none yet.
        if mine and all(len(runs) == SCREENING for runs in mine.values()):
            found[name] = max(mine, key=lambda key: statistics.fmean(score(run, "validation") for run in mine[key]))
    return found


def chosen_by_screening(run: Run) -> tuple[str, float, float]:
    return run.optimizer, run.lr, run.shrink_ratio


def differences(mine: Seeds, base: Seeds) -> list[float]:
    """Test scores minus the base's, over the seeds that both have."""
    return [score(record, "test") - score(base[seed], "test") for seed, record in mine.items() if seed in base]


def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p value of the mean, if either sign of every difference is equally likely."""
    size = abs(sum(differences))
    signs = product((1, -1), repeat=len(differences))
    return statistics.fmean(
        abs(sum(s * d for s, d in zip(row, differences, strict=True))) >= size - 1e-12 for row in signs
    )


def fisher(some: int, of: int, others: int, of_others: int) -> float:
    """Fisher's exact two-sided p value of two counts, if the chance is the same."""
    total, hits = of + of_others, some + others
    ways = [
        math.comb(of, k) * math.comb(of_others, hits - k) for k in range(max(0, hits - of_others), min(of, hits) + 1)
    ]
    mine = math.comb(of, some) * math.comb(of_others, others)
    return sum(way for way in ways if way <= mine) / math.comb(total, hits)


def means(records: Iterable[dict[str, Any]], *keys: str) -> dict[str, float | None]:
    """Means over the records that have a key; None if no record has it."""
    values = {key: [record[key] for record in records if key in record] for key in keys}
    return {key: statistics.fmean(found) if found else None for key, found in values.items()}


def headline(records: Records) -> list[dict[str, Any]]:
    """Each optimizer at its best, and its difference from AdamW at AdamW's best, seed by seed. Nothing of a single rate: none was
    chosen."""
    if len({record["run"]["lr"] for record in records}) < 2:
        return []
    groups, chosen, rows = by_seed(records, chosen_by_screening), best(records), []
    for name, (lr, ratio) in chosen.items():
        mine = groups[name, lr, ratio]
        mean, half = interval([score(r, "test") for r in mine.values()])
        row: dict[str, Any] = {"optimizer": name, "arm": arm_of(name, ratio), "lr": lr, "shrink_ratio": ratio}
        row |= {"seeds": len(mine), "test": mean, "test_95": half}
        base = groups[(ADAMW, *chosen[ADAMW])] if ADAMW in chosen else {}
        if name != ADAMW and len(found := differences(mine, base)) > 1:
            row["difference"], row["difference_95"] = interval(found)
            row["pairs"], row["p"] = len(found), sign_flip(found)
        row |= means(mine.values(), "shrinks", "a_left", "a_over_start", "b_norm", *COSTS)
        rows.append(row)
    return rows


def rates(records: Records) -> list[dict[str, Any]]:
    """Validation and test score of every arm and learning rate."""
    rows = []
    for (arm, lr), group in sorted(by_seed(records, arm_and_rate).items(), key=itemgetter(0)):
        mine = [*group.values()]
        row: dict[str, Any] = {"arm": arm, "lr": lr, "seeds": len(mine), "diverged": sum(r["diverged"] for r in mine)}
        for split in ("validation", "test"):
            row[split], row[f"{split}_95"] = interval([score(r, split) for r in mine])
        rows.append(row | means(mine, "shrinks", "latched", "a_left", "a_over_start"))
    return rows


def seeds(records: Records) -> str:
    """The range of seeds over arms and learning rates, as ``"2 to 10 seeds"``."""
    counts = [row["seeds"] for row in rates(records)]
    few, many = min(counts), max(counts)
    return f"{few if few == many else f'{few} to {many}'} seed{'s' if many > 1 else ''}"


def same_rate(records: Records) -> list[dict[str, Any]]:
    """Every arm minus AdamW at the same learning rate, seed by seed."""
    groups, rows = by_seed(records, arm_and_rate), []
    for (arm, lr), mine in sorted(groups.items(), key=itemgetter(0)):
        found = differences(mine, groups.get((ADAMW, lr), {}))
        if arm != ADAMW and found:
            difference, half = interval(found)
            rows.append({"arm": arm, "lr": lr, "seeds": len(found), "difference": difference, "difference_95": half})
    return rows


def fallen(records: Records) -> set[tuple[str, float]]:
    """The arms and learning rates at which a run broke. Below an arm's best rate, as few right answers are not learned yet; at
    a rate of zero nothing is."""
    highest: dict[str, float] = {}
    best_lr: dict[str, float] = {}
    for row in rates(records):
        if row["validation"] > highest.get(row["arm"], -math.inf):
            highest[row["arm"]], best_lr[row["arm"]] = row["validation"], row["lr"]
    runs = [(run_of(record), score(record, "test")) for record in records]
    return {
        (run.arm, run.lr)
        for run, value in runs
        if value < FALLEN.get(run.task, -math.inf) and run.lr >= best_lr[run.arm] and run.lr > 0
    }
