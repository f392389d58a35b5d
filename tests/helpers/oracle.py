"""Y, dX, dA and dB of ``lora_linear`` and of whole layers against float64, bounded by eager PyTorch's own error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.functional import lora_branch, lora_linear
from stablelora_kernels.testing import assert_no_worse, error_and_bound
from tests.helpers.case_checks import bytes_held, check_compiled  # noqa: F401  tests outside of ops/ import them from here
from tests.helpers.inputs import SCALING, Inputs

Results = dict[str, Tensor]
DIFFERENTIATED = ("x", "lora_A", "lora_B")


def leaves(inputs: Inputs, wanted: Iterable[str] = DIFFERENTIATED) -> Inputs:
    """``inputs``, of which only those ``wanted`` require gradients, with the strides they came in."""
    return {
        name: value.detach().requires_grad_(name in wanted) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def call(inputs: Inputs, p: float = 0.0, backend: str | None = None) -> Tensor:
    """Ours: ``lora_linear``, or ``lora_branch`` where ``inputs`` have a ``base_out``."""
    x, a, b = (inputs[name] for name in DIFFERENTIATED)
    with slk.use_backend(backend or slk.get_backend()):
        if "base_out" in inputs:
            return lora_branch(inputs["base_out"], x, a, b, SCALING, p)
        return lora_linear(x, inputs["weight"], inputs.get("bias"), a, b, SCALING, p)


def run(inputs: Inputs, backend: str | None = None, p: float = 0.0) -> Results:
    return testing.run(lambda given: call(given, p, backend), inputs)


def check(inputs: Inputs, out: Results, keep: Tensor | None = None, p: float = 0.0) -> tuple[float, str]:
    """No result of ``out``, which may be some of them, is worse than eager's, and each has its input's dtype.

    Returns the largest error as a share of its bound, and the name of that result.
    """
    ref, base = (results(inputs, SCALING, keep, p) for results in (testing.oracle, testing.eager))
    like = {"Y": inputs.get("base_out", inputs["x"]), "dX": inputs["x"], "dA": inputs["lora_A"], "dB": inputs["lora_B"]}
    if "dBASE" in out:
        # base_out is only added to.
        assert torch.equal(out["dBASE"], inputs["grad"])
    largest = 0.0, ""
    for name, value in ((name, value) for name, value in out.items() if name != "dBASE"):
        assert value.dtype == like[name].dtype, name
        # Gradients are products in x's dtype; the output is rounded to base_out's.
        dtype = value.dtype if name == "Y" else inputs["x"].dtype
        assert_no_worse(value, ref[name], base[name], dtype=dtype, name=name)
        error, bound = error_and_bound(value, ref[name], base[name], dtype)
        largest = max(largest, (error / bound if bound else 0.0, name))
    return largest


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
