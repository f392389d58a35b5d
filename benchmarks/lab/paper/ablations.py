"""Effects of one change at a time in ``benchmarks.lab.paper``'s runs: rank, target modules, stop condition, rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.common.intervals import interval
from benchmarks.lab.paper.scores import COSTS, PLAIN, Records, Seeds, by_seed, differences, means, score
from benchmarks.lab.paper.training import ADAMW, Run


def rows(records: Records) -> list[dict[str, Any]]:
    """Runs with a field of PLAIN changed, grouped by all but the seed, each after what it was changed from, over the same seeds;
    with the differences from that, and from AdamW with the same thing changed, seed by seed."""
    groups = by_seed(records, lambda run: replace(run, seed=0))
    changed = [run for run in groups if run != replace(run, **PLAIN)]
    found = []
    for plain_run in dict.fromkeys(replace(run, **PLAIN) for run in changed):
        mine = sorted(
            (run for run in changed if replace(run, **PLAIN) == plain_run),
            key=lambda run: [(getattr(run, name) != PLAIN[name], getattr(run, name)) for name in reversed(PLAIN)],
        )
        seeds = {seed for run in mine for seed in groups[run]}
        base = {seed: record for seed, record in groups.get(plain_run, {}).items() if seed in seeds}
        adamw = {run: _adamw(run, changed, groups) for run in mine}
        if base:
            # Compare with AdamW's best only if a changed run is compared too.
            beside = _adamw(plain_run, changed, groups) if any(adamw.values()) else {}
            found.append(_row(plain_run, base, {}, beside))
        found += [_row(run, groups[run], base, adamw[run]) for run in mine]
    return found


def _adamw(run: Run, changed: list[Run], groups: dict[Run, Seeds]) -> Seeds:
    """AdamW's runs with the same change as ``run``, at the learning rate of AdamW's ablations."""
    if run.optimizer == ADAMW:
        return {}
    for lr in dict.fromkeys(other.lr for other in changed if other.optimizer == ADAMW):
        other = replace(run, optimizer=ADAMW, shrink_ratio=0.0, lr=lr)
        if other in groups:
            return groups[other]
    return {}


def _row(run: Run, mine: Seeds, base: Seeds, adamw: Seeds) -> dict[str, Any]:
    mean, half = interval([score(record, "test") for record in mine.values()])
    row: dict[str, Any] = {name: getattr(run, name) for name in ("model", "task", "optimizer", "arm", "lr")}
    row |= {name: getattr(run, name) if getattr(run, name) != PLAIN[name] else None for name in PLAIN}
    row |= {"seeds": len(mine), "test": mean, "test_95": half}
    row["difference"], row["difference_95"] = _difference(mine, base)
    row["minus_adamw"], row["minus_adamw_95"] = _difference(mine, adamw)
    return row | means(mine.values(), "shrinks", "a_left", "a_over_start", *COSTS)


def _difference(mine: Seeds, base: Seeds) -> tuple[float | None, float | None]:
    found = differences(mine, base)
    return interval(found) if len(found) > 1 else (None, None)


def change(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]}" for name in PLAIN if row[name] is not None) or "nothing"
