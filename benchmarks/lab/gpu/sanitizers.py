"""A tool of NVIDIA's compute-sanitizer over the first tests that a GPU runs: bad accesses, barriers, uninitialized reads, races.

The tool, ``--part``, watches tests/gpu/test_bring_up.py. An error in a kernel of ours fails the check. Errors in others' kernels
and warnings are counted in the note.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial

from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.section import FAILED, NO_GPU, NOTE_LENGTH, OK, SKIPPED, Clock, Row, Unit
from benchmarks.lab.gpu.tools import SPARE, find, skipped, watch

COLUMNS = ("tool", "what", "status", "figure", "expected", "note", "dry")
TESTS = "tests/gpu/test_bring_up.py"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: ")
# A report's first line begins one column behind the bar, perhaps on pytest's own line; the others deeper.
REPORT = re.compile(r"={9} (\S.*)\n(?:=+  .*\n)+")
OURS = re.compile(r"\b_[a-z_]+_kernel\b")
TEST = re.compile(rf"^{re.escape(TESTS)}::(\S+)", re.MULTILINE)


def reports(printed: str) -> tuple[Counter[str], int]:
    """Return the errors in our kernels, with test, kernel and kind, and the number of other reports."""
    ours, others = Counter[str](), 0
    for report in REPORT.finditer(printed):
        kernel = OURS.search(report[0])
        if kernel is None or report[1].startswith("Warning"):
            others += 1
        else:
            ours[f"{last_test(printed[: report.start()])}, {kernel[0]}: {report[1]}"] += 1
    return ours, others


def last_test(printed: str) -> str:
    return (TEST.findall(printed) or ["no test"])[-1]


def check(device: Device, tool: str, clock: Clock) -> Iterator[Row]:
    if device.dry:
        yield {"what": "errors", "expected": 0, **NO_GPU}
        return
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        yield skipped("errors", "compute-sanitizer is neither on PATH nor where CUDA installs it")
        return
    command = [sanitizer, "--tool", tool, sys.executable, "-m", "pytest", TESTS, "-v", "-s", "-p", "no:cacheprovider"]
    # Without the caching allocator each tensor is an allocation of its own, and memory beyond it is out of bounds.
    # The tests' watchdog would take a slow tool for a kernel that hangs.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1", "SLK_GPU_WATCHDOG": "0"}
    status, printed = watch(command, clock.left() - SPARE, **variables)
    ours, others = reports(printed)
    notes = [f"{count}x {report}" for report, count in ours.most_common()]
    notes += [f"{others} warnings and errors in others' kernels"] if others else []
    row: Row = {"what": "errors", "figure": ours.total(), "expected": 0, "status": FAILED if ours else OK}
    if status is None:
        notes.append(f"time was up in {last_test(printed)}")
        row["status"] = FAILED if ours else SKIPPED
    elif status or not SUMMARY.search(printed):
        notes.append(f"status {status} after {last_test(printed)}\n{printed}")
        row["status"] = FAILED
    yield {**row, "note": "\n".join(notes)[-NOTE_LENGTH:]}


def units(device: Device, clock: Clock) -> list[Unit]:
    tool = section.parse().part
    return [Unit({"tool": tool}, partial(check, device, tool, clock), 20.0)]


if __name__ == "__main__":
    section.main(COLUMNS, units)
