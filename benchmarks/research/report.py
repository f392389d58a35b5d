"""Tables and plots of both studies, from the rows of their runs.

Of ``paper``: accuracies in percent or losses in nats, and differences seed by seed. Of
``stability``: summaries in CSV files, which are stored without the runs, and tables of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.common.intervals import interval, log_slope
from benchmarks.common.plot_style import STYLE, plt, save
from benchmarks.common.tables import write_text
from benchmarks.research.paper import CHANGEABLE, COLUMNS, SETTING, Run, best
from benchmarks.research.runner import RECORDS, load
from benchmarks.research.stability import ADAMW, ARMS, GRID, LORA_PLUS, NEAR_ZERO, PARTS

NOTHING = "nothing"
# Below this score training has broken: little more accuracy than always answering one class (42 to
# 50 %); for the plays, a loss above SmolLM2's before any training. At small learning rates, little
# is learned yet.
FALLEN = {"sarcasm": 0.6, "reuters-52": 0.5, "plays": -4.086}


def panels(rows: dict[str, dict[str, Any]], title: str, path: Path, **look: Any) -> None:
    """A row of panels for each label of the y axis, and in it a panel for each title: a DataFrame's
    columns against the rate.
    """
    width, height = max(map(len, rows.values())), len(rows)
    look |= {
        "style": "o-",
        "markersize": 3,
        "logx": True,
        "legend": False,
        "xlabel": "learning rate",
    }
    with plt.rc_context(
        STYLE | {"figure.figsize": (2.6 * max(width, 3) + 1.6, 3.2 * height + 0.5)}
    ):
        figure, axes = plt.subplots(
            height, width, layout="constrained", squeeze=False, sharey="row"
        )
        for line, (label, frames) in zip(axes, rows.items(), strict=True):
            for axis, (name, frame) in zip(line, frames.items(), strict=True):
                frame.plot(ax=axis, title=name, ylabel=label, **look)
        figure.suptitle(title, fontweight="bold")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        save(figure, path)


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with an arm's name, what an ablation changed, and whether the run broke."""
    rows, plain = runs.to_dict("records"), {name: Run._field_defaults[name] for name in CHANGEABLE}
    changes = [
        ", ".join(f"{name} {row[name]}" for name in plain if row[name] != plain[name]) or NOTHING
        for row in rows
    ]
    arms = [
        f"{row['optimizer']} {row['shrink_ratio']:g}" if row["shrink_ratio"] else row["optimizer"]
        for row in rows
    ]
    return runs.assign(arm=arms, changed=changes, fell=runs.test < runs.task.map(FALLEN))


def summary(mine: pd.DataFrame, **bases: pd.DataFrame) -> dict[str, Any]:
    """Means over seeds; the test score, and its differences from the bases' over the seeds that
    both have, with half the width of their 95 % intervals, and p by flips of signs.
    """
    unit = -1 if mine.task.iloc[0] == "plays" else 100
    row: dict[str, Any] = {
        "seeds": len(mine),
        "fell": mine.fell.sum(),
        "test": unit * mine.test.mean(),
    }
    row["test_95"] = abs(unit) * interval(mine.test)[1]
    for name, base in bases.items():
        found = unit * (mine.set_index("seed").test - base.set_index("seed").test).dropna()
        row |= {name: found.mean()}
        # Of two seeds an interval says nothing.
        if len(found) > 2:
            flips = stats.permutation_test(
                (found,), np.mean, permutation_type="samples", n_resamples=2 ** len(found)
            )
            row |= {
                f"{name}_95": interval(found)[1],
                f"{name}_pairs": len(found),
                f"{name}_p": flips.pvalue,
            }
    return row | mine[[*COLUMNS[2:]]].mean().to_dict()


