"""Projections of one X, computed one by one and together: launches, bytes, and bytes saved for backward.

One by one, autograd adds up the projections' dX: each addition is a launch that reads two and writes one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.common.tables import aligned
from benchmarks.lab.traffic import formula as t
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.launch.dry_run import call_launches, group_launches

Row = dict[str, Any]
BF16, FP32 = torch.bfloat16, torch.float32


class Group(NamedTuple):
    """Projections of ``ns`` output features with a bias each; A and B in float32."""

    m: int
    ns: tuple[int, ...]
    k: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = BF16

    @property
    def words(self) -> str:
        return "+".join(map(str, self.ns))


# An attention's q, k and v and an MLP's gate and up in Llama 3.1 8B.
REAL = tuple(
    Group(m, ns, 4096, r, p)
    for ns in ((4096, 1024, 1024), (14336, 14336))
    for r in (16, 64)
    for p in (0.0, 0.1)
    for m in (64, 512, 2048, 8192)
)


def _totals(made: list[Any], additions: int, group: Group) -> tuple[int, int, int]:
    """Launches, unique bytes, and those of X, Y, dY and dX."""
    found = [t.formula_by_tensor(launch) for launch in made]
    activation = group.m * group.k * group.dtype.itemsize
    extra = 3 * activation * additions
    unique = t.total(traffic for tensors in found for traffic in tensors.values()).unique
    return len(made) + additions, unique + extra, sum(map(t.activation_bytes, found)) + extra


def saved(group: Group) -> int:
    """Bytes saved for backward, the same either way: X once, each S, and dropout's seeds."""
    many = len(group.ns)
    return group.m * (group.k + group.r * many) * group.dtype.itemsize + 8 * many * (group.p > 0)


def group_row(device: Device, group: Group) -> Row:
    """One by one against together, forward and backward, by formula."""
    m, ns, k, r, p, dtype = group
    single = [launch for n in ns for way in call_launches(device, m, n, k, r, dtype, FP32, p) for launch in way]
    made = [launch for way in group_launches(device, m, ns, k, r, dtype, FP32, p) for launch in way]
    before, after = _totals(single, len(ns) - 1, group), _totals(made, 0, group)
    one_pass = m * k * dtype.itemsize
    return {
        "source": "formula", "device": device.arch, "operation": "lora_linear_group", "M": m, "N": group.words, "K": k, "r": r,
        "dropout": p, "dtypes": "bf16/fp32" if dtype == BF16 else "fp32", "pass": "both", "kernel": "all",
        "launches": after[0], "launches_apart": before[0], "unique": after[1], "unique_apart": before[1],
        "activation_passes": round(after[2] / one_pass, 4), "activation_passes_apart": round(before[2] / one_pass, 4),
        "saved": saved(group),
    }  # fmt: skip


def group_table(rows: list[Row]) -> list[str]:
    cells = [["M x N x K", "r", "p", "launches", "unique MB", "X, Y passes", "saved MB, both", "unique, to apart"]]
    for row in rows:
        pairs = [
            f"{row['launches_apart']} -> {row['launches']}",
            f"{row['unique_apart'] / 1e6:,.1f} -> {row['unique'] / 1e6:,.1f}",
            f"{row['activation_passes_apart']:.2f} -> {row['activation_passes']:.2f}",
            f"{row['saved'] / 1e6:,.1f}",
        ]
        shape = f"{row['M']}x{row['N']}x{row['K']}"
        cells.append(
            [shape, str(row["r"]), f"{row['dropout']:g}", *pairs, f"{row['unique'] / row['unique_apart']:.3f}"]
        )
    return aligned(cells, 3)
