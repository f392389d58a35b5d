"""The summary of a run of ``benchmarks.lab.gpu``: verdicts on the targets, failures, regret, losses, times, and the clock."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.common.records import COLUMNS
from benchmarks.lab.gpu.rows import FAILED, INTERRUPTED, OK, Row

# A timing's modes, and the parts of a forward that are timed beside its kernels.
GRAPH, EAGER = "graph", "eager"
PRODUCT, VENDOR, S_ALONE = PARTS = ("our product alone", "vendor's product alone", "S alone")
MET, MISSED, UNKNOWN = "met", "missed", "not measured"
SHAPE = ["m", "n_out", "k", "r", "dropout", "phase", "mode"]
# What a row may lack, besides COLUMNS and SHAPE.
USED = ("test", "note", "figure", "waits", "throttle", "sm_mhz", "state", "dtype", "chosen_forward", "chosen_backward")
# Targets of times: words, numerator and denominator, phase, M, dropout, and the least and the most that is right.
MANY, FEW = (2048, 4096, 8192), (1, 16, 64)
RATIOS = (
    ("forward+backward, M 2k to 8k, dropout 0.1: eager over ours, at least 1.4", "eager LoRA/ours", "both", MANY, 0.1, 1.4, 1e9),
    ("the same: ours over the frozen layer, at most 1.12", "ours/frozen nn.Linear", "both", MANY, 0.1, 0, 1.12),
    ("backward, the same: eager LoRA over ours, at least 1.2", "eager LoRA/ours", "backward", MANY, 0.1, 1.2, 1e9),
    ("forward, M 1, 16, 64, no dropout: ours over frozen, at most 1.1", "ours/frozen nn.Linear", "forward", FEW, 0.0, 0, 1.1),
)  # fmt: skip
# Targets of counts: words, the test and its cases, the column, and the only right or the highest figure.
LAUNCHES, STEP = "test_a_call_launches_what_explain_lists", "test_a_step_of_many_tensors_is_one_launch"
COUNTS = (
    ("forward, M 1, 16, 64, no dropout: launches, 1", LAUNCHES, [f"{m}-0.0-forward" for m in FEW], "figure", 1),
    ("step of an 8B model's 448 tensors: launches, 1", STEP, [""], "figure", 1),
    ("step of an 8B model's 448 tensors: synchronizations, 0", STEP, [""], "waits", 0),
    ("forward+backward, M 8k: GiB of memory traffic, at most 1", "test_fewer_bytes_than_eager", [""], "figure", 1),
)  # fmt: skip


def verdict(words: str, values: Sequence[float], count: int, least: float, most: float) -> str:
    """Return whether a target is met: one bad figure misses it, ``count`` good ones meet it."""
    bad = any(not least <= value <= most for value in values)
    result = MISSED if bad else MET if len(values) >= count else UNKNOWN
    return f"{result}: {words}: {', '.join(f'{value:.4g}' for value in values)}"


def targets(rows: pd.DataFrame, times: pd.DataFrame) -> list[str]:
    """Return the verdicts. A size is 4096 x 4096 at rank 16 unless a target says something else."""
    layer = times.query("section == 'layer' and n_out == 4096 and k == 4096 and r == 16 and mode == @GRAPH")
    found = []
    for words, ratio, phase, sizes, dropout, least, most in RATIOS:
        some = layer[(layer.phase == phase) & (layer.dropout == dropout) & layer.m.isin(sizes)]
        one, other = (some[some.arm == arm].set_index("m")["median"] for arm in ratio.split("/"))
        found.append(verdict(words, (one / other).dropna().tolist(), 3, least, most))
    cases_of = rows.case.astype(object).fillna("")
    for words, test, cases, column, most in COUNTS:
        values = rows[(rows.test == test) & cases_of.isin(cases)][column].dropna().tolist()
        found.append(verdict(words, values, len(cases), 0, most))
    step = times.query(
        "section == 'step' and mode == @GRAPH and role == 'ours' and state == 'shrinking' and dtype == 'float32'"
    )
    words = "step of an 8B model's 448 tensors in a graph, float32: us, at most 410"
    return [*found, verdict(words, step["median"].tolist(), 1, 0, 410)]


def losses(times: pd.DataFrame) -> pd.DataFrame:
    """Return where a rival is faster than the fastest of ours, worst first. The frozen layer is no rival."""
    key = ["section", "case", "phase", "mode"]
    ours = times[times.role == "ours"].groupby(key)["median"].min().rename("ours")
    rivals = times[times.role == "rival"].join(ours, on=key)
    lost = rivals.assign(ratio=rivals.ours / rivals["median"]).query("ratio > 1")
    return lost.sort_values("ratio", ascending=False)[[*key, "arm", "median", "ours", "ratio"]]


def regrets(times: pd.DataFrame) -> pd.DataFrame:
    """Return by direction how much longer dispatch's kernel takes than the best, less 1: calls, mean and worst."""
    kernels = times[(times.section == "layer") & (times.role == "") & ~times.arm.isin(PARTS) & (times.phase != "both")]
    best = kernels.groupby(["case", "phase"])["median"].transform("min")
    chosen = kernels.chosen_forward.where(kernels.phase == "forward", kernels.chosen_backward) == kernels.arm
    return (kernels["median"] / best - 1)[chosen].groupby(kernels.phase).agg(["size", "mean", "max"])


