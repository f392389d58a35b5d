"""Y, dX, dA and dB of whole layers against float64, bounded by a baseline's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.testing import assert_no_worse

Results = dict[str, Tensor]


def check_all(out: Results, ref: Results, base: Results, dtype: torch.dtype) -> None:
    """No result of ``out`` is worse than the baseline ``base``, which somebody else's layer may have computed."""
    for name, value in out.items():
        assert_no_worse(value, ref[name], base[name], dtype=dtype, name=name)


def run_layer(layer: Callable[[Tensor], Tensor], x: Tensor, pair: Sequence[Tensor], grad: Tensor) -> Results:
    """The results of a layer that holds its ``pair`` of A and B itself."""
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *pair), grad.to(y.dtype))
    return {"Y": y.detach(), **dict(zip(("dX", "dA", "dB"), grads, strict=True))}


def layer_oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: Sequence[Tensor], grad: Tensor, scaling: float
) -> Results:
    """The results of such a layer in float64."""
    a, b = pair
    return testing.oracle({"x": x, "weight": weight, "bias": bias, "lora_A": a, "lora_B": b, "grad": grad}, scaling)