def rates(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Every arm and learning rate, its difference from AdamW at the same rate, and Fisher's p of
    how many runs broke.
    """
    runs = runs[runs.changed == NOTHING]
    for (arm, lr), mine in runs.groupby(["arm", "lr"]):
        adamw = runs[(runs.arm == ADAMW) & (runs.lr == lr)]
        fell = stats.fisher_exact(
            [[part.fell.sum(), (~part.fell).sum()] for part in (mine, adamw)]
        ).pvalue
        yield {"arm": arm, "lr": lr, "fell_p": fell} | summary(
            mine, minus_adamw=adamw[adamw.arm != arm]
        )


def headline(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Each optimizer at its best, and its difference from AdamW at AdamW's best. Nothing of a
    single rate: none was chosen.
    """
    runs = runs[runs.changed == NOTHING]
    chosen = best(runs) if runs.lr.nunique() > 1 else {}
    groups = dict(list(runs.groupby(["optimizer", "shrink_ratio", "lr"])))
    adamw = groups[(ADAMW, *chosen[ADAMW])] if ADAMW in chosen else runs[:0]
    for name, key in chosen.items():
        mine = groups[(name, *key)]
        yield {"arm": mine.arm.iloc[0], "lr": key[1]} | summary(
            mine, minus_adamw=adamw[adamw.optimizer != name]
        )


def ablations(runs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Each changed arm after the unchanged one on the same seeds: differences from that, and from
    AdamW with the same change.
    """
    changed = runs[runs.changed != NOTHING]
    adamw = runs[(runs.arm == ADAMW) & runs.lr.isin(changed.lr[changed.arm == ADAMW])]
    for (arm, lr), mine in changed.groupby(["arm", "lr"]):
        same = runs[(runs.arm == arm) & (runs.lr == lr) & runs.seed.isin(mine.seed)]
        # The unchanged arm compares with AdamW's best only if a changed one compares too.
        beside = adamw if arm != ADAMW and adamw.changed.isin(mine.changed).any() else adamw[:0]
        for change in (NOTHING, *mine.changed.unique()):
            base = same[(same.changed == NOTHING) & (change != NOTHING)]
            bases = {"minus_unchanged": base, "minus_adamw": beside[beside.changed == change]}
            yield {"arm": arm, "lr": lr, "changed": change} | summary(
                same[same.changed == change], **bases
            )


TABLES = {
    "Every arm and learning rate": rates,
    "Rate and ratio chosen on validation examples": headline,
    "One thing changed at a time": ablations,
}


def write_paper(source: Path, out: Path) -> str:
    """Write the tables of the runs in ``source`` as CSV files and as text, which is returned, and
    draw the plots.
    """
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
            rows = {
                f"test {measure}": {"means over seeds": lines.test},
                "minus AdamW's": {"where no run broke": near},
            }
            panels(
                rows,
                f"{names['model']} on {names['task']}",
                out / f"{'_'.join(map(str, setting))}.png",
            )
    for name, frames in files.items():
        write_text(out / f"{name}.csv", pd.concat(frames).to_csv(index=False, float_format="%.6g"))
    write_text(out / "table.txt", text)
    return text


KEYS = ["task", "steps"]
STABLE = [arm for arm in ARMS if ARMS[arm].shrink_ratio]


def exponents(records: pd.DataFrame) -> pd.DataFrame:
    """The exponent in n of each part's size, and half the width of its 95 % interval over widths
    and seeds.
    """
    rows, keys = [], [*KEYS, "step", "law", "arm"]
    for key, mine in records[records.step.notna()].groupby(keys):
        row = dict(zip(keys, key, strict=True))
        for part in PARTS:
            row[part], row[f"{part}_95"] = log_slope(mine.width, mine[part]) or (None, None)
        rows.append(row)
    return pd.DataFrame(rows)


def grid(records: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss (geometric mean) and shrinking steps (median) over seeds, and the share of A
    that shrinking left.

    ``bound`` is the fewest steps that B needs to reach A from PEFT's start.
    """
    groups = records[records.law == GRID].groupby([*KEYS, "arm", "width", "lr"], as_index=False)
    rows = groups.agg(
        loss=("log_loss", "mean"),
        shrinks=("shrinks", "median"),
        latched=("latched", "sum"),
        seeds=("seed", "size"),
    )
    kept = 1 - rows.arm.map(lambda arm: ARMS[arm].shrink_ratio)
    bound = 1 / (np.sqrt(3 * rows.width) * rows.lr)
    return rows.assign(loss=np.exp(rows.loss), bound=bound, a_left=kept**rows.shrinks)


def best_lrs(records: pd.DataFrame) -> pd.DataFrame:
    """Each arm's learning rate with the least loss, and the ratio to AdamW's least with its 95 %
    interval, seed by seed.
    """
    rows = []
    for (task, steps, width), mine in records[records.law == GRID].groupby([*KEYS, "width"]):
        losses = mine.pivot(index="seed", columns=["arm", "lr"], values="log_loss")
        best = losses.mean().groupby("arm").idxmin()
        for arm, column in best.items():
            mean, half = interval((losses[column] - losses[best[ADAMW]]).dropna())
            row = {
                "task": task,
                "steps": steps,
                "width": width,
                "arm": arm,
                "lr": column[1],
                "seeds": len(losses),
            }
            ratios = {"ratio": mean, "ratio_low": mean - half, "ratio_high": mean + half}
            rows.append(
                row
                | {
                    name: np.exp(x)
                    for name, x in ({"loss": losses[column].mean()} | ratios).items()
                }
            )
    return pd.DataFrame(rows)


SUMMARIES = {"exponents": exponents, "grid": grid, "best_lr": best_lrs}


def tables(
    slopes: pd.DataFrame, cells: pd.DataFrame, best: pd.DataFrame
) -> Iterator[tuple[str, pd.DataFrame]]:
    steps = sorted(slopes.step.unique())
    for step in dict.fromkeys((1, max(step for step in steps if step <= 20), steps[-1])):
        rows = slopes[slopes.step == step].set_index(["law", "arm"]).drop(columns=[*KEYS, "step"])
        yield (
            f"Exponents at step {step:g}, and half the width of their 95 % intervals",
            rows.round(2),
        )
    yield "The grid of learning rates, with the largest ratio", cells[cells.arm == STABLE[-1]]
    yield (
        "At the best learning rate: loss, and its ratio to AdamW's",
        best.set_index(["arm", "width"]).sort_index(),
    )
    slope = {
        arm: log_slope(rows.width, rows.lr) or (np.nan, np.nan) for arm, rows in best.groupby("arm")
    }
    yield (
        "Exponent in n of the best learning rate",
        pd.DataFrame(slope, ["exponent", "95 %"]).T.round(2),
    )


def write_stability(source: Path, out: Path) -> str:
    """Write summaries of the runs in ``source``, or read stored ones; write and return the tables,
    and draw the plots.
    """
    if (source / RECORDS).exists():
        records = load(source / RECORDS)
        # A run that diverged counts as ten times as bad as one that learned nothing.
        records["log_loss"] = np.log(records.loss.clip(1e-12, 10))
        for name, summary in SUMMARIES.items():
            write_text(
                out / f"{name}.csv", summary(records).to_csv(index=False, float_format="%.6g")
            )
        source = out
    found = [pd.read_csv(source / f"{name}.csv") for name in SUMMARIES]
    text = ""
    look = {"colormap": "viridis"}
    for (task, steps), cells in found[1].groupby(KEYS):
        text += f"{task}: widths {cells.width.min()} to {cells.width.max()}, {cells.seeds.max()} seeds, {steps} steps, r 8\n\n"
        for title, rows in tables(
            *(rows[(rows.task == task) & (rows.steps == steps)] for rows in found)
        ):
            text += f"{title}\n{rows.to_string(float_format='{:.5g}'.format, na_rep='-')}\n\n"
        lines = {
            arm: rows.pivot(index="lr", columns="width")
            for arm, rows in cells.drop(columns=KEYS).groupby("arm")
        }
        left = {"shrinking steps (median)": "shrinks", "share of A that they left": "a_left"}
        rows = {label: {arm: lines[arm][name] for arm in STABLE} for label, name in left.items()}
        panels(
            rows,
            f"Shrinking within {steps} steps, a line for each width",
            out / f"{task}_latch.png",
            **look,
        )
        rows = {
            "held-out loss": {
                arm: lines[arm].loss for arm in (ADAMW, NEAR_ZERO, LORA_PLUS, STABLE[-1])
            }
        }
        panels(rows, "A line for each width", out / f"{task}_learning_rates.png", logy=True, **look)
    write_text(out / "table.txt", text)
    return text
