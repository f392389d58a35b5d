"""The end of ``benchmarks.lab.gpu``: targets with verdicts, shapes where we lose, plots, and summary.md."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.tables import aligned
from benchmarks.lab.gpu.section import DRY, FAILED, SKIPPED, Row

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
Verdict = tuple[str, str, str]
# Lines of each list that are printed; summary.md has all.
PRINTED = 8
TARGET = {"n": 4096, "k": 4096, "r": 16}
FEW, MANY = (1, 16, 64), (2048, 4096, 8192)


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have a figure and these values."""
    return [
        row for row in rows if row.get("status") == "ok" and all(row.get(key) == value for key, value in wanted.items())
    ]


def verdict(words: str, values: Sequence[float], wanted: int, holds: Callable[[float], bool], show: str) -> Verdict:
    """A target: words, met, missed or not measured, and the figures. ``wanted`` figures are needed to say that it is met.

    One that is beyond the target is enough to miss it.
    """
    figures = ", ".join(show.format(value) for value in values)
    if any(not holds(value) for value in values):
        return words, MISSED, figures
    if len(values) < wanted:
        return words, UNKNOWN, f"{figures} ({len(values)} of {wanted} figures)" if figures else ""
    return words, MET, figures


def _layer(rows: Sequence[Row], column: str, direction: str, sizes: Sequence[int], dropout: float) -> list[float]:
    """A column of our arm in CUDA graphs, by M."""
    found = pick(rows, arm="ours", mode="graph", direction=direction, dropout=dropout, **TARGET)
    by_m = {row["m"]: row[column] for row in found if column in row}
    return [by_m[m] for m in sizes if m in by_m]


def targets(results: dict[str, list[Row]]) -> list[Verdict]:
    """The issue's targets, from rows by section."""
    layer, profile, step = (results.get(name, []) for name in ("layer", "profile", "step"))
    both = "forward+backward, r 16, dropout 0.1, 4096x4096, M 2k, 4k, 8k: "
    found = [
        verdict(both + ">= 1.40x eager LoRA", _layer(layer, "eager_over", "both", MANY, 0.1), 3, lambda v: v >= 1.4, "{:.2f}x"),
        verdict(both + "<= 1.12x frozen", _layer(layer, "over_frozen", "both", MANY, 0.1), 3, lambda v: v <= 1.12, "{:.2f}x"),
        verdict(
            "backward alone, the same shapes: >= 1.2x eager LoRA",
            _layer(layer, "eager_over", "backward", MANY, 0.1), 3, lambda v: v >= 1.2, "{:.2f}x",
        ),
        verdict(
            "forward, M 1, 16, 64, no dropout: <= 1.1x frozen",
            _layer(layer, "over_frozen", "forward", FEW, 0.0), 3, lambda v: v <= 1.1, "{:.2f}x",
        ),
    ]  # fmt: skip
    launches = [figure for m in FEW for figure in _counted(profile, "kernels", f"forward {m}x4096x4096 r16 p0")]
    found.append(verdict("forward, M 1, 16, 64, no dropout: one launch", launches, 3, lambda v: v == 1, "{:g}"))
    moved = [row["figure"] for row in pick(profile, check="dram", what="ours")]
    found.append(
        verdict("DRAM, forward+backward at 8192x4096x4096: <= 1.0 GiB", moved, 1, lambda v: v <= 1.0, "{:.3f} GiB")
    )
    times = [
        row["device_us"] / 1e3
        for row in pick(step, set="8B model", dtype="float32", tensors=448, arm="ours, graph", state="shrinking")
    ]
    found.append(
        verdict(
            "step of an 8B model's 448 tensors, fp32, in a graph: <= 0.41 ms",
            times,
            1,
            lambda v: v <= 0.41,
            "{:.3f} ms",
        )
    )
    for what, words, right in (("kernels", "one launch", 1), ("syncs", "no synchronization", 0)):
        counted = _counted(profile, what, "step of 448 tensors")
        found.append(verdict(f"448-tensor step: {words}", counted, 1, partial(operator.eq, right), "{:g}"))
    return found


def _counted(profile: Sequence[Row], what: str, subject: str) -> list[float]:
    """What the profiler counted; a count that is not as it should be has the status failed, and is looked at too."""
    found = [
        row for row in profile if (row.get("check"), row.get("what"), row.get("subject")) == ("launches", what, subject)
    ]
    return [row["figure"] for row in found if _number(row.get("figure"))]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def losses(layer: Sequence[Row]) -> list[tuple[float, str]]:
    """Where we take longer than a rival (the frozen layer is none): by how much, and the shape, worst first."""
    shape = ("m", "n", "k", "r", "dropout", "mode", "direction")
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in layer:
        if row.get("status") == "ok" and _number(row.get("us")):
            groups.setdefault(tuple(row[key] for key in shape), {})[row["arm"]] = row["us"]
    found = []
    for key, times in groups.items():
        for arm, us in times.items():
            if arm not in ("ours", "frozen") and "ours" in times and times["ours"] > us:
                m, n, k, r, p, mode, direction = key
                words = f"M {m} N {n} K {k} r {r} dropout {p:g}, {direction}, {mode}: ours {times['ours']:.1f} us, {arm} {us:.1f}"
                found.append((times["ours"] / us, words))
    return sorted(found, reverse=True)


def regrets(rows: Sequence[Row]) -> dict[str, tuple[int, float, float]]:
    """By direction: how many calls, and the mean and worst regret of the table's choice."""
    found = {}
    for direction in ("forward", "backward"):
        values = [
            row["regret"] for row in rows
            if row.get("direction") == direction and row.get("status") == "ok" and row.get("kernel") == row.get("chosen")
        ]  # fmt: skip
        if values:
            found[direction] = (len(values), statistics.mean(values), max(values))
    return found


