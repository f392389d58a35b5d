"""A gated MLP with LoRA: three layers and a fused activation apart, and as one op. Launches, bytes, passes over [M, F].

Apart, the activation is one launch forward, which reads G and U and writes H, and one backward, which reads dH, G and U and
writes dG and dU; autograd adds up both dX. That is the sequence of three layers with Liger's or Unsloth's activation.

A pass is a read or a write of one [M, F] matrix by one launch. Programs of one launch that read the same matrix count once. Where
dA's programs read G and U apart from dH's, as may happen, each counts: ``passes_apart_readers``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.common.tables import aligned
from benchmarks.lab.traffic import formula as t
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.launch.dry_run import call_launches, mlp_launches

Row = dict[str, Any]
BF16, FP32 = torch.bfloat16, torch.float32


class MLP(NamedTuple):
    """[M, K] to [M, N] by F features; A and B in float32, no biases, SiLU."""

    m: int
    k: int
    f: int
    n: int
    r: int
    p: float = 0.0


# Llama 3.1 8B.
REAL = tuple(MLP(m, 4096, 14336, 4096, r, p) for r in (16, 64) for p in (0.0, 0.1) for m in (32, 512, 2048, 8192))


class Moved(NamedTuple):
    launches: int
    unique: int
    # Passes over [M, F].
    passes: float
    # Those, with each reader of G and U in a launch counted.
    passes_of_readers: float


def launches(device: Device, mlp: MLP) -> tuple[list[Any], list[Any]]:
    return mlp_launches(device, mlp.m, mlp.n, mlp.f, mlp.k, mlp.r, BF16, FP32, mlp.p)


def _moved(made: list[Any], mlp: MLP) -> Moved:
    unique, passes, again = 0, 0.0, 0.0
    one = mlp.m * mlp.f * BF16.itemsize
    for launch in made:
        found = t.formula_by_tensor(launch)
        unique += t.total(found.values()).unique
        # Tensors of [M, F] move whole; X, Y and thin ones have other sizes.
        tensors = t.named_tensors(_arguments(launch))
        passes += (
            sum(found[name].unique for name, tensor in tensors.items() if name in found and _is_wide(tensor, mlp)) / one
        )
        constants = getattr(launch, "constants", {})
        again += 2 * bool(constants.get("GATE") and constants.get("HAS_GRAD") and _products(launch))
    return Moved(len(made), unique, passes, passes + again)


def _is_wide(tensor: torch.Tensor, mlp: MLP) -> bool:
    return tuple(tensor.shape) == (mlp.m, mlp.f)


def _products(launch: Any) -> int:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)).get("PRODUCTS", 0)


def _arguments(launch: Any) -> list[tuple[str, Any]]:
    if not hasattr(launch, "kernel"):
        return list(launch._asdict().items())
    return [*zip(launch.kernel.arg_names, launch.args, strict=False)]


def apart(device: Device, mlp: MLP) -> tuple[Moved, Moved]:
    """Forward and backward of three layers and an activation of one launch each way."""
    m, k, f, n, r, p = mlp
    sizes = ((f, k), (f, k), (n, f))
    ways = zip(*(call_launches(device, m, *size, r, BF16, FP32, p) for size in sizes), strict=True)
    forward, backward = (_moved([launch for made in way for launch in made], mlp) for way in ways)
    one, of_x = m * f * BF16.itemsize, m * k * BF16.itemsize
    # The launches have a bias each, which an MLP of this kind has not.
    biases = (2 * f + n) * BF16.itemsize
    return (
        Moved(
            forward.launches + 1, forward.unique + 3 * one - biases, forward.passes + 3, forward.passes_of_readers + 3
        ),
        Moved(
            backward.launches + 2,
            backward.unique + 5 * one + 3 * of_x,
            backward.passes + 5,
            backward.passes_of_readers + 5,
        ),
    )


def mlp_rows(device: Device, mlp: MLP) -> list[Row]:
    """A row for each direction, by formula."""
    rows = []
    whole = [_moved(made, mlp) for made in launches(device, mlp)]
    for name, before, after in zip(("forward", "backward"), apart(device, mlp), whole, strict=True):
        rows.append({
            "source": "formula", "device": device.arch, "operation": "lora_mlp", "M": mlp.m, "N": f"{mlp.n} by {mlp.f}",
            "K": mlp.k, "r": mlp.r, "dropout": mlp.p, "dtypes": "bf16/fp32", "pass": name, "kernel": "all",
            "launches": after.launches, "launches_apart": before.launches, "unique": after.unique,
            "unique_apart": before.unique, "wide_passes": round(after.passes, 3), "wide_passes_apart": round(before.passes, 3),
            "wide_passes_of_readers": round(after.passes_of_readers, 3),
        })  # fmt: skip
    return rows


def mlp_table(rows: list[Row]) -> list[str]:
    cells = [["M x K x F", "r", "p", "pass", "launches", "unique MB", "[M, F] passes", "each reader counted"]]
    for row in rows:
        f = row["N"].split()[-1]
        cells.append([
            f"{row['M']}x{row['K']}x{f}", str(row["r"]), f"{row['dropout']:g}", row["pass"],
            f"{row['launches_apart']} -> {row['launches']}",
            f"{row['unique_apart'] / 1e6:,.1f} -> {row['unique'] / 1e6:,.1f}",
            f"{row['wide_passes_apart']:g} -> {row['wide_passes']:g}", f"{row['wide_passes_of_readers']:g}",
        ])  # fmt: skip
    return aligned(cells, 4)
