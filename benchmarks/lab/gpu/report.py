"""The end of ``benchmarks.lab.gpu``: how far the first kernels came, verdicts on the targets, and summary.md."""

from __future__ import annotations

import operator
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.common.tables import aligned
from benchmarks.lab.gpu.correctness import STAGES
from benchmarks.lab.gpu.section import DRY, FAILED, NOT_REACHED, OK, SKIPPED, Row

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
Verdict = tuple[str, str, str]
# The parts of a forward that ``regret`` times beside its kernels.
PRODUCT, VENDOR, S_ALONE = "our product alone", "vendor's product alone", "S alone"
# Lines of a list that are printed, but of those printed whole. summary.md has all of them.
PRINTED, WHOLE = 8, ("Targets", "The first kernels")
TARGET = {"n": 4096, "k": 4096, "r": 16}
FEW, MANY = (1, 16, 64), (2048, 4096, 8192)


class Outcome(NamedTuple):
    """What a section has: its rows, the seconds it took, and why it ended if not by itself."""

    rows: list[Row]
    seconds: float
    problem: str


def pick(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Return the rows that have a figure and these values."""
    return [row for row in rows if row.get("status") == OK and all(row.get(key) == v for key, v in values.items())]


def verdict(words: str, values: Sequence[float], count: int, holds: Callable[[float], bool], show: str) -> Verdict:
    """Return a target's words, whether it is met, and its figures. One bad figure misses it; ``count`` good ones meet it."""
    figures = ", ".join(show.format(value) for value in values)
    if any(not holds(value) for value in values):
        return words, MISSED, figures
    if len(values) < count:
        return words, UNKNOWN, f"{figures} ({len(values)} of {count} figures)" if figures else ""
    return words, MET, figures


def layer_figures(
    rows: Sequence[Row], column: str, direction: str, sizes: Sequence[int], dropout: float
) -> list[float]:
    """Return a column of our arm in CUDA graphs, by M."""
    found = pick(rows, arm="ours", mode="graph", direction=direction, dropout=dropout, **TARGET)
    by_m = {row["m"]: row[column] for row in found if column in row}
    return [by_m[m] for m in sizes if m in by_m]


def counts(profile: Sequence[Row], what: str, subject: str) -> list[float]:
    """Return what the profiler counted, whether or not it is the expected count."""
    key = ("launches", what, subject)
    found = [row for row in profile if (row.get("check"), row.get("what"), row.get("subject")) == key]
    return [row["figure"] for row in found if "figure" in row]


def targets(rows: dict[str, list[Row]]) -> list[Verdict]:
    """Return the verdicts, from rows by section."""
    layer, profile, step = (rows.get(name, []) for name in ("layer", "profile", "step"))
    both = "forward+backward, r 16, dropout 0.1, 4096x4096, M 2k, 4k, 8k: "
    few = "forward, M 1, 16, 64, no dropout: "
    launches = [figure for m in FEW for figure in counts(profile, "kernels", f"forward {m}x4096x4096 r16 p0")]
    moved = [row["figure"] for row in pick(profile, check="dram", what="ours")]
    steps = pick(step, set="8B model", dtype="float32", tensors=448, arm="ours, graph", state="shrinking")
    times = [row["device_us"] / 1e3 for row in steps]
    found: list[tuple[str, list[float], int, Callable[[float], bool], str]] = [
        (both + ">= 1.40x eager LoRA", layer_figures(layer, "eager_over", "both", MANY, 0.1), 3, lambda v: v >= 1.4, "{:.2f}x"),
        (both + "<= 1.12x frozen", layer_figures(layer, "over_frozen", "both", MANY, 0.1), 3, lambda v: v <= 1.12, "{:.2f}x"),
        (
            "backward alone, the same shapes: >= 1.2x eager LoRA",
            layer_figures(layer, "eager_over", "backward", MANY, 0.1), 3, lambda v: v >= 1.2, "{:.2f}x",
        ),
        (few + "<= 1.1x frozen", layer_figures(layer, "over_frozen", "forward", FEW, 0.0), 3, lambda v: v <= 1.1, "{:.2f}x"),
        (few + "one launch", launches, 3, lambda v: v == 1, "{:g}"),
        ("DRAM, forward+backward at 8192x4096x4096: <= 1.0 GiB", moved, 1, lambda v: v <= 1.0, "{:.3f} GiB"),
        ("step of an 8B model's 448 tensors, fp32, in a graph: <= 0.41 ms", times, 1, lambda v: v <= 0.41, "{:.3f} ms"),
    ]  # fmt: skip
    for what, words, right in (("kernels", "one launch", 1), ("syncs", "no synchronization", 0)):
        counted = counts(profile, what, "step of 448 tensors")
        found.append((f"448-tensor step: {words}", counted, 1, partial(operator.eq, right), "{:g}"))
    return [verdict(*target) for target in found]


def losses(layer: Sequence[Row]) -> list[tuple[float, str]]:
    """Return how many times longer we take than a rival, and the shape, worst first. The frozen layer is no rival."""
    shape = ("m", "n", "k", "r", "dropout", "mode", "direction")
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in pick(layer):
        groups.setdefault(tuple(row[key] for key in shape), {})[row["arm"]] = row["us"]
    found = []
    for (m, n, k, r, p, mode, direction), times in groups.items():
        ours = times.get("ours", 0.0)
        for arm, us in times.items():
            if arm not in ("ours", "frozen") and ours > us:
                call = f"M {m} N {n} K {k} r {r} dropout {p:g}, {direction}, {mode}"
                found.append((ours / us, f"{call}: ours {ours:.1f} us, {arm} {us:.1f}"))
    return sorted(found, reverse=True)


def regrets(rows: Sequence[Row]) -> dict[str, tuple[int, float, float]]:
    """Return by direction the number of calls, and the mean and the worst regret of the tables' choice."""
    found = {}
    for direction in ("forward", "backward"):
        timed = pick(rows, direction=direction)
        values = [row["regret"] for row in timed if row["kernel"] == row["chosen"]]
        if values:
            found[direction] = (len(values), statistics.mean(values), max(values))
    return found


def products(rows: Sequence[Row]) -> list[str]:
    """Return our product's time over the vendor's, and S's, by shape: the parts of a forward."""
    shape = ("m", "n", "k", "r", "dropout")
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in pick(rows, direction="forward"):
        groups.setdefault(tuple(row[key] for key in shape), {})[row["kernel"]] = row["us"]
    return [
        f"- M {m} N {n} K {k}: our product alone takes {us[PRODUCT] / us[VENDOR]:.3f} of the vendor's time, {us[VENDOR]:.1f} us; "
        f"S alone, r {r}, dropout {p:g}: {us[S_ALONE]:.1f} us"
        for (m, n, k, r, p), us in groups.items()
        if {PRODUCT, VENDOR, S_ALONE} <= us.keys()
    ]


def stages(rows: Sequence[Row]) -> list[str]:
    """Return a line for each stage of the first tests, up to the first that failed, and a verdict."""
    lines = []
    for stage in STAGES:
        own = [row for row in rows if row.get("stage") == stage]
        failed = [f"{row['check']}[{row.get('case', '')}]" for row in own if row["status"] == FAILED]
        if failed:
            return [*lines, f"- {stage}: FAILED, {', '.join(failed)}", f"- The bring-up stops here: {stage}."]
        if not any(row["status"] in (OK, SKIPPED) for row in own):
            return [*lines, f"- {stage}: {NOT_REACHED}. The bring-up is not complete."]
        passed = sum(row["status"] == OK for row in own)
        lines.append(f"- {stage}: {f'{passed} passed' if passed else 'skipped'}")
    return [*lines, "- Every stage passed or does not apply to this machine."]


def loads(rows: dict[str, list[Row]]) -> list[str]:
    """Return the range of clocks, and how many timed rows have each reason for a lower one."""
    timed = [row for each in rows.values() for row in each if "sm_mhz" in row]
    if not timed:
        return ["- unknown"]
    clocks = [row["sm_mhz"] for row in timed]
    reasons = Counter(str(row["throttle"]) for row in timed if "throttle" in row)
    return [
        f"- {min(clocks)} to {max(clocks)} MHz in {len(timed)} rows",
        *(f"- {count} rows: {reason}" for reason, count in reasons.most_common()),
    ]


def faster(rows: Sequence[Row], columns: Sequence[str], baseline: str) -> list[str]:
    """Return how much faster than ``baseline`` each other arm is; ``columns`` name the call."""
    return [
        f"- {', '.join(f'{column} {row[column]}' for column in columns)}: {row['arm']} {row['eager_over']:.2f} times as fast"
        for row in rows
        if row.get("arm") not in (None, baseline) and "eager_over" in row
    ]


def status_table(outcomes: dict[str, Outcome]) -> list[str]:
    cells = [["section", "rows", "failed", "skipped", "not reached", "seconds", ""]]
    for name, (rows, seconds, problem) in outcomes.items():
        count = {
            status: sum(row.get("status") == status for row in rows) for status in (FAILED, SKIPPED, NOT_REACHED, DRY)
        }
        remarks = [f"{count[DRY]} rows need a GPU"] if count[DRY] else []
        remarks += problem.split("\n")[:1] if problem else []
        numbers = [len(rows), count[FAILED], count[SKIPPED], count[NOT_REACHED]]
        cells.append([name, *map(str, numbers), f"{seconds:.0f}", "; ".join(remarks)])
    widths = aligned([row[:-1] for row in cells])
    remarks = ["", "", *(row[-1] for row in cells[1:])]
    return [f"{line}  {remark}".rstrip() for line, remark in zip(widths, remarks, strict=True)]


def failures(outcomes: dict[str, Outcome]) -> list[str]:
    """Return a line for each failed row: its name and the last line of its note."""
    found = []
    for name, outcome in outcomes.items():
        for row in outcome.rows:
            if row.get("status") == FAILED:
                values = [str(v) for k, v in row.items() if k not in ("status", "note", "dry", "bound", "seconds")]
                last = (str(row.get("note", "")).strip().splitlines() or [""])[-1]
                found.append(f"{name}: {' '.join(values)}: {last[:160]}")
    return found


class Summary:
    """What a run found, for summary.md and for the terminal."""

    def __init__(self, outcomes: dict[str, Outcome], machine: Row, dry: bool, interrupted: bool) -> None:
        self.machine, self.dry, self.interrupted = machine, dry, interrupted
        self.status = status_table(outcomes)
        rows = {name: outcome.rows for name, outcome in outcomes.items()}
        lost = [f"- {ratio:.2f}x: {words}" for ratio, words in losses(rows.get("layer", []))]
        regret = [
            f"- {name}: {count} calls, mean {mean:.1%}, worst {worst:.1%}"
            for name, (count, mean, worst) in regrets(rows.get("regret", [])).items()
        ]
        # A dry run's tiny shapes are not the targets', but its counts and names could be mistaken for figures.
        verdicts = [
            f"- {UNKNOWN} (dry): {words}" if dry else f"- {result}: {words}{': ' + figures if figures else ''}"
            for words, result, figures in targets(rows)
        ]
        note = ", of a dry run: it means nothing" if dry else ""
        # The most important first.
        self.parts: list[tuple[str, list[str]]] = [
            ("Targets", verdicts),
            ("The first kernels", stages(rows.get("bringup", []))),
            ("Failed", [f"- {line}" for line in failures(outcomes)] or ["- nothing"]),
            (f"The product alone, and S alone{note}", products(rows.get("regret", []))),
            (f"The tables' choice against the best kernel (regret){note}", regret),
            (f"A gated MLP against eager{note}", faster(rows.get("mlp", []), ("m", "r", "dropout"), "eager")),
            (f"A training step against eager{note}", faster(rows.get("captured", []), ("rows", "dropout"), "eager")),
            (f"Where we lose ({len(lost)} timings){note}", lost or ["- none among the measured"]),
            ("Clock", loads(rows)),
        ]

    def headline(self) -> str:
        first = f"Measured on {self.machine.get('gpu')}."
        if self.dry:
            first = "DRY RUN in Triton's interpreter on a CPU: NOTHING HERE IS A MEASUREMENT."
        return first + (" INTERRUPTED: what was not reached is missing." if self.interrupted else "")

    def page(self, command: str, seconds: float) -> str:
        """Return the text of summary.md."""
        facts = [
            f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}"
            for key, value in self.machine.items()
        ]
        parts = [
            *self.parts,
            ("Sections", ["```", *self.status, "```"]),
            ("Predictions", ["`python -m benchmarks.lab.predict` compares its predictions with layer.csv."]),
            ("Machine", facts),
            ("Command", [f"`{command}`", "", f"{seconds:.0f} s."]),
        ]
        body = [line for head, lines in parts for line in (f"## {head}", "", *(lines or ["- not measured"]), "")]
        return "\n".join([f"# {self.headline()}", "", *body])

    def printed(self) -> list[str]:
        """Return the lines for the terminal, the most important last, of each part the first."""
        lines = [*self.status]
        for head, part in reversed(self.parts):
            limit = len(part) if head in WHOLE else PRINTED
            more = [f"  and {len(part) - limit} more in summary.md"] if len(part) > limit else []
            lines += [f"{head}:", *(part[:limit] or ["- not measured"]), *more]
        return lines
