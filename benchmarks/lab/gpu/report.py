"""The summary of a run of ``benchmarks.lab.gpu``: verdicts on the targets, failures, regret,
losses, times, and the clock.
"""

from __future__ import annotations

import pandas as pd

from benchmarks.common.records import COLUMNS
from benchmarks.lab.gpu.parts import DIFFERENCES
from benchmarks.lab.gpu.rows import FAILED, INTERRUPTED, OK, Row

# The sections of the first tests, in order.
FIRST = ("smoke", "doctor", "kernels", "launches")
# A timing's modes; and the phases of a layer that is taken apart: many launches in a graph, or one.
GRAPH, EAGER = "graph", "eager"
MANY_LAUNCHES, ONE_LAUNCH = "many launches", "one launch"
MET, MISSED, UNKNOWN = "met", "missed", "not measured"
MANY, FEW = (2048, 4096, 8192), (1, 16, 64)
# What a row may lack, besides records' COLUMNS.
USED = (
    "m", "n_out", "k", "r", "dropout", "mode", "test", "note", "figure", "waits", "throttle", "sm_mhz", "state", "dtype",
)  # fmt: skip
# Rows of which targets speak: ours in CUDA graphs, 4096 x 4096 at rank 16; and of tests.
LAYER = "section in ('headline', 'layer') and arm == 'ours' and mode == 'graph' and n_out == 4096 and k == 4096 and r == 16"
BACKWARD = f"{LAYER} and dropout == 0.1 and m in {MANY} and phase == 'backward'"
FORWARD = f"{LAYER} and dropout == 0 and m in {FEW} and phase == 'forward'"
LAUNCHES, BYTES = "test_a_call_launches_what_explain_lists", "test_fewer_bytes_than_eager"
STEP = "test == 'test_a_step_of_many_tensors_is_one_launch'"
STEP_IN_GRAPH = "section == 'step' and mode == 'graph' and role == 'ours' and state == 'shrinking' and dtype == 'float32'"
# Words, rows, a column, the least and the most that is right, and the number of figures.
TARGETS = (
    (
        "backward, M 2k to 8k, dropout 0.1: eager LoRA over ours >= 1.2",
        BACKWARD,
        "eager_over",
        1.2,
        1e9,
        3,
    ),
    (
        "with forward: eager LoRA over ours >= 1.4",
        BACKWARD.replace("backward", "both"),
        "eager_over",
        1.4,
        1e9,
        3,
    ),
    (
        "with forward: ours over frozen <= 1.12",
        BACKWARD.replace("backward", "both"),
        "over_frozen",
        0,
        1.12,
        3,
    ),
    (
        "forward, M 1, 16, 64, no dropout: ours over frozen <= 1.1",
        FORWARD,
        "over_frozen",
        0,
        1.1,
        3,
    ),
    (
        "the same: 1 launch",
        f"test == '{LAUNCHES}' and case in {[f'{m}-0.0-forward' for m in FEW]}",
        "figure",
        1,
        1,
        3,
    ),
    (
        "forward+backward, M 8k, dropout 0.1: GiB of memory traffic <= 1",
        f"test == '{BYTES}'",
        "figure",
        0,
        1,
        1,
    ),
    (
        "step of an 8B model's 448 tensors, float32, in a graph: us <= 410",
        STEP_IN_GRAPH,
        "median",
        0,
        410,
        1,
    ),
    ("step of 448 tensors: 1 launch", STEP, "figure", 1, 1, 1),
    ("step of 448 tensors: 0 synchronizations", STEP, "waits", 0, 0, 1),
)


def targets(rows: pd.DataFrame) -> list[str]:
    """Return verdicts: one bad figure misses a target, and so many good ones meet it."""
    times = rows[rows.metric.isna() | (rows.metric == "us")]
    key, found = ["section", "case", "phase", "mode"], []
    for arm in ("eager LoRA", "frozen nn.Linear"):
        times = times.join(times[times.arm == arm].set_index(key)["median"].rename(arm), on=key)
    ratios = {
        "eager_over": times["eager LoRA"] / times["median"],
        "over_frozen": times["median"] / times["frozen nn.Linear"],
    }
    times = times.assign(**ratios)
    for words, query, column, least, most, count in TARGETS:
        values = times.query(query)[column].dropna()
        result = MET if len(values) >= count else UNKNOWN
        result = result if values.between(least, most).all() else MISSED
        found.append(f"{result}: {words}: {', '.join(f'{value:.4g}' for value in values)}")
    return found


def headline(times: pd.DataFrame) -> str:
    """Return the medians of the headline's arms, in microseconds, and as shares of the frozen
    layer's: forward, backward and both.
    """
    timed = times[(times.section == "headline") & (times["mode"] == GRAPH)]
    if timed.empty:
        return UNKNOWN
    us = timed.pivot_table("median", ["phase", "arm"], ["dropout", "m"], sort=False)
    blocks = [us.round(1).to_string()]
    if "frozen nn.Linear" in us.index.get_level_values("arm"):
        frozen = us.xs("frozen nn.Linear", level="arm")
        whole = us[us.index.get_level_values("phase").isin(frozen.index)]
        blocks.append(
            f"Over the frozen layer:\n{whole.div(frozen, level='phase').round(3).to_string()}"
        )
    return "\n\n".join(blocks)