def failures(rows: pd.DataFrame) -> str:
    """Return a line for each failed row: its name and the last line of its note."""
    failed = rows[rows.status == FAILED][["section", "test", "case", "arm", "note"]].astype(object).fillna("")
    last = [note.strip().split("\n")[-1][:160] for note in failed.pop("note")]
    return "\n".join(f"{' '.join(names)}: {note}" for names, note in zip(failed.to_numpy(), last, strict=True))


def page(rows: pd.DataFrame, machine: Row, dry: bool) -> str:
    """Return the text of summary.md."""
    rows = rows.reindex(columns=[*dict.fromkeys([*rows, *COLUMNS, *SHAPE, *USED])])
    times = rows[(rows.metric == "us") & (rows.status == OK)]
    tests = rows[(rows.section == "bringup") & rows.test.notna()]
    products = times[times.arm.isin(PARTS)].pivot_table("median", "case", "arm").reindex(columns=PARTS)
    others = times[times.section != "layer"].pivot_table("median", ["section", "case", "phase", "mode", "arm"])
    # A dry run's tiny shapes are not the targets', but its counts could be mistaken for figures.
    verdicts = [f"{UNKNOWN} (dry): {line.split(': ', 1)[1]}" if dry else line for line in targets(rows, times)]
    parts = {
        "Targets": "\n".join(verdicts),
        "The first tests, in order up to the first that failed": count(tests, "test"),
        "Failed": failures(rows) or "nothing",
        "The product and S alone, us": products.assign(rate=products[VENDOR] / products[PRODUCT]).to_string(),
        "The tables' choice against the best kernel (regret)": regrets(times).to_string(),
        "Where we lose, us: the worst": losses(times).head(30).to_string(index=False),
        "MLPs, projections, training steps, optimizers, us": others.to_string(),
        "Clock, MHz, and reasons for a lower one": f"{times.sm_mhz.describe().to_string()}\n{times.throttle.value_counts()}",
        "Sections": count(rows, "section"),
        "Machine": "\n".join(f"{key}: {value}" for key, value in machine.items()),
    }
    first = "DRY RUN on a CPU: NOTHING HERE IS A MEASUREMENT." if dry else f"Measured on {machine['gpu']}."
    if (rows.status == INTERRUPTED).any():
        first += " INTERRUPTED: what was not reached is missing."
    blocks = [f"## {head}\n\n```\n{text}\n```\n" for head, text in parts.items()]
    return "\n".join([f"# {first}\n", *blocks])


def count(rows: pd.DataFrame, column: str) -> str:
    """Return how many rows have each status, by ``column`` in order of appearance."""
    return pd.crosstab(rows[column], rows.status).reindex(rows[column].unique()).to_string()
