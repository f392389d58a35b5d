"""A section of ``benchmarks.lab.gpu``: a list of units, whose rows go to a CSV file as they come.

Each section runs in a process of its own, ``python -m benchmarks.lab.gpu.MODULE FILE --until SECONDS [--dry-run]``, because an
error on a GPU (an illegal address, for example) makes the GPU unusable for the whole process.
"""

from __future__ import annotations

import argparse
import csv
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common.measure import summarize
from benchmarks.lab.gpu.device import MOST_CALLS, Arms, CudaDevice, Device, DryDevice, Timing

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]
# The calls of each arm, which do the same with other weights.
Calls = dict[str, list[Callable[[], Any]]]
OK, FAILED, SKIPPED, DRY, NOT_REACHED, BEGUN = "ok", "failed", "skipped", "dry", "not reached", "begun"
# A row of a dry run for a figure that only a GPU has.
NO_GPU: Row = {"status": DRY, "note": "dry: needs a GPU"}
# Keep this many characters of a message, from its end, which says what happened.
NOTE_LENGTH = 1500


class Unit(NamedTuple):
    """A part of a section that succeeds or fails by itself."""

    # The columns that name the unit.
    key: Row
    run: Callable[[], Iterator[Row]]
    # An estimate. The unit does not begin if the section has less time left.
    seconds: float = 1.0


class Clock:
    """The time a section has left. ``until`` is on the monotonic clock, which all processes of a machine share."""

    def __init__(self, until: float) -> None:
        self._until = until

    def left(self) -> float:
        return self._until - time.monotonic()


class Table:
    """A CSV file that holds every row as soon as it is added, and at its end a row for each test that has begun."""

    def __init__(self, path: Path, columns: Sequence[str], dry: bool) -> None:
        self._dry, self._begun = dry, dict[str, Row]()
        # Closed by the end of the process, whatever ends it.
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        self._writer.writeheader()
        self._end = self._file.tell()
        self._file.flush()

    def begin(self, name: str, row: Row) -> None:
        """Hold ``row`` with the status "begun" until the end of ``name``."""
        self._begun[name] = {**row, "status": BEGUN}
        self._write([])

    def end(self, name: str) -> None:
        del self._begun[name]
        self._write([])

    def add(self, row: Row) -> None:
        self._write([row])

    def _write(self, rows: list[Row]) -> None:
        """Write ``rows`` over those that have begun, and these anew."""
        self._file.seek(self._end)
        self._file.truncate()
        self._writer.writerows({**row, "dry": "dry" if self._dry else ""} for row in rows)
        self._end = self._file.tell()
        self._writer.writerows({**row, "dry": "dry" if self._dry else ""} for row in self._begun.values())
        self._file.flush()


def note_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-NOTE_LENGTH:]


def time_columns(timing: Timing, median: str = "us") -> Row:
    """Return a timing's columns: the median in microseconds, the quartiles, the number of samples, and the load."""
    found = summarize(timing.seconds)
    named = {median: found["median"], "q1_us": found["q1"], "q3_us": found["q3"]}
    us = {name: round(seconds * 1e6, 3) for name, seconds in named.items()}
    return us | {"samples": len(timing.seconds)} | timing.load


def capture_all(
    device: Device, calls: Calls, column: str, rivals: Sequence[str] = (), most: int = MOST_CALLS
) -> tuple[Arms, list[Row]]:
    """Capture each arm's calls. Return the graphs, and rows for those that failed: of rivals, which are left out, as skipped."""
    graphs, rows = Arms(), []
    for name, runs in calls.items():
        try:
            graphs[name] = device.capture(runs, most)
        except Exception as error:
            rows.append({column: name, "status": SKIPPED if name in rivals else FAILED, "note": note_of(error)})
    return graphs, rows


def time_arms(device: Device, arms: Arms, seconds: float, *, queued: bool) -> dict[str, Row]:
    """Time the arms. Return each one's columns, with how many times longer the arm "eager" takes, if it is there."""
    found = {name: time_columns(timing) for name, timing in device.time(arms, seconds, queued=queued).items()}
    for row in found.values() if "eager" in found else ():
        row["eager_over"] = round(found["eager"]["us"] / row["us"], 4)
    return found


def run_units(units: list[Unit], add: Callable[[Row], None], clock: Clock, synchronize: Callable[[], None]) -> None:
    """Run every unit for which there is time. ``synchronize`` raises if the GPU is unusable, and so ends the section."""
    for number, unit in enumerate(units, start=1):
        if clock.left() < unit.seconds:
            add({**unit.key, "status": NOT_REACHED})
            continue
        try:
            for row in unit.run():
                add({**unit.key, "status": OK, **row})
        except Exception as error:
            add({**unit.key, "status": FAILED, "note": note_of(error)})
        print(f"  {number} of {len(units)}, {max(0.0, clock.left()):.0f} s left", flush=True)
        synchronize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one section of python -m benchmarks.lab.gpu")
    parser.add_argument("file", type=Path, help="the CSV file to write")
    parser.add_argument("--until", type=float, required=True, help="when to end, on the monotonic clock")
    parser.add_argument("--part", default="", help="the part of the section, where it has several")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def main(columns: Sequence[str], units: Callable[[Device, Clock], list[Unit]]) -> None:
    """Run a section in this process, as its arguments say."""
    import stablelora_kernels as slk

    options = parse()
    table, clock = Table(options.file, columns, options.dry_run), Clock(options.until)
    if options.dry_run:
        # The interpreter's arrays are so small that more threads make it slower.
        torch.set_num_threads(1)
    device: Device = DryDevice() if options.dry_run else CudaDevice()
    with slk.use_backend("triton"):
        run_units(units(device, clock), table.add, clock, device.synchronize)