def job(rows: pd.DataFrame) -> str:
    """Return the job's figures, a column for each arm."""
    of_job = rows[(rows.section == "job") & rows.metric.notna()]
    if of_job.empty:
        return UNKNOWN
    wide = of_job.pivot_table("median", ["phase", "metric"], "arm", sort=False)
    return wide.to_string(float_format=lambda value: f"{value:.4g}")


def losses(times: pd.DataFrame) -> pd.DataFrame:
    """Return where a rival is faster than the fastest of ours, worst first. The frozen layer is no
    rival.
    """
    key = ["section", "case", "phase", "mode"]
    ours = times[times.role == "ours"].groupby(key)["median"].min().rename("ours")
    rivals = times[times.role == "rival"].join(ours, on=key)
    lost = rivals.assign(ratio=rivals.ours / rivals["median"]).query("ratio > 1")
    return lost.sort_values("ratio", ascending=False)[[*key, "arm", "median", "ours", "ratio"]]


def regrets(times: pd.DataFrame) -> pd.DataFrame:
    """Return by direction how much longer dispatch's strategy takes than the fastest, less 1: calls,
    mean and worst.
    """
    timed = times[
        (times.section == "layer")
        & (times["mode"] == GRAPH)
        & times.phase.isin(["forward", "backward"])
    ]
    key = ["case", "phase"]
    fastest = timed[timed.role == ""].groupby(key)["median"].min()
    ours = timed[timed.arm == "ours"].set_index(key)["median"]
    return (ours / fastest - 1).groupby("phase").agg(["size", "mean", "max"])


def taken_apart(times: pd.DataFrame) -> pd.DataFrame:
    """Return the times of the launches of layers that are taken apart, and differences of two; us.
    A launch is timed in a graph of many, and alone.
    """
    us = times[times.section == "apart"].pivot_table(
        "median", "arm", ["dropout", "m", "phase"], sort=False
    )
    for name, (more, less) in DIFFERENCES.items():
        if {more, less} <= {*us.index}:
            us.loc[name] = us.loc[more] - us.loc[less]
    return us.round(2)


def failures(rows: pd.DataFrame) -> str:
    """Return a line for each failed row: its name and the last line of its note."""
    failed = (
        rows[rows.status == FAILED][["section", "test", "case", "arm", "note"]]
        .astype(object)
        .fillna("")
    )
    last = [note.strip().split("\n")[-1][:160] for note in failed.pop("note")]
    return "\n".join(
        f"{' '.join(names)}: {note}" for names, note in zip(failed.to_numpy(), last, strict=True)
    )


def page(rows: pd.DataFrame, machine: Row, dry: bool) -> str:
    """Return the text of summary.md."""
    rows = rows.reindex(columns=[*dict.fromkeys([*rows, *COLUMNS, *USED])])
    times = rows[(rows.metric == "us") & (rows.status == OK)]
    tests = rows[rows.section.isin(FIRST) & rows.test.notna()]
    versions = rows[rows.section == "versions"][["case", "note"]].fillna("")
    others = times[~times.section.isin(["headline", "layer", "apart"])].pivot_table(
        "median", ["section", "case", "phase", "mode", "arm"]
    )
    # A dry run's figures could be mistaken for measurements.
    verdicts = [f"{UNKNOWN} (dry): {words}" for words, *_ in TARGETS] if dry else targets(rows)
    clock = "unknown: there is no NVIDIA GPU, or nvidia-ml-py is not installed"
    if times.sm_mhz.notna().any():
        clock = f"{times.sm_mhz.describe().to_string()}\n{times.throttle.value_counts()}"
    parts = {
        "Versions": "\n".join(versions.agg("\n".join, axis=1)).strip(),
        "The headline, us": headline(times),
        "The job: python -m benchmarks": job(rows),
        "Targets": "\n".join(verdicts),
        "The first tests, in order up to the first that failed": count(tests, "test"),
        "Failed": failures(rows) or "nothing",
        "A layer taken apart, us": taken_apart(times).to_string(),
        "The table's choice against the best strategy (regret)": regrets(times).to_string(),
        "Where we lose, us: the worst": losses(times).head(30).to_string(index=False),
        "MLPs, projections, training steps, optimizers, us": others.to_string(),
        "Clock, MHz, and reasons for a lower one": clock,
        "Sections": count(rows, "section"),
        "Machine": "\n".join(f"{key}: {value}" for key, value in machine.items()),
    }
    first = (
        "DRY RUN on a CPU: NOTHING HERE IS A MEASUREMENT."
        if dry
        else f"Measured on {machine['gpu']}."
    )
    if (rows.status == INTERRUPTED).any():
        first += " INTERRUPTED: what was not reached is missing."
    blocks = [f"## {head}\n\n```\n{text}\n```\n" for head, text in parts.items()]
    return "\n".join([f"# {first}\n", *blocks])


def count(rows: pd.DataFrame, column: str) -> str:
    """Return how many rows have each status, by ``column`` in order of appearance."""
    return pd.crosstab(rows[column], rows.status).reindex(rows[column].unique()).to_string()
