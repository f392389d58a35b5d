"""Tables and plots of ``benchmarks.research paper``: accuracies in percent or losses in nats, differences seed by seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.common.intervals import interval
from benchmarks.common.tables import write_text
from benchmarks.research.finetune import ADAMW, Run
from benchmarks.research.paper import SETTING, best
from benchmarks.research.plots import panels
from benchmarks.research.runner import RECORDS, load

NOTHING = "nothing"
MEANS = ["shrinks", "latched", "a_left", "a_over_start", "optimizer_ms", "state_bytes"]
# Below this score training has broken: little more accuracy than always answering one class (42 to 50 %); for the plays, a loss
# above SmolLM2's before any training. At small learning rates, little is learned yet.
FALLEN = {"sarcasm": 0.6, "reuters-52": 0.5, "plays": -4.086}
Rows = Iterator[dict[str, Any]]


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with an arm's name, what an ablation changed, and whether the run broke."""
    defaults = Run._field_defaults
    rows = runs.to_dict("records")
    changes = [
        ", ".join(f"{name} {row[name]}" for name in Run._fields[9:] if row[name] != defaults[name]) for row in rows
    ]
    arms = [f"{row['optimizer']} {row['shrink_ratio']:g}" if row["shrink_ratio"] else row["optimizer"] for row in rows]
    return runs.assign(
        arm=arms, changed=[change or NOTHING for change in changes], fell=runs.test < runs.task.map(FALLEN)
    )


def summary(mine: pd.DataFrame, **bases: pd.DataFrame) -> dict[str, Any]:
    """Means over seeds; the test score, and its differences from the bases' over the seeds that both have, with half the width of
    their 95 % intervals, and p by flips of signs."""
    unit = -1 if mine.task.iloc[0] == "plays" else 100
    row: dict[str, Any] = {"seeds": len(mine), "fell": mine.fell.sum(), "test": unit * mine.test.mean()}
    row["test_95"] = abs(unit) * interval(mine.test)[1]
    for name, base in bases.items():
        found = unit * (mine.set_index("seed").test - base.set_index("seed").test).dropna()
        row |= {name: found.mean()}
        # Of two seeds an interval says nothing.
        if len(found) > 2:
            flips = stats.permutation_test((found,), np.mean, permutation_type="samples", n_resamples=2 ** len(found))
            row |= {f"{name}_95": interval(found)[1], f"{name}_pairs": len(found), f"{name}_p": flips.pvalue}
    return row | mine[MEANS].mean().to_dict()


def rates(runs: pd.DataFrame) -> Rows:
    """Every arm and learning rate, its difference from AdamW at the same rate, and Fisher's p of how many runs broke."""
    runs = runs[runs.changed == NOTHING]
    for (arm, lr), mine in runs.groupby(["arm", "lr"]):
        adamw = runs[(runs.arm == ADAMW) & (runs.lr == lr)]
        fell = stats.fisher_exact([[part.fell.sum(), (~part.fell).sum()] for part in (mine, adamw)]).pvalue
        yield {"arm": arm, "lr": lr, "fell_p": fell} | summary(mine, minus_adamw=adamw[adamw.arm != arm])


def headline(runs: pd.DataFrame) -> Rows:
    """Each optimizer at its best, and its difference from AdamW at AdamW's best. Nothing of a single rate: none was chosen."""
    runs = runs[runs.changed == NOTHING]
    chosen = best(runs) if runs.lr.nunique() > 1 else {}
    at = {name: runs[(runs.optimizer == name) & (runs[["shrink_ratio", "lr"]] == key).all(axis=1)] for name, key in chosen.items()}
    for name, mine in at.items():
        adamw = at.get(ADAMW, mine)
        yield {"arm": mine.arm.iloc[0], "lr": mine.lr.iloc[0]} | summary(
            mine, minus_adamw=adamw[adamw.optimizer != name]
        )


def ablations(runs: pd.DataFrame) -> Rows:
    """Each changed arm after the unchanged one on the same seeds: differences from that, and from AdamW with the same change."""
    changed = runs[runs.changed != NOTHING]
    adamw = runs[(runs.arm == ADAMW) & runs.lr.isin(changed.lr[changed.arm == ADAMW])]
    for (arm, lr), mine in changed.groupby(["arm", "lr"]):
        same = runs[(runs.arm == arm) & (runs.lr == lr) & runs.seed.isin(mine.seed)]
        # The unchanged arm compares with AdamW's best only if a changed one compares too.
        beside = adamw if arm != ADAMW and adamw.changed.isin(mine.changed).any() else adamw[:0]
        for change in (NOTHING, *mine.changed.unique()):
            base = same[(same.changed == NOTHING) & (change != NOTHING)]
            bases = {"minus_unchanged": base, "minus_adamw": beside[beside.changed == change]}
            yield {"arm": arm, "lr": lr, "changed": change} | summary(same[same.changed == change], **bases)


TABLES = {
    "Every arm and learning rate": rates,
    "Rate and ratio chosen on validation examples": headline,
    "One thing changed at a time": ablations,
}


def write(source: Path, out: Path) -> str:
    """Write the tables of the runs in ``source`` as CSV files and as text, which is returned, and draw the plots."""
    runs, text, files = described(load(source / RECORDS)), "", defaultdict(list)
    for setting, mine in runs.groupby(SETTING):
        names = dict(zip(SETTING, setting, strict=True))
        text += f"{', '.join(f'{name} {value}' for name, value in names.items())}; r 8 on query and value unless changed\n\n"
        for title, make in TABLES.items():
            rows = pd.DataFrame(make(mine)).dropna(axis=1, how="all")
            if len(rows):
                files[make.__name__].append(rows.assign(**names))
                text += f"{title}\n{rows.to_string(index=False, float_format='{:.5g}'.format, na_rep='-')}\n\n"
        every = files["rates"][-1]
        if every.lr.nunique() > 1:
            lines = every.pivot(index="lr", columns="arm")
            measure = "loss, nats a token" if names["task"] == "plays" else "accuracy, %"
            # A run that broke is off by tens of points and would hide the others.
            near = lines.minus_adamw.where(lines.fell + lines.fell[[ADAMW]].values == 0)
            panels(
                {f"test {measure}": {"means over seeds": lines.test}, "minus AdamW's": {"where no run broke": near}},
                f"{names['model']} on {names['task']}",
                out / f"{'_'.join(map(str, setting))}.png",
            )
    for name, frames in files.items():
        write_text(out / f"{name}.csv", pd.concat(frames).to_csv(index=False, float_format="%.6g"))
    write_text(out / "table.txt", text)
    return text
