"""Is feature learning stable across widths? The parts of each step's output change, the latch, and which learning rate is best.

    python -m benchmarks.lab.stability [--preset quick|full|transformers] [--out DIR] [--processes 2]

Every optimizer trains the same adapters at every width, from the same start on the same batches: on the planted task
(``planted_task.py``) at widths 64 to 4096, or with ``--preset transformers`` in small Transformers (``small_transformers.py``).
A unit of work is a width and a seed. Finished units lie in DIR/units and are not run again. ``--report`` only makes tables and
plots from them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.stability import plots, report
from benchmarks.lab.stability.study import PRESETS, collect, run, unit_file


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.stability", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--preset", choices=PRESETS, default="quick", help="quick and full take minutes, transformers an hour"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where files go (default: results/stability-PRESET)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--stored", type=Path, metavar="DIR", help="run nothing; draw stored results into --out")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    preset, out = PRESETS[args.preset], args.out or Path("results") / f"stability-{args.preset}"
    if args.stored:
        try:
            found = report.read(args.stored)
        except OSError as error:
            parser.error(f"--stored must hold a study's CSV files, got {args.stored}: {error}")
        out.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(found, out):
            print(path)
        return 0
    if not args.report:
        try:
            run(preset, out, args.processes)
        except ValueError as error:
            parser.error(str(error))
    files = [unit_file(out, width, seed) for width in preset.widths for seed in range(preset.seeds)]
    files = [file for file in files if file.exists()]
    if not files:
        parser.error(f"{out} holds no units of this preset")
    found = collect(files)
    for path in (*report.write(found, out), *plots.draw(found, out)):
        print(path)
    print((out / "table.txt").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
