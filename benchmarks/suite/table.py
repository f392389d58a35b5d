"""The suite's table: the arms of each case and phase, and where this library is slower than its rival."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.common.tables import aligned
from benchmarks.suite.rivals import verdict
from benchmarks.suite.scaling import exponents

Report = dict[str, Any]


def write(line: Callable[[str], None], reports: Sequence[Report], load_at_start: float) -> None:
    line(f"Load average {load_at_start:.2f} at the start, {os.getloadavg()[0]:.2f} now, on {os.cpu_count()} cores.")
    line("Medians; quartiles in brackets; ratios are taken round by round. 'overhead' is what an arm adds to its base.")
    for report in reports:
        line("")
        for text in (_title(report), *aligned(_rows(report))):
            line(text)
        for arm, reason in report["skipped"].items():
            line(f"  skipped: {arm}: {reason}")
        for arm, error in report["failed"].items():
            line(f"  FAILED: {arm}: {error}")
    for axis, fits in exponents(reports).items():
        line("")
        line(f"Time against {axis}, exponents over the larger half, with 95 % intervals:")
        line("  " + "; ".join(f"{arm} {slope:.2f} ± {half:.2f}" for arm, (slope, half) in fits.items()))
    slower = [text for report in reports for text in losses(report)]
    line("")
    line("Slower than the rival in three of four rounds:" if slower else "Nowhere slower than the rival.")
    for text in slower:
        line(f"  {text}")


def losses(report: Report) -> list[str]:
    """A sentence for each of our arms that is slower than the rival."""
    return [
        f"{report['case']}, {report['phase']}: {arm} takes {_spread(figures['over_rival'])} of {report['rival']}'s time"
        for arm, figures in report["arms"].items()
        if _verdict(figures) == "SLOWER"
    ]


def _verdict(figures: Report) -> str:
    return verdict(figures["over_rival"]) if figures["ours"] and "over_rival" in figures else ""


def _title(report: Report) -> str:
    floors = "".join(f", {part} at least {ms:.3f}" for part, ms in report.get("floor_ms", {}).items())
    calls = f", {report['calls']} calls at once" if "calls" in report else ""
    return f"{report['case']}, {report['phase']}, ms{calls}{floors}"


def _rows(report: Report) -> list[list[str]]:
    base, rival, arms = report["base"], report["rival"], report["arms"]
    apart = base != rival
    parts = [part for part in next(iter(arms.values())).get("parts", ())]
    notes = [key for key, value in arms[report["target"]].items() if isinstance(value, (int, float)) and key in NOTES]
    rows = [
        ["", "ms", f"/ {base}", *(["overhead", f"/ {rival}'s"] if apart else []), *(f"{part} adds, %" for part in parts),
         *(NOTES[key] for key in notes), ""]
    ]  # fmt: skip
    for arm, figures in arms.items():
        row = [arm, f"{figures['ms']['median']:.3f}", _spread(figures["over_base"])]
        if apart:
            share = figures.get("overhead_over_rival")
            row += [f"{figures['overhead_ms']['median']:.3f}", "" if share is None else f"{share:.2f}"]
            row[3:] = ["", ""] if arm == base else row[3:]
        row += [f"{figures['parts'][part]['added_percent']['median']:+.2f}" for part in parts]
        row += [f"{figures[key]:,.6g}" if figures.get(key) is not None else "" for key in notes]
        rows.append([*row, _verdict(figures)])
    return rows


# An arm's figures that are not times.
NOTES = {
    "saved_bytes": "saved, bytes",
    "state_bytes": "state, bytes",
    "paper_percent": "paper, %",
    "bytes_per_element": "bytes/element",
    "loss": "loss",
    "beyond_percent": "beyond AdamW, %",
    "allocated_beyond_percent": "allocated, %",
}


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['q1']:.2f}-{value['q3']:.2f})"
