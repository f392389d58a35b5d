"""Y, dX, dA and dB of whole layers against float64, bounded by a baseline's own error and by what
rounding allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stablelora_kernels.quantized import QuantizedWeight
from stablelora_kernels.testing import SLOPES
from stablelora_kernels.testing.cases import Case, Results
from stablelora_kernels.testing.expectations import expectations


def run_layer(
    layer: Callable[[Tensor], Tensor], x: Tensor, pair: Sequence[Tensor], grad: Tensor
) -> Results:
    """The results of a layer that holds its ``pair`` of A and B itself, as a :class:`Case` names
    them.
    """
    y = layer(x)
    dx, da, db = torch.autograd.grad(y, (x, *pair), grad.to(y.dtype))
    return {"Y0": y.detach(), "x": dx, "lora_A0": da, "lora_B0": db}


def check_layer(
    results: Results,
    baseline: Results,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    pair: Sequence[Tensor],
    grad: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> None:
    """No result of a layer that multiplies in ``dtype`` is worse than the ``baseline``, which
    somebody else's layer may have computed.
    """
    lora_A, lora_B = pair
    operands = {
        "x": x,
        "weight0": weight,
        "bias0": bias,
        "lora_A0": lora_A,
        "lora_B0": lora_B,
        "grad0": grad,
    }
    case = Case(
        shape=tuple(x.shape),
        sizes=(lora_B.shape[0],),
        ranks=(lora_A.shape[0],),
        dtype=dtype,
        scalings=(scaling,),
    )
    expected = expectations(case, operands, baseline=baseline)
    for name, value in results.items():
        expected[name]._replace(dtype=dtype, slope=SLOPES[dtype]).check(value, name)
