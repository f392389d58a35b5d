"""Y, dX, dA and dB of whole layers against float64, bounded by a baseline's own error and by what
rounding allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.reference.rounding import Rounded
from stablelora_kernels.testing import assert_no_worse

Results = dict[str, Tensor]


def check_all(
    out: Results, ref: Results, base: Results, dtype: torch.dtype, roundings: dict[str, Rounded]
) -> None:
    """No result of ``out`` is worse than the baseline ``base``, which somebody else's layer may
    have computed.
    """
    for name, value in out.items():
        assert_no_worse(
            value, ref[name], base[name], dtype=dtype, rounding=roundings[name], name=name
        )


def run_layer(
    layer: Callable[[Tensor], Tensor], x: Tensor, pair: Sequence[Tensor], grad: Tensor
) -> Results:
    """The results of a layer that holds its ``pair`` of A and B itself."""
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *pair), grad.to(y.dtype))
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def layer_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: Sequence[Tensor], grad: Tensor
) -> dict[str, Any]:
    """The arguments of :func:`stablelora_kernels.testing.oracle` and of ``roundings`` for such a
    layer.
    """
    a, b = pair
    return {"x": x, "weight": weight, "bias": bias, "lora_A": a, "lora_B": b, "grad": grad}
