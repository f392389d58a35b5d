"""Random calls of the layer's ops against float64. The bound is twice eager PyTorch's own error, and one rounding of the sum of
absolute values, two where the rows of an operand are one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.ops.torch_path import draw_keep
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, DEVICE, Inputs
from tests.helpers.layer_calls import FP64, calls, check_value, compute, inputs_of, is_broken

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]


def as_computed(c: dict[str, Any], inputs: Inputs, y: Tensor) -> Inputs:
    """The values that the op computes with: cast by autocast, contiguous."""
    dtype = BF16 if c["autocast"] else inputs["x"].dtype

    def cast(name: str, t: Any) -> Any:
        if not isinstance(t, Tensor) or name == "base_out":
            return t
        if name == "grad":
            return t.to(y.dtype)
        # Float32 A and B are cast on the fly, with or without autocast.
        return t if name.startswith("lora_") and t.dtype == torch.float32 else t.to(dtype)

    return {name: cast(name, t) for name, t in inputs.items()}


def by_formula(c: dict[str, Any], inputs: Inputs, keep: Tensor | None, p: float) -> tuple[dict[str, Tensor], ...]:
    """Results in float64, of eager PyTorch, and in float64 of the absolute values, whose sums bound a rounding."""
    named = {"dX": "x", "dA": "lora_A", "dB": "lora_B", "dBASE": "base_out"}
    absolute = {name: t.abs() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    if isinstance(absolute.get("weight"), (slk.functional.NF4Weight, slk.functional.FP8Weight)):
        absolute["weight"] = testing.dequantized_ref(inputs["weight"]).abs()
    found = []
    for results, values, dtype in (
        (testing.oracle(inputs, c["scaling"], keep, p), inputs, FP64),
        (testing.eager(inputs, c["scaling"], keep, p), inputs, inputs["x"].dtype),
        (testing.oracle(absolute, abs(c["scaling"]), keep, p), absolute, FP64),
    ):
        grad, x = (values[name].to(dtype).reshape(-1, values[name].shape[-1]) for name in ("grad", "x"))
        results = {named.get(name, name): t for name, t in results.items()}
        found.append(results | {"weight": grad.T @ x, "bias": grad.sum(0), "base_out": values["grad"]})
    return tuple(found)


def masks(c: dict[str, Any], x: Tensor, count: int) -> list[tuple[Tensor | None, float]]:
    """The masks that the projections draw, in their order, from the seed before the call."""
    if not c["p"]:
        return [(None, 0.0)] * count
    torch.manual_seed(c["seed"])
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    drawn = []
    for _ in range(count):
        if c["backend"] == "triton":
            seed = int(torch.randint(2**63 - 1, (1,), device=DEVICE))
            drawn.append((dropout_keep_ref(*rows.shape, c["p"], seed).to(DEVICE).view(x.shape), c["p"]))
        else:
            keep, p = draw_keep(rows, c["p"])
            drawn.append((keep.view(x.shape), p))
    return drawn


# A call takes a tenth of what a sequence of optimizer steps does.
@settings(max_examples=max(150, settings.default.max_examples))
@given(calls())
def test_calls_are_no_worse_than_eager(c: dict[str, Any]) -> None:
    members = [inputs_of(c, i) for i in range(c["members"] if c["op"] == "group" else 1)]
    broken = is_broken(members)
    torch.manual_seed(c["seed"])
    with slk.use_backend(c["backend"]), slk.use_kernel(c["kernel"]):
        found = compute(c, members)
    drawn = masks(c, members[0]["x"], len(members))
    expected = []
    for inputs, results, (keep, p) in zip(members, found, drawn, strict=True):
        shared = inputs | {"x": members[0]["x"]}
        expected.append(by_formula(c, as_computed(c, shared, results["Y"]), keep, p))
    # Below some rows autograd calls plain operators, which a backward inside autocast runs in bfloat16.
    lowered = c["autocast"] or (c["backward_in_autocast"] and c["dtypes"][0] != FP64)
    eps = EPS[BF16 if lowered else c["dtypes"][0]]
    if "expanded" in c["layouts"].values():
        # Where all rows of an operand are one, so are the roundings of what comes from it, and add up like what they round.
        eps *= 2
    if c["dtypes"][0] == FP64:
        # The oracle rounds as well.
        eps *= 4
    # All projections add to the gradient of the x that they share.
    total = [sum(each[i]["x"].double() for each in expected) for i in range(3)]
    for results, each in zip(found, expected, strict=True):
        for name, value in results.items():
            ref, eager, absolute = total if name == "x" else [part[name] for part in each]
            check_value(name, value, ref, eager, absolute, eps, broken)
