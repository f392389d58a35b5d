"""Machine code of every kernel and config that dispatch can pick, compiled for GPUs that need not be present.

    python -m benchmarks.lab.compile_report [--arch sm_90 ...] [--kernel lora_shrink] [--csv FILE]
    python -m benchmarks.lab.compile_report --check     compile all, compare with the committed report; exit with 1 if something got worse
    python -m benchmarks.lab.compile_report --write     compile all and renew the committed report, or with --arch a GPU's rows
        --quick, --missing: only what the report lacks and what has changed since: other rows keep their code

The committed report is benchmarks/results/compile_report.csv. Its rows are from one release of Triton, and are compared
only under that. Columns: registers a thread; spills, bytes of local memory a thread; bytes of shared memory a program;
the matrix instructions; serialized, why ptxas lets each of Hopper's wait for the last, or empty; the mean bits of a load and of a
store of tiles; occupancy, the share of a processor's warps that are resident; a digest of the intermediate code. What can't be
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

import pandas as pd
import triton

from benchmarks.common.tables import write_text
from benchmarks.lab.compile_report import report
from stablelora_kernels.dispatch.problem import DEVICES


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.lab.compile_report", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", action="append", choices=DEVICES, help="only this GPU; may be repeated")
    add("--kernel", default="", metavar="PREFIX", help="only kernels whose names begin so")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add("--check", action="store_true", help="compare with the committed report; exit with 1 if something got worse")
    add("--write", action="store_true", help="renew the committed report")
    help_ = "only rows that the committed report lacks, and those whose code has changed since"
    add("--quick", "--missing", action="store_true", help=help_)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it")
    if (args.write or args.check) and not triton.__version__.startswith(f"{report.TRITON}."):
        parser.error(f"the committed report is from Triton {report.TRITON}, this is {triton.__version__}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    archs = args.arch or [*DEVICES]
    labels = [label for arch in archs for label in report.jobs(arch) if label[0].startswith(args.kernel)]
    old, codes = report.read_report(), report.Codes()
    recorded = dict(zip(old[report.LABEL].itertuples(index=False, name=None), old["code"], strict=True))
    todo = [label for label in labels if not args.quick or codes.of(label) != recorded.get(label)]
    rows, failures = [], []
    started = time.perf_counter()
    for number, (label, result) in enumerate(report.compile_all(todo, len(os.sched_getaffinity(0))), start=1):
        if isinstance(result, str):
            failures.append(f"{' | '.join(label)}: {result}")
        else:
            rows.append(result | {"code": codes.of(label)})
        if number % 50 == 0 or number == len(todo):
            print(f"{number} of {len(todo)}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    codes.keep()
    new = pd.DataFrame(rows, columns=report.COLUMNS)
    print(new.to_string(index=False) if rows else "all code is as recorded")
    if args.csv:
        write_text(args.csv, new.to_csv(index=False, lineterminator="\n"))
    worse = []
    if args.check:
        chosen = old["arch"].isin(archs) & old["kernel"].str.startswith(args.kernel)
        worse = report.compare(old[chosen], new, labels)
    for title, lines in (("Not compiled", failures), ("Worse than the committed report", worse)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(lines), file=sys.stderr)
    if args.write and not failures:
        report.write_report(old, new)
        print(f"wrote {report.REPORT}", file=sys.stderr)
    return 1 if failures or worse else 0


if __name__ == "__main__":
    sys.exit(main())
