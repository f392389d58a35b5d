"""Bytes that the kernels move, and their launches, by formula and against the least possible.

    python -m benchmarks.lab.predict.bytes_moved [--device sm_90] [--out DIRECTORY]

Tests hold the formula to what Triton's interpreter counts. ``--out`` writes the table, and one with
a row for each launch, as CSV files. What a figure means:

- *Issued* and *unique* bytes are those of tests/benchmarks/lab/byte_counter.py. Memory's real
  traffic is in between. A chained launch reads X twice, for S and for the product; it counts once
  here, and comes from memory twice if L2 is smaller than X.
- *Floor* is the least for a layer as a whole: operands read once in forward and once in backward,
results written once.
- *Extra passes* over an activation beyond the frozen layer = (unique bytes of all launches of
  forward and backward, less those of the frozen layer's forward, which reads X, W and bias and
  writes Y, and backward, which reads dY and W and writes dX) / (bytes of X, which is [M, K]). All
  tensors count, also A, B, S, dS, dA, dB, seeds, masks and the sums that programs share.
- *Extra X, Y passes* = the same with X, Y, dY and dX alone in both terms of the difference.

The vendor's product counts as reading X, W and bias once and writing Y once: its code is not known.
The launch that draws dropout's seeds, of 16 bytes each, is not in the list.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from benchmarks.lab.predict.formula import activation_bytes, formula_by_tensor, total
from benchmarks.lab.predict.layer_time import DIRECTIONS, ONE_OP, SEPARATE, mlp_launches_of
from benchmarks.lab.predict.quantized import BITS
from benchmarks.lab.predict.rivals import BF16, MLP, Ways, passes
from stablelora_kernels.dispatch.problem import DEVICES, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.explanation import linear_launches

APART, TOGETHER = "apart", "together"


class Case(NamedTuple):
    """Forward and backward of a layer with a bias.

    ``n`` may have the output features of several projections of one X, which ``how`` computes
    ``APART`` or ``TOGETHER``. For a gated MLP, ``how`` is ``SEPARATE`` or ``ONE_OP``, and n is F.
    """

    m: int
    n: Any
    k: int
    r: int
    p: float = 0.0
    # A layer's: the kernel for Y and dX, or the format of W: "nf4", in blocks of 64 with nested
    # scales, or "fp8".
    how: str = "auto"
    dtype: torch.dtype = BF16
    lora_dtype: torch.dtype = torch.float32

    def floors(self) -> tuple[int, int]:
        """Least bytes, forward and backward, of the layer and of the frozen one: operands read
        once, results written once.

        Forward reads X, W, bias and writes Y; backward reads dY, W and writes dX. With LoRA, both
        read A, B and dropout's seed, and backward reads X and writes dA and dB. Not S: it could be
        computed again from X and A, which backward reads anyway.
        """
        size, blocks = self.dtype.itemsize, -(-self.n * self.k // 64)
        x, y, weight = self.m * self.k * size, self.m * self.n * size, self.n * self.k * size
        if self.how == "nf4":
            weight = -(-self.n * self.k // 2) + blocks + 4 * -(-blocks // 256)
        elif self.how == "fp8":
            weight = self.n * self.k + 4 * self.n
        frozen = 2 * (x + y + weight) + self.n * size
        adapters = self.r * (self.n + self.k) * self.lora_dtype.itemsize
        return frozen + x + 3 * adapters + 16 * (self.p > 0), frozen


# In Llama 3.1 8B: single layers, an attention's q, k and v, an MLP's gate and up, and that MLP.
REAL = [
    Case(m, n, 4096, r, p, how)
    for n, hows in (
        (4096, ("auto", *BITS)),
        (14336, ("auto",)),
        ((4096, 1024, 1024), (APART, TOGETHER)),
        ((14336, 14336), (APART, TOGETHER)),
        (14336, (SEPARATE, ONE_OP)),
    )
    for r, p, m, how in product((16, 64), (0.0, 0.1), (1, 16, 64, 512, 2048, 8192), hows)
]


def launches(device: Device, case: Case, where: str = "meta") -> Ways:
    """The launches of forward and backward as ``device`` would make them, on the meta device or, to
    count them, the CPU.
    """
    m, n, k, r, p, how = case[:6]
    dtypes = case.dtype, case.lora_dtype
    if how in (SEPARATE, ONE_OP):
        return mlp_launches_of(device, MLP(m, k, n, r, p > 0), how)
    if how == TOGETHER:
        return linear_launches(device, m, n, k, r, dtypes, p, where=where)
    if how == APART:
        ways = zip(*(linear_launches(device, m, each, k, r, dtypes, p) for each in n), strict=True)
        forward, backward = ([launch for way in each for launch in way] for each in ways)
        return forward, backward + passes("both dX", m * k, 3) * (len(n) - 1)
    if how in BITS:
        return linear_launches(device, m, n, k, r, dtypes, p, how, where=where)
    choice = None if how == "auto" else Choice(how, "")
    return linear_launches(device, m, n, k, r, dtypes, p, choices=(choice, choice), where=where)


def launch_table(device: Device, case: Case) -> pd.DataFrame:
    """A row for each launch of a case."""
    rows = []
    for direction, way in zip(DIRECTIONS, launches(device, case), strict=True):
        for launch in way:
            kernel = launch.kernel.__name__ if hasattr(launch, "kernel") else ""
            tensors = formula_by_tensor(launch)
            moved, activations = total(tensors.values())._asdict(), activation_bytes(tensors)
            rows.append(
                {
                    **case._asdict(),
                    "pass": direction,
                    "kernel": kernel,
                    **moved,
                    "X, Y": activations,
                }
            )
    return pd.DataFrame(rows)


def whole(case: Case, rows: pd.DataFrame) -> dict[str, Any]:
    """All launches of a case together; a layer's against the least possible."""
    issued, unique = (
        int(rows[[f"read_{kind}", f"written_{kind}"]].to_numpy().sum())
        for kind in ("issued", "unique")
    )
    row = {**case._asdict(), "launches": len(rows), "issued": issued, "unique": unique}
    if case.how not in (APART, TOGETHER, SEPARATE, ONE_OP):
        (floor, frozen), x = case.floors(), case.m * case.k * case.dtype.itemsize
        row |= {"floor": floor, "unique / floor": unique / floor, "issued / floor": issued / floor}
        row |= {
            "extra passes": (unique - frozen) / x,
            "extra X, Y passes": rows["X, Y"].sum() / x - 2 - 2 * case.n / case.k,
        }
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict.bytes_moved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--device",
        choices=sorted(DEVICES),
        default="sm_90",
        help="whose launches are made (default: %(default)s)",
    )
    add("--out", type=Path, help="where to write the tables as CSV files (default: nowhere)")
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    each = [launch_table(device, case) for case in REAL]
    table = pd.DataFrame([whole(*given) for given in zip(REAL, each, strict=True)]).drop(
        columns=["dtype", "lora_dtype"]
    )
    shown = table.assign(**{name: table[name] / 1e6 for name in ("issued", "unique", "floor")})
    print(
        f"Bytes in bf16 with float32 A and B, launches as on {device.arch}; issued, unique and floor in MB:"
    )
    print(shown.to_string(index=False, na_rep="", float_format="{:,.3f}".format))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, rows in (("bytes", table), ("launches", pd.concat(each))):
            rows.to_csv(options.out / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
