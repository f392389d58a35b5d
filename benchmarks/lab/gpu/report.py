"""The summary of a run of ``benchmarks.lab.gpu``: verdicts on the targets, failures, losses, regret, times, and the clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from benchmarks.common.records import COLUMNS
from benchmarks.lab.gpu.rows import FAILED, INTERRUPTED, OK, Row

# The mode of a timing, and the parts of a forward that regret times beside its kernels.
GRAPH, EAGER = "graph", "eager"
PRODUCT, VENDOR, S_ALONE = PARTS = "our product alone", "vendor's product alone", "S alone"
MET, MISSED, UNKNOWN = "met", "missed", "not measured"
FEW, MANY = (1, 16, 64), (2048, 4096, 8192)
SHAPE = ["m", "n_out", "k", "r", "dropout", "phase", "mode"]
USED = (
    "section",
    "test",
    "status",
    "note",
    "figure",
    "waits",
    "throttle",
    "sm_mhz",
    "chosen_forward",
    "chosen_backward",
)
Verdict = tuple[str, str, str]


def verdict(words: str, values: Sequence[float], count: int, holds: Callable[[float], bool], show: str) -> Verdict:
    """Return a target's words, whether it is met, and its figures. One bad figure misses it; ``count`` good ones meet it."""
    figures = ", ".join(show.format(value) for value in values)
    if any(not holds(value) for value in values):
        return words, MISSED, figures
    return words, MET if len(values) >= count else UNKNOWN, figures


def targets(rows: pd.DataFrame) -> list[Verdict]:
    times = rows[(rows.section == "layer") & (rows.metric == "us")]
    layer = times.pivot_table("median", SHAPE, "arm").reindex(columns=["frozen", "eager", "ours"]).reset_index()
    layer = layer.query("n_out == 4096 and k == 4096 and r == 16 and mode == @GRAPH")

    def ratio(one: str, other: str, phase: str, sizes: Sequence[int], p: float) -> list[float]:
        found = layer[(layer.phase == phase) & layer.m.isin(sizes) & (layer.dropout == p)]
        return (found[one] / found[other]).dropna().tolist()

    def figures(test: str, cases: Sequence[str], column: str = "figure") -> list[float]:
        return rows[(rows.test == test) & rows.case.isin(cases)][column].dropna().tolist()

    launches, step = "test_a_call_launches_what_explain_lists", "test_a_step_of_many_tensors_is_one_launch"
    steps = rows[(rows.section == "step") & (rows.metric == "us") & (rows["mode"] == GRAPH)]
    ms = steps[(steps.state == "shrinking") & (steps.dtype == "float32") & (steps.role == "ours")]["median"] / 1e3
    both = "forward+backward, r 16, dropout 0.1, 4096x4096, M 2k, 4k, 8k: "
    few = "forward, M 1, 16, 64, no dropout: "
    one = [f"{m}-0.0-forward" for m in FEW]
    found: list[tuple[str, list[float], int, Callable[[float], bool], str]] = [
        (both + ">= 1.40x eager LoRA", ratio("eager", "ours", "both", MANY, 0.1), 3, lambda v: v >= 1.4, "{:.2f}x"),
        (both + "<= 1.12x frozen", ratio("ours", "frozen", "both", MANY, 0.1), 3, lambda v: v <= 1.12, "{:.2f}x"),
        ("backward, the same: >= 1.2x eager LoRA", ratio("eager", "ours", "backward", MANY, 0.1), 3, lambda v: v >= 1.2, "{:.2f}x"),
        (few + "<= 1.1x frozen", ratio("ours", "frozen", "forward", FEW, 0.0), 3, lambda v: v <= 1.1, "{:.2f}x"),
        (few + "one launch", figures(launches, one), 3, lambda v: v == 1, "{:g}"),
        ("DRAM, forward+backward at 8192x4096x4096: <= 1.0 GiB", figures("test_fewer_bytes_from_and_to_memory_than_eager", [""]), 1, lambda v: v <= 1.0, "{:.3f} GiB"),
        ("step of an 8B model's 448 tensors, fp32, in a graph: <= 0.41 ms", ms.tolist(), 1, lambda v: v <= 0.41, "{:.3f} ms"),
        ("448-tensor step: one launch", figures(step, [""]), 1, lambda v: v == 1, "{:g}"),
        ("448-tensor step: no synchronization", figures(step, [""], "waits"), 1, lambda v: v == 0, "{:g}"),
    ]  # fmt: skip
    return [verdict(*target) for target in found]


