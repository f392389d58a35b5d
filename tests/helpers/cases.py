"""Kinds of calls that tests share: small ones, separate calls of one call's projections, and rows
far apart.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.functional import lora_linear
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.testing.cases import (
    BF16,
    FP16,
    FP32,
    Case,
    Operands,
    projections,
)
from stablelora_kernels.testing.inputs import QUANTIZED
from stablelora_kernels.testing.ops.lora_linear import Group
from stablelora_kernels.testing.ops.lora_mlp import MLP

# Of x and the weights, and of A and B.
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)]
# Linux's; Python names it from 3.13 on.
MAP_NORESERVE = 0x4000


def small(op: str, rows: int | tuple[int, ...] = 70, **changes: Any) -> Case:
    """A small call of one of OPS, with x of ``rows`` rows, or of these leading sizes."""
    leading = (rows,) if isinstance(rows, int) else rows
    mlp = Case("mlp", (*leading, 24), (40, 40, 20), (6, 3, 4), scalings=(0.5, 1.5, -0.75))
    found = {
        "linear": Case("linear", (*leading, 24)),
        "branch": Case("branch", (*leading, 24)),
        "group": Case("group", (*leading, 24), (20, 12, 12), (6, 3, 3)),
        **{
            name: Case("linear", (*leading, 64), quantized=(kinds_of(name)[-1],))
            for name in WEIGHTS
        },
        "mlp": mlp,
        "tiled mlp": mlp.but(op=MLP(tile_rows=32)),
    }[op]
    return found.but(**changes)


def kinds_of(name: str) -> list[str]:
    """The kinds of random weights in a format; the usual one comes last."""
    return [kind for kind in QUANTIZED if kind.split()[0] == name]


#: Rows on both sides of each backend's limits. PyTorch's operators run under ordinary autograd with fewer than 64 rows, and
#: without dropout with fewer than 512; from there on they have an autograd function of their own.
FEW, MANY = 5, {"torch": 520, "triton": 70}
#: The kinds of calls that :func:`small` makes.
OPS = ("linear", "branch", "group", "nf4", "mlp", "tiled mlp")
EVERY_OP = (*OPS, *(name for name in WEIGHTS if name not in OPS))


def separately(case: Case, given: Operands) -> tuple[Tensor, ...]:
    """The outputs of separate calls of ``lora_linear``."""
    parts = projections(case, given)

    def layer(x: Tensor, i: int) -> Tensor:
        if parts[i].lora_A is None:
            return torch.nn.functional.linear(x, parts[i].weight, parts[i].bias)
        return lora_linear(x, *parts[i], case.p)

    op = case.description
    assert isinstance(op, Group)
    return op.combined(case, layer, given["x"])


def far(t: Tensor, pitch: int) -> Tensor:
    """``t`` with rows ``pitch`` elements apart, on pages of which few are ever touched."""
    size = ((t.shape[0] - 1) * pitch + t.shape[1]) * t.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    whole = torch.frombuffer(memory, dtype=t.dtype, count=size // t.element_size())
    return whole.as_strided(t.shape, (pitch, 1)).copy_(t)
