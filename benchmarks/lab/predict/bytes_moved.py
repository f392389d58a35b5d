"""Bytes that the kernels move, and their launches: counted, by formula, and against the least possible.

    python -m benchmarks.lab.predict.bytes_moved [--device sm_90] [--out DIRECTORY]

At small shapes, one case for each regime, every load and store is counted in Triton's interpreter, launch by launch, and
compared with the formula. At real shapes the formula alone. The optimizer's steady step is counted. ``--out`` writes a CSV
file for each table.

What a figure means:

- *Issued* and *unique* bytes are counter.py's. Memory's real traffic is in between. A chained launch reads X twice, for S and for
  the product; it counts once here, and comes from memory twice if L2 is smaller than X.
- *Floor* is the least for a layer as a whole: operands read once in forward and once in backward, results written once.
- *Extra passes* over an activation beyond the frozen layer = (unique bytes of all launches of forward and backward, less those
  of the frozen layer's forward, which reads X, W and bias and writes Y, and backward, which reads dY and W and writes dX) /
  (bytes of X, which is [M, K]). All tensors count, also A, B, S, dS, dA, dB, seeds and the sums that programs share.
- *Extra X, Y passes* = the same with X, Y, dY and dX alone in both terms of the difference.

The vendor's product counts as reading X, W and bias once and writing Y once: its code is not known. The launch that draws
dropout's seed, of 8 bytes, is not in the list.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Triton reads it as it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import pandas as pd
import torch

from benchmarks.lab.predict.counter import counted
from benchmarks.lab.predict.formula import Tensors, Traffic, activation_bytes, formula_by_tensor, total
from benchmarks.lab.predict.layer_time import DIRECTIONS, ONE_OP, SEPARATE, mlp_launches_of
from benchmarks.lab.predict.quantized import KINDS
from benchmarks.lab.predict.rivals import BF16, MLP, Ways, Work, passes
from stablelora_kernels.dispatch.problem import DEVICES, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.dry_run import call_launches, group_launches, quantized_launches

FP32 = torch.float32
APART, TOGETHER = "apart", "together"


class Case(NamedTuple):
    """Forward and backward of a layer with a bias.

    ``n`` may have the output features of several projections of one X, which ``how`` computes ``APART`` or ``TOGETHER``. For a
    gated MLP, ``how`` is ``SEPARATE`` or ``ONE_OP``, and n is F.
    """

    m: int
    n: Any
    k: int
    r: int
    p: float = 0.0
    # A layer's: the kernel for Y and dX, or the format of W: "nf4", in blocks of 64 with nested scales, or "fp8".
    how: str = "auto"
    dtype: torch.dtype = BF16
    lora_dtype: torch.dtype = FP32

    def floors(self) -> tuple[int, int]:
        """Least bytes, forward and backward, of the layer and of the frozen one: operands read once, results written once.

        Forward reads X, W, bias and writes Y; backward reads dY, W and writes dX. With LoRA, both read A, B and dropout's seed,
        and backward reads X and writes dA and dB. Not S: it could be computed again from X and A, which backward reads anyway.
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


# Counted: one case for each kind of kernel. Sizes do not divide tiles; rows are multiples of 16 bytes, as descriptors require.
SMALL = [
    Case(9, 328, 904, 64, 0.1),
    Case(70, 264, 200, 16),
    Case(200, 200, 264, 64, 0.1),
    Case(200, 200, 264, 16, how="fused"),
    Case(200, 264, 200, 16, 0.1, "split"),
    Case(200, 264, 136, 16, 0.1, "vendor"),
    Case(72, 136, 200, 16, dtype=FP32),
]
# By formula. In Llama 3.1 8B: single layers, an attention's q, k and v, an MLP's gate and up, and that MLP.
REAL = [
    Case(m, n, 4096, r, p, how)
    for n, hows in (
        (4096, ("auto", *KINDS)),
        (14336, ("auto",)),
        ((4096, 1024, 1024), (APART, TOGETHER)),
        ((14336, 14336), (APART, TOGETHER)),
        (14336, (SEPARATE, ONE_OP)),
    )
    for r, p, m, how in product((16, 64), (0.0, 0.1), (1, 16, 64, 512, 2048, 8192), hows)
]


def launches(device: Device, case: Case, where: str = "meta") -> Ways:
    """The forward's and the backward's launches of ``case``, as ``device`` would make them, on tensors without memory or, to
    count them, on the CPU's."""
    m, n, k, r, p, how, *dtypes = case
    if how in (SEPARATE, ONE_OP):
        return mlp_launches_of(device, MLP(m, k, n, r, p > 0), how)
    if how == TOGETHER:
        return group_launches(device, m, n, k, r, *dtypes, p, where)
    if how == APART:
        ways = zip(*(call_launches(device, m, each, k, r, *dtypes, p) for each in n), strict=True)
        forward, backward = ([launch for way in each for launch in way] for each in ways)
        return forward, backward + passes("both dX", m * k, 3) * (len(n) - 1)
    if how in KINDS:
        return quantized_launches(device, m, n, k, r, *dtypes, p, how, where=where)
    choice = None if how == "auto" else Choice(how, "")
    return call_launches(device, m, n, k, r, *dtypes, p, choice, choice, where=where)


