"""Fine-tuning real models with the paper's optimizers: accuracy across learning rates, and differences from AdamW seed by seed.

    python -m benchmarks.lab.paper [--preset PRESET] [--out DIR] [--minutes M] [--records FILE]

A preset screens every optimizer, shrink ratio and learning rate with a few seeds, chooses on validation examples, and spends
further seeds on what was chosen: ``quick`` is small, ``minilm`` and ``smollm2`` are whole. ``ablations`` changes one thing at a
time of that, ``edge`` spends seeds on the high learning rates, where training breaks for some, ``long`` gives small rates time
to converge, and ``untrained`` says what the language model has before any training. Each run is a file in DIR/runs, and is not
run again; with --minutes no run is started after that time, and the next call goes on. Presets share DIR. ``--records FILE``
goes on from another call's runs, as from those in ``benchmarks/results/``; ``--report`` only makes the tables and plots anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.paper import plots, report
from benchmarks.lab.paper.study import PRESETS, load, train_all, unpack


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lab.paper", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="quick takes six minutes, the others hours")
    parser.add_argument("--out", type=Path, default=Path("results/paper"), metavar="DIR")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, metavar="M", help="start no run after so many minutes")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help=f"go on from a {report.RECORDS} of another call, as stored ones are",
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    directory = args.out / "runs"
    directory.mkdir(parents=True, exist_ok=True)
    if args.records:
        if not args.records.exists():
            parser.error(f"--records: there is no {args.records}")
        unpack(args.records, directory)
    done = args.report or train_all(args.preset, directory, args.processes, args.minutes)
    if not (records := load(directory)):
        parser.error(f"{directory} holds no runs")
    for path in (*report.write(records, args.out), *plots.draw(records, args.out)):
        print(path)
    print((args.out / "table.txt").read_text(encoding="utf-8"))
    if not done:
        print("Not finished: run the same command again to go on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
