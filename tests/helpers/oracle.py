"""Y, dX, dA and dB of ``lora_linear`` and of whole layers against float64, bounded by eager PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import assert_no_worse
from tests.helpers.case_checks import bytes_held, check_compiled  # noqa: F401  tests outside of ops/ import them from here
from tests.helpers.inputs import SCALING, Inputs

Results = dict[str, Tensor]


def run(inputs: Inputs, backend: str | None = None) -> Results:

    def call(given: Inputs) -> Tensor:
        with slk.use_backend(backend or slk.get_backend()):
            return lora_linear(*(given.get(name) for name in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING)

    return testing.run(call, inputs)


def check(inputs: Inputs, out: Results) -> None:
    """No result is worse than eager's."""
    check_all(out, testing.oracle(inputs, SCALING), testing.eager(inputs, SCALING), inputs["x"].dtype)


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
