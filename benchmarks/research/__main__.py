"""Do the claims of the Stable-LoRA paper hold? Two studies, of accuracy in fine-tuning and of
stability across widths.

    python -m benchmarks.research paper|stability [--preset PRESET] [--out DIR] [--processes N]
    [--stored DIR]

``paper`` fine-tunes small models with the paper's optimizers; ``stability`` trains at many widths.
Each finished run is in DIR/runs.csv and is not run again; presets share DIR. ``--stored DIR`` runs
nothing, and reports the CSV files in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.measure import environment
from benchmarks.common.tables import write_text
from benchmarks.research import paper, report, runner, stability

STUDIES = {"paper": (paper, report.write_paper), "stability": (stability, report.write_stability)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.research", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--preset", default="quick", help="quick takes minutes, the others up to hours"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where files go (default: results/STUDY)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument(
        "--stored", type=Path, metavar="DIR", help="run nothing; report the CSV files in DIR"
    )
    args = parser.parse_args(argv)
    study, write = STUDIES[args.study]
    if args.preset not in study.PRESETS:
        parser.error(f"--preset must be one of {', '.join(study.PRESETS)}, got {args.preset!r}")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    out = args.out or Path("results") / args.study
    out.mkdir(parents=True, exist_ok=True)
    if not args.stored:
        runner.finish(study, args.preset, out / runner.RECORDS, args.processes)
        write_text(
            out / "environment.json", json.dumps(environment() | {"command": sys.argv}, indent=1)
        )
    try:
        print(write(args.stored or out, out))
    except FileNotFoundError as error:
        parser.error(
            f"--stored must hold the CSV files of {args.study}, got {args.stored}: {error}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