def model_error(rows: Sequence[Row]) -> str:
    """How far predictions were from measurements."""
    errors = [row["error_pct"] for row in rows if row.get("status") == "ok" and _number(row.get("error_pct"))]
    if not errors:
        return "nothing predicted"
    return f"median {statistics.median(errors):+.0f} %, from {min(errors):+.0f} to {max(errors):+.0f} %, {len(errors)} times"


def status_table(results: dict[str, Any]) -> list[str]:
    cells = [["section", "units", "rows", "failed", "skipped", "seconds", ""]]
    for name, (rows, progress) in results.items():
        count = {status: sum(row.get("status") == status for row in rows) for status in (FAILED, SKIPPED, DRY)}
        if not progress.begun or not progress.planned:
            remark = progress.problem.split("\n")[0] or "not reached"
        elif progress.done < progress.planned:
            remark = f"not reached: {progress.planned - progress.done} of {progress.planned} units"
        else:
            remark = progress.problem.split("\n")[0]
        if count[DRY]:
            remark = f"{count[DRY]} rows need a GPU" + (f"; {remark}" if remark else "")
        units = f"{progress.done}/{progress.planned}"
        numbers = [str(len(rows)), str(count[FAILED]), str(count[SKIPPED]), f"{progress.seconds:.0f}"]
        cells.append([name, units, *numbers, remark])
    widths = aligned([row[:-1] for row in cells])
    remarks = ["", "", *(row[-1] for row in cells[1:])]
    return [f"{line}  {remark}".rstrip() for line, remark in zip(widths, remarks, strict=True)]


def failures(results: dict[str, Any]) -> list[str]:
    """One line for each failed row: its name and the last line of its note."""
    found = []
    for name, (rows, _) in results.items():
        for row in rows:
            if row.get("status") == FAILED:
                values = [str(v) for k, v in row.items() if k not in ("status", "note", "dry", "bound", "seconds")]
                last = (str(row.get("note", "")).strip().splitlines() or [""])[-1]
                found.append(f"{name}: {' '.join(values)}: {last[:160]}")
    return found


def headline(dry: bool, interrupted: bool, machine: Row) -> str:
    if dry:
        first = "DRY RUN in Triton's interpreter on a CPU: NOTHING HERE IS A MEASUREMENT."
    else:
        first = f"Measured on {machine.get('gpu')}."
    return first + (" INTERRUPTED: what was not reached is missing." if interrupted else "")


def write(
    out: Path, results: dict[str, Any], machine: Row, command: str, dry: bool, interrupted: bool, seconds: float
) -> list[str]:
    """summary.md and plots in ``out``; what is to be printed, the most important last."""
    rows = {name: found for name, (found, _) in results.items()}
    first = headline(dry, interrupted, machine)
    dry_note = ", of a dry run: it means nothing" if dry else ""
    status, failed, lost = status_table(results), failures(results), losses(rows.get("layer", []))
    verdicts = [f"- {result}: {words}{': ' + figures if figures else ''}" for words, result, figures in targets(rows)]
    if dry:
        # Tiny shapes are none of the targets', but counts of launches and names could be taken for figures.
        verdicts = [f"- {UNKNOWN} (dry): {words}" for words, _, _ in targets(rows)]
    regret = [
        f"- {name}: {count} calls, mean {mean:.1%}, worst {worst:.1%}"
        for name, (count, mean, worst) in regrets(rows.get("regret", [])).items()
    ] or ["- not measured"]
    errors = [f"- {name}: {model_error(rows[name])}" for name in ("layer", "regret") if name in rows]
    try:
        from benchmarks.lab.gpu.plots import draw

        plots = [path.name for path in draw(rows, machine, out, dry)]
    except Exception as error:
        # Figures matter more than pictures of them.
        plots = [f"none: {type(error).__name__}: {error}"]
    facts = [
        f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}" for key, value in machine.items()
    ]
    losing = [f"- {ratio:.2f}x: {words}" for ratio, words in lost] or ["- none among what was measured"]
    parts: list[tuple[str, list[str]]] = [
        ("Targets", verdicts),
        ("Sections", ["```", *status, "```"]),
        ("Failed", [f"- {line}" for line in failed] or ["- nothing"]),
        (f"Where we lose ({len(lost)} timings){dry_note}", losing),
        (f"The table's choice against the best kernel (regret){dry_note}", regret),
        (f"Predicted over measured{dry_note}", errors or ["- not measured"]),
        ("Machine", facts),
        ("Command", [f"`{command}`", "", f"{seconds:.0f} s. Plots: {', '.join(plots) or 'none'}."]),
    ]
    text = [
        f"# {first}",
        "",
        *(line for head, body in parts for line in (f"## {head}", "", *body, "")),
    ]
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")

    def short(lines: list[str]) -> list[str]:
        more = len(lines) - PRINTED
        return lines[:PRINTED] + ([f"  and {more} more in summary.md"] if more > 0 else [])

    return [
        f"Where we lose ({len(lost)} timings){dry_note}:", *short(losing),
        f"Regret of the table's choice{dry_note}:", *regret,
        f"Predicted over measured{dry_note}:", *(errors or ["- not measured"]),
        f"Failed ({len(failed)}):", *short([f"- {line}" for line in failed] or ["- nothing"]),
        *status,
        "Targets:", *verdicts,
        f"{first} {seconds:.0f} s, files in {out}",
    ]  # fmt: skip
