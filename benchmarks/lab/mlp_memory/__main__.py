"""What a gated MLP with LoRA keeps for backward, and what a training step needs, with ``fuse_mlp`` and without.

    python -m benchmarks.lab.mlp_memory [--measure FILE]

prints a table for an 8B Llama by formula, and draws docs/_static/fused-mlp-memory.png. ``--measure`` takes a training step of
SmolLM2-135M with every arm on this machine's CPU, each in a process of its own, and writes FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.tables import json_text, write_text


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.lab.mlp_memory import measure, plots, report

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.mlp_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure SmolLM2-135M, and write its figures here")
    args = parser.parse_args(argv)
    if args.measure is not None:
        write_text(args.measure, json_text(measure.measure_all([*measure.jobs()])))
    print(report.formula_table())
    for file in report.stored():
        print(f"\n{file}\n\n{report.measured_table(json.loads(file.read_text(encoding='utf-8')))}")
    print(f"wrote {plots.draw()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
