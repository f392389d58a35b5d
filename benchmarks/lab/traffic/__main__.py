"""Bytes that the kernels move, and their launches: counted, by formula, and against the least possible.

    python -m benchmarks.lab.traffic [--csv FILE] [--device sm_90]

Three tables. At small shapes, one case for each regime, every load and store is counted in Triton's interpreter, launch by
launch, and compared with the formula. At real shapes the formula alone. The optimizer's steady step is counted.
All go to a CSV file, a row a launch or a case (kernel "all"), whose ``source`` is "counted" or "formula".

What a figure means:

- *Issued* are the bytes that programs ask for. *Unique* are those that a launch touches, each once: what memory must deliver
  if a cache holds all else during a launch, and nothing from one launch to the next. Real traffic is in between. A chained
  launch reads X twice, for S and for the product; it counts once here, and comes from memory twice if L2 is smaller than X.
- *Floor* is the least for the operation as a whole: operands read once in forward and once in backward, results written once.
- *Passes* over an activation beyond the frozen layer = (unique bytes of all launches of forward and backward, less those of the
  frozen layer's forward, which reads X, W and bias and writes Y, and backward, which reads dY and W and writes dX) / (bytes
  of X, which is [M, K]). All tensors count, also A, B, S, dS, dA, dB, seeds and the sums that programs share.
- *X, Y passes* = the same with X, Y, dY and dX alone in both terms of the difference.

The vendor's product counts as reading X, W and bias once and writing Y once: its code is not known. The launch that draws
dropout's seed, of 8 bytes, is not in the list.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.tables import csv_text
from benchmarks.lab.traffic.report import (
    REAL,
    REAL_QUANTIZED,
    RESULT,
    SETS,
    SMALL,
    SMALL_QUANTIZED,
    Case,
    Row,
    case_rows,
    checks,
    counted_table,
    formula_table,
    group_rows,
    mlp_rows,
    optimizer_rows,
    optimizer_table,
)
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.traffic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--csv", type=Path, default=RESULT, help=f"where to write all rows (default: {RESULT})")
    parser.add_argument("--device", choices=sorted(DEVICES), default="sm_90", help="the GPU whose launches are made")
    arguments = parser.parse_args(argv)
    if not backend.INTERPRETING:
        # Triton reads it as it is imported.
        given = sys.argv[1:] if argv is None else list(argv)
        sys.stdout.flush()
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.lab.traffic", *given],
            {**os.environ, "TRITON_INTERPRET": "1"},
        )
    device = DEVICES[arguments.device]

    def rows(cases: Sequence[Case], count: bool = False) -> list[Row]:
        return [row for case in cases for row in case_rows(device, case, count)]

    counted, formula, real = rows(SMALL, count=True), rows(SMALL), rows(REAL)
    counted_quantized, formula_quantized = rows(SMALL_QUANTIZED, count=True), rows(SMALL_QUANTIZED)
    real_quantized = rows(REAL_QUANTIZED)
    optimizer = [row for tensors in SETS for row in optimizer_rows(tensors)]
    cases = [row for row in (*real, *real_quantized) if row["kernel"] == "all"]
    print(
        f"Counted in the interpreter, launches as on {device.arch}, bytes:",
        *counted_table([*counted, *counted_quantized], [*formula, *formula_quantized]),
        sep="\n",
    )
    print(f"\nBy formula, forward and backward, launches as on {device.arch}:", *formula_table(cases), sep="\n")
    shared, shared_table = group_rows(device)
    print("\nProjections of one X, one by one -> together, by formula:", *shared_table, sep="\n")
    mlp, mlp_table = mlp_rows(device)
    print("\nA gated MLP, three layers and an activation -> one op, by formula:", *mlp_table, sep="\n")
    print("\nThe optimizer's step, bytes:", *optimizer_table(optimizer), sep="\n")
    print("", *checks(optimizer, cases), sep="\n")
    # What the vendor's product moves was not counted.
    counted = [row for row in counted if row["kernel"] != "vendor"]
    quantized = [*counted_quantized, *formula_quantized, *real_quantized]
    everything = [*counted, *formula, *real, *quantized, *shared, *mlp, *optimizer]
    arguments.csv.write_text(csv_text(everything), encoding="utf-8", newline="")
    print(f"All rows are in {arguments.csv}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
