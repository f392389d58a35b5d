"""Measure this library on an NVIDIA GPU: is it right there, how fast against rivals, what does it launch and wait for.

    python -m benchmarks.lab.gpu [--budget 520] [--only SECTION ...] [--out DIRECTORY]
    python -m benchmarks.lab.gpu --dry-run

Rows are written to CSV files as they come, and an interrupt keeps them. Sections share the time out, the most important first;
what is not reached is said. ``--dry-run`` goes through the same code in Triton's interpreter on a CPU at tiny sizes, writes
nothing beside the repository's results, and measures nothing. The exit status is 1 if a check failed, 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from benchmarks.common.tables import RESULTS
from benchmarks.lab.gpu import report
from benchmarks.lab.gpu.process import Progress, machine, run_section
from benchmarks.lab.gpu.section import FAILED, SECTIONS, Row, module, run_child

# What looking at the machine may take: torch's import, the device's start and two short measurements.
MACHINE_SECONDS = 60.0


class Table:
    """A section's CSV file, written row by row, and its rows."""

    def __init__(self, path: Path, columns: Sequence[str], dry: bool) -> None:
        self.columns, self.dry, self.rows = columns, dry, list[Row]()
        self._file: TextIO = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        self._writer.writeheader()
        self._file.flush()

    def add(self, row: Row) -> None:
        # A run on a GPU is not to end over a column that nobody foresaw.
        unforeseen = {key: row.pop(key) for key in set(row) - set(self.columns)}
        if unforeseen:
            row["note"] = f"{row.get('note', '')} {unforeseen}".strip()
        row = {**row, "dry": "dry" if self.dry else ""}
        self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def deadlines(sections: Sequence[str], budget: float) -> dict[str, float]:
    """Seconds from the start by which each section has to end: its share, and what those before it left over."""
    total, passed, ends = sum(SECTIONS[name] for name in sections), 0.0, {}
    for name in sections:
        passed += SECTIONS[name]
        ends[name] = budget * passed / total
    return ends


def workers(section: str, dry: bool) -> int:
    """Processes for a section: checks share a GPU, and their kernels compile side by side; what is timed runs alone."""
    if section != "correctness" or dry:
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(sections: Sequence[str], out: Path, budget: float, begun: float, dry: bool) -> tuple[dict[str, Any], bool]:
    """Tables and progress of every section, and whether it was interrupted."""
    tables = {name: Table(out / f"{name}.csv", module(name).COLUMNS, dry) for name in sections}
    progress = {name: Progress() for name in sections}
    interrupted = False
    try:
        for name, end in deadlines(sections, budget).items():
            seconds = begun + end - time.monotonic()
            if seconds <= 0:
                say(f"{name}: not reached, time is up")
                continue
            # A row for a process that dies outside any unit.
            first = {module(name).COLUMNS[0]: "the section's process"}
            say(f"{name}: begins, {seconds:.0f} s")
            run_section(
                name, seconds, workers(name, dry), dry, tables[name].add, say, fatal_key=first, progress=progress[name]
            )
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: writing what there is")
    finally:
        for table in tables.values():
            table.close()
    return {name: (tables[name].rows, progress[name]) for name in sections}, interrupted


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--budget", type=float, default=520.0, help="seconds for all sections (default: %(default)g)")
    found.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="these sections alone")
    found.add_argument("--out", type=Path, help="where to write (default: benchmarks/results/<the GPU's name>)")
    found.add_argument("--commit", help="the commit that is measured, where this is no git checkout")
    found.add_argument(
        "--dry-run", action="store_true", help="the same code in the interpreter on a CPU, at tiny sizes"
    )
    for name, kind in (("--child", str), ("--part", str), ("--skip", int), ("--until", float), ("--pipe", int)):
        found.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    if options.child:
        number, count = map(int, options.part.split("/"))
        run_child(options.child, (number, count), options.skip, options.until, options.pipe, options.dry_run)
        return 0
    if options.budget <= 0:
        parser().error(f"--budget must be above 0, got {options.budget:g}")
    dry = options.dry_run
    # A stop by a time limit is an interrupt, too; and of what a shell began in the background, SIGINT is ignored until here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        found = machine(dry, MACHINE_SECONDS)
    except KeyboardInterrupt:
        say("interrupted before anything was measured")
        return 130
    except RuntimeError as error:
        say(str(error))
        return 2
    if not dry and found["gpu"] is None:
        say("There is no NVIDIA GPU here that torch can use. --dry-run runs the same code in Triton's interpreter.")
        return 2
    if options.commit:
        found["commit"] = options.commit
    sections = [name for name in SECTIONS if options.only is None or name in options.only]
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if dry else RESULTS / slug(found["gpu"]))
    if dry and out.resolve().is_relative_to(RESULTS.resolve()):
        parser().error(f"--out must lie outside {RESULTS} in a dry run, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    results, interrupted = run(sections, out, options.budget, begun, dry)
    # What is there is written whatever comes: the report takes seconds.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    command = "python -m benchmarks.lab.gpu " + " ".join(given)
    lines = report.write(out, results, found, command, dry, interrupted, time.monotonic() - begun)
    print("\n".join(lines), flush=True)
    if interrupted:
        return 130
    # A process that crashed left a failed row; one that ran out of time is no failure.
    return int(any(row.get("status") == FAILED for rows, _ in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
