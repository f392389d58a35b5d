"""Machine code of every kernel and config that dispatch can pick, compiled for GPUs that need not be present.

    python -m benchmarks.lab.compile_report [--arch sm_90 ...] [--kernel lora_shrink] [--csv FILE]
    python -m benchmarks.lab.compile_report --write     compile all and renew the committed report, or with --arch a GPU's rows
        --missing: compile only what it lacks and what has changed since it was recorded
    python -m benchmarks.lab.compile_report --check     compile all, compare with it, and exit with 1 if something got worse
        --quick: of most GPUs only a sample, and of what has not changed since it was last recorded
    python -m benchmarks.lab.compile_report --check --quick --record        record what passed as unchanged

The committed report is benchmarks/results/compile_report.csv. Its rows are from one release of Triton, and are compared
only under that. Columns: registers a thread; spills, bytes of local memory a thread; bytes of shared memory a program and the
limit; the matrix instructions; serialized, why ptxas lets each of Hopper's wait for the last, or empty; the narrowest hot load
and store in bits, defined in machine_code.py; occupancy, the share of a processor's warps that are resident. What can't be
compiled is listed at the end, and the exit status is 1. A row takes 1 to 5 s of one core, 0.5 s once Triton has it in its cache.
The report has everything that dispatch can pick for sm_90, and each form and tile for the other GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from benchmarks.common.tables import csv_text, write_text
from benchmarks.lab.compile_report.report import (
    EVERY,
    EVERY_KEPT,
    FULL,
    KEYS,
    REPORT,
    TRITON,
    compare,
    compile_all,
    has_changed,
    in_sample,
    jobs,
    label_of,
    read_csv,
    read_digests,
    table,
    write_digests,
)
from stablelora_kernels.dispatch.problem import DEVICES


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.lab.compile_report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", action="append", choices=DEVICES, help="only this GPU; may be repeated")
    add("--kernel", default="", metavar="PREFIX", help="only kernels whose names begin so")
    add(
        "--quick",
        action="store_true",
        help=f"all rows of {FULL} and a fixed one in {EVERY} of the others; one in {EVERY_KEPT} where nothing changed",
    )
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add(
        "--write",
        action="store_true",
        help=f"write them to {REPORT.relative_to(REPORT.parents[2])}, the committed report",
    )
    add(
        "--missing",
        action="store_true",
        help="with --write: keep the rows whose code is as recorded, compile the others, drop those that vanished",
    )
    add(
        "--check",
        action="store_true",
        help="compare them with the committed report; exit with 1 if something got worse",
    )
    add(
        "--record",
        action="store_true",
        help="with --check, if nothing got worse: note in compile_report_digests.json what was compiled",
    )
    args = parser.parse_args(argv)
    if args.missing and not args.write:
        parser.error("--missing renews rows of the committed report; give --write too")
    if args.record and not args.check:
        parser.error("--record notes what --check has found unchanged; give both")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it")
    if args.write and (args.kernel or args.quick):
        parser.error("--write renews all rows of a GPU, so it takes no --kernel or --quick")
    if (args.write or args.check) and not triton.__version__.startswith(f"{TRITON}."):
        parser.error(f"the committed report is from Triton {TRITON}, this is {triton.__version__}")
    if args.check and not REPORT.exists():
        parser.error(f"there is no {REPORT}; make it with --write")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    archs = [arch for arch in DEVICES if not args.arch or arch in args.arch]
    wanted = [(arch, i) for arch in archs for i, job in enumerate(jobs(arch)) if job.label[0].startswith(args.kernel)]
    labels = [jobs(arch)[i].label for arch, i in wanted]
    kept = read_digests() if args.quick or args.missing else {}
    tasks = [task for task in wanted if not args.quick or in_sample(*task, kept)]
    there = []
    if args.missing:
        known = {label_of(row): row for row in read_csv(REPORT)}
        tasks = [
            task for task, label in zip(wanted, labels, strict=True) if label not in known or has_changed(*task, kept)
        ]
        todo = {*tasks}
        there = [known[label] for task, label in zip(wanted, labels, strict=True) if task not in todo]
    rows, failures = [], []
    started = time.perf_counter()
    for number, ((arch, place), result) in enumerate(compile_all(tasks, os.cpu_count() or 1), start=1):
        if isinstance(result, str):
            failures.append(f"{' | '.join(jobs(arch)[place].label)}: {result}")
        else:
            rows.append(result)
        if number % 50 == 0 or number == len(tasks):
            print(f"{number} of {len(tasks)}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(table(rows))
    if args.csv:
        args.csv.write_text(csv_text(rows, KEYS), encoding="utf-8", newline="")
    lines = []
    if args.check:
        old = [row for row in read_csv(REPORT) if row["arch"] in archs and row["kernel"].startswith(args.kernel)]
        lines = compare(old, rows, labels)
    for title, listed in (("Not compiled", failures), ("Worse than the committed report", lines)):
        if listed:
            print(f"\n{title}:\n" + "\n".join(listed), file=sys.stderr)
    if (args.record or args.write) and not failures and not lines:
        write_digests(tasks, wanted)
    if args.write and not failures:
        others = [row for row in read_csv(REPORT) if row["arch"] not in archs] if REPORT.exists() else []
        order = {jobs(arch)[place].label: number for number, (arch, place) in enumerate(wanted)}
        rows = sorted(there + rows, key=lambda row: order[label_of(row)])
        places = list(DEVICES)
        write_text(REPORT, csv_text(sorted(others + rows, key=lambda row: places.index(row["arch"])), KEYS))
        print(f"wrote {REPORT}", file=sys.stderr)
    return 1 if failures or lines else 0


if __name__ == "__main__":
    sys.exit(main())
