"""The suite's table: each case's arms by phase, and where this library is slower than its rival."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from benchmarks.common.measure import summarize
from benchmarks.common.tables import aligned
from benchmarks.suite.rivals import Case, Outcome, compare, verdict

Write = Callable[[str], None]


def write(line: Write, sampled: Sequence[tuple[Case, Outcome]], load_at_start: float) -> None:
    line(f"Load average {load_at_start:.2f} at the start, {os.getloadavg()[0]:.2f} now, on {os.cpu_count()} cores.")
    line("Medians; quartiles in brackets; ratios are taken round by round. 'overhead' is what an arm adds to its base.")
    slower: list[str] = []
    for case, outcome in sampled:
        for phase in case.phases if case.base in outcome.samples else ():
            line("")
            line(f"{case.name}, {phase}, ms")
            for text in aligned(_rows(case, outcome, phase, slower)):
                line(text)
        for arm, reason in outcome.skipped.items():
            line(f"  skipped: {arm}: {reason}")
        for arm, error in outcome.errors.items():
            line(f"  FAILED: {arm}: {type(error).__name__}: {error}")
    line("")
    line("Slower than the rival in three of four rounds:" if slower else "Nowhere slower than the rival.")
    for text in slower:
        line(f"  {text}")


def _rows(case: Case, outcome: Outcome, phase: str, slower: list[str]) -> list[list[str]]:
    apart = case.base != case.rival
    rows = [["", "ms", f"/ {case.base}", *(["overhead", f"/ {case.rival}'s"] if apart else []), ""]]
    for arm in outcome.samples:
        found = compare(case, outcome, phase, arm)
        ms, ratio = 1e3 * summarize(outcome.seconds(case, phase, arm))["median"], found["over_base"]
        row = [arm, f"{ms:.3f}", f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"]
        if apart:
            share = found.get("overhead_over_rival")
            plain = arm == case.base
            row += ["" if plain else f"{found['overhead_ms']['median']:.3f}"]
            row += ["" if plain or share is None else f"{share:.2f}"]
        judged = verdict(found["over_rival"]) if arm in case.ours and "over_rival" in found else ""
        if judged == "SLOWER":
            over = found["over_rival"]
            slower.append(
                f"{case.name}, {phase}: {arm} takes {over['median']:.2f} ({over['q1']:.2f}-{over['q3']:.2f}) "
                f"of {case.rival}'s time"
            )
        rows.append([*row, judged])
    return rows