def moved(launch: Any) -> Tensors:
    """The bytes of a launch by tensor, by formula; those of an elementwise one between layers all as read."""
    if isinstance(launch, Work):
        return {launch.name: Traffic(int(launch.bytes), 0, int(launch.bytes), 0)}
    return formula_by_tensor(launch)


def launch_table(device: Device, case: Case, counting: bool = False) -> pd.DataFrame:
    """A row for each launch of a case, by formula, or counted and compared with the formula."""
    ways = launches(device, case, "cpu" if counting else "meta")
    made = [(direction, launch) for direction, way in zip(DIRECTIONS, ways, strict=True) for launch in way]
    found = by_formula = [moved(launch) for _, launch in made]
    if counting:
        with counted() as seen:
            for _, launch in made:
                launch.run(torch.device("cpu"))
        found = [each.tensors for each in seen]
    rows = []
    for (direction, launch), tensors, expected in zip(made, found, by_formula, strict=True):
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel") if hasattr(launch, "kernel") else ""
        rows.append({
            **case._asdict(), "pass": direction, "kernel": kernel or "elsewhere", **total(tensors.values())._asdict(),
            "X, Y": activation_bytes(tensors),
            "formula": "ideal" if not kernel else "equal" if tensors == expected else "DIFFERENT",
        })  # fmt: skip
    return pd.DataFrame(rows)


def whole(case: Case, rows: pd.DataFrame) -> dict[str, Any]:
    """All launches of a case together; a layer's against the least possible."""
    issued, unique = (int(rows[[f"read_{kind}", f"written_{kind}"]].to_numpy().sum()) for kind in ("issued", "unique"))
    row = {**case._asdict(), "launches": len(rows), "issued": issued, "unique": unique}
    if case.how not in (APART, TOGETHER, SEPARATE, ONE_OP):
        (floor, frozen), x = case.floors(), case.m * case.k * case.dtype.itemsize
        row |= {"floor": floor, "unique / floor": unique / floor, "issued / floor": issued / floor}
        row |= {
            "extra passes": (unique - frozen) / x,
            "extra X, Y passes": rows["X, Y"].sum() / x - 2 - 2 * case.n / case.k,
        }
    return row


def optimizer_row(pairs: int, r: int, width: int, dtype: torch.dtype = FP32) -> dict[str, Any]:
    """A counted step of ``pairs`` A and B of that width: the second one, as the first also measures the sums."""
    from stablelora_kernels.dispatch.settings import use_backend
    from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW

    named = []
    for i in range(pairs):
        # The pair shrinks: its A is larger than its B.
        a, b = torch.ones(r, width, dtype=dtype), torch.full((width, r), 1e-3, dtype=dtype)
        named += [(f"{i}.lora_A", a.requires_grad_()), (f"{i}.lora_B", b.requires_grad_())]
    optimizer = StableLoRAAdamW(named)
    for _, p in named:
        p.grad = torch.full_like(p, 1e-3)
    with use_backend("triton"):
        optimizer.step()
        with counted() as found:
            optimizer.step()
    # p, g, m and v read; p, m and v written; the moments are float32.
    floor = 2 * pairs * r * width * (3 * dtype.itemsize + 16)
    traffic = total(launch.traffic for launch in found)
    ratios = {"unique / floor": traffic.unique / floor, "issued / floor": traffic.issued / floor}
    return {"pairs": pairs, "r": r, "width": width, "dtype": dtype, **traffic._asdict(), **ratios}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.predict.bytes_moved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=sorted(DEVICES), default="sm_90", help="whose launches are made (default: %(default)s)")
    add("--out", type=Path, help="where to write the tables as CSV files (default: nowhere)")
    options = parser.parse_args(argv)
    device = DEVICES[options.device]
    sizes = ((1, 4, 256), (4, 16, 2048), (4, 16, 2048, BF16), (2, 64, 4096))
    tables = {
        "counted": pd.concat([launch_table(device, case, counting=True) for case in SMALL]),
        "formula": pd.DataFrame([whole(case, launch_table(device, case)) for case in REAL]),
        "optimizer": pd.DataFrame([optimizer_row(*each) for each in sizes]),
    }
    for name, table in tables.items():
        table = table.replace({BF16: "bf16", FP32: "fp32"})
        text = table.to_string(index=False, na_rep="", float_format="{:,.3f}".format)
        print(f"Bytes of launches as on {device.arch}, {name}:\n{text}\n")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.out / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