def losses(times: pd.DataFrame) -> pd.DataFrame:
    """Return where a rival is faster than the fastest of ours, worst first. The frozen layer is no rival."""
    key = ["section", "case", "phase", "mode"]
    ours = times[times.role == "ours"].groupby(key)["median"].min().rename("ours")
    rivals = times[times.role == "rival"].join(ours, on=key)
    lost = rivals.assign(ratio=rivals.ours / rivals["median"]).query("ratio > 1 and section != 'regret'")
    return lost.sort_values("ratio", ascending=False)[[*key, "arm", "median", "ours", "ratio"]]


def regrets(times: pd.DataFrame) -> pd.DataFrame:
    """Return by direction how much longer dispatch's kernel takes than the best: calls, mean and worst."""
    found = times[(times.section == "regret") & ~times.arm.isin(PARTS) & (times.phase != "both")]
    best = found.groupby(["case", "phase"])["median"].transform("min")
    chosen = found.chosen_forward.where(found.phase == "forward", found.chosen_backward) == found.arm
    return (found["median"] / best - 1)[chosen].groupby(found.phase).agg(["size", "mean", "max"])


def products(times: pd.DataFrame) -> pd.DataFrame:
    """Return by shape the microseconds of a forward's parts, and our product's share of the vendor's rate."""
    parts = times[(times.section == "regret") & times.arm.isin(PARTS)]
    table = parts.pivot_table("median", "case", "arm")
    return table.assign(rate=table[VENDOR] / table[PRODUCT]) if {VENDOR, PRODUCT} <= {*table} else table


def stages(rows: pd.DataFrame) -> str:
    """Return the bring-up's tests in order, with the first that failed: what came behind it was not run."""
    tests = rows[(rows.section == "bringup") & rows.test.notna()]
    table = pd.crosstab(tests.test, tests.status).reindex(tests.test.unique())
    failed = tests[tests.status == FAILED].test
    return f"{table.to_string()}\n" + (f"The bring-up stops at {failed.iloc[0]}." if len(failed) else "Nothing failed.")


def failures(rows: pd.DataFrame) -> str:
    """Return a line for each failed row: its name and the last line of its note."""
    failed = rows[rows.status == FAILED][["section", "test", "case", "arm", "note"]].fillna("")
    return "\n".join(f"{' '.join(names)}: {note.strip().splitlines()[-1][:160]}" for *names, note in failed.to_numpy())


def page(rows: pd.DataFrame, machine: Row, dry: bool) -> str:
    """Return the text of summary.md."""
    rows = rows.reindex(columns=[*rows, *dict.fromkeys((*COLUMNS, *SHAPE, *USED)).keys() - {*rows}])
    times = rows[(rows.metric == "us") & (rows.status == OK)]
    verdicts = [
        f"{UNKNOWN if dry else result}: {words}{'' if dry else ': ' + figures}"
        for words, result, figures in targets(rows)
    ]
    clocks = f"{times.sm_mhz.min()} to {times.sm_mhz.max()} MHz\n{times.throttle.value_counts().to_string()}"
    others = times[~times.section.isin(["layer", "regret"])].pivot_table(
        "median", ["section", "case", "phase", "mode"], "arm"
    )
    parts = {
        "Targets": "\n".join(verdicts),
        "The first tests": stages(rows),
        "Failed": failures(rows) or "nothing",
        "The product alone, and S alone, us": products(times).to_string(),
        "The tables' choice against the best kernel (regret)": regrets(times).to_string(),
        "Where we lose, us: the worst of all timings": losses(times).head(30).to_string(index=False),
        "Gated MLPs, projections, training steps and optimizers, us": others.stack().unstack().to_string(),
        "Clock": clocks,
        "Sections": pd.crosstab(rows.section, rows.status).reindex(rows.section.unique()).to_string(),
        "Machine": "\n".join(f"{key}: {value}" for key, value in machine.items()),
    }
    first = f"Measured on {machine['gpu']}."
    if dry:
        first = "DRY RUN in Triton's interpreter on a CPU: NOTHING HERE IS A MEASUREMENT."
    interrupted = " INTERRUPTED: what was not reached is missing." if (rows.status == INTERRUPTED).any() else ""
    blocks = [f"## {head}\n\n```\n{text}\n```\n" for head, text in parts.items()]
    return "\n".join([f"# {first}{interrupted}\n", *blocks])
