"""Random calls of ``lora_mlp``, as ``test_layer_fuzz`` and ``test_plans_fuzz`` make those of the other ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, DEVICE, DTYPES, FP32
from tests.helpers.launches import recorded_launches, without_plans
from tests.helpers.layer_calls import FP64, LAYOUTS, ROWS, SIZES, check_value, laid_out
from tests.helpers.mlps import ACTIVATIONS, LISTS, MLP, ROUNDINGS, Results, absolute_values, changed

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call's settings by name, in sizes that shrink to the smallest."""
    backend = draw(st.sampled_from(["torch", "triton"]))
    dtypes = draw(st.sampled_from([*DTYPES, (FP64, FP64)] if backend == "torch" else DTYPES))
    shared = draw(st.sampled_from([False, False, True]))
    size, rank = st.sampled_from(SIZES), st.sampled_from([None, 1, 3, 8, 17, 33, 70])
    ranks = [draw(rank) for _ in range(3)]
    left_out = draw(st.sets(st.sampled_from(["dX", "gate.dA", "up.dA", "down.dA", "gate.dB", "up.dB", "down.dB"])))
    # Separate layers draw a shared mask by PyTorch's operators, on Triton too.
    apart = shared and len(left_out & {"gate.dB", "up.dB"}) == 1
    return {
        "backend": backend,
        "dtypes": dtypes,
        "leading": draw(st.sampled_from([(), *[(rows,) for rows in ROWS], (2, 1, 33), (2, 0, 3), (260,)])),
        "sizes": [draw(size) for _ in range(3)],
        "ranks": [ranks[0] or 8, ranks[0] or 8, ranks[2]] if shared else ranks,
        "shared": shared,
        "biases": [draw(st.booleans()) for _ in range(3)],
        "layouts": {name: draw(st.sampled_from(LAYOUTS)) for name in ("x", "grad", *LISTS)},
        "quantized": [draw(st.sampled_from([None, None, None, "nf4", "fp8"])) for _ in range(3)],
        "left_out": left_out,
        "activation": draw(st.sampled_from([*ACTIVATIONS])),
        "scalings": [draw(st.sampled_from([1.0, 1.7, -0.3, 0.0])) for _ in range(3)],
        "p": draw(st.sampled_from([0.0, 0.0, 0.3])) if not apart else 0.0,
        "autocast": draw(st.booleans()) and dtypes[0] != FP64,
        "backward_in_autocast": draw(st.booleans()),
        "kernel": draw(st.sampled_from(["auto", "chained", "split", "vendor"])),
        "in_place": draw(st.booleans()),
        "broken": draw(st.sampled_from([None, None, "x", "grad", *LISTS])),
        "value": draw(st.sampled_from([torch.nan, torch.inf, -torch.inf])),
        "seed": draw(st.integers(0, 99)),
    }


def made(c: dict[str, Any]) -> MLP:
    """The operands, laid out, with one element broken if the call asks for it."""
    k, f, n = c["sizes"]
    rest = (c["ranks"], *c["dtypes"], c["activation"], c["biases"], c["shared"], c["seed"])
    mlp = MLP((*c["leading"], k), f, n, *rest)
    mlp.scalings = c["scalings"]
    mlp.x, mlp.grad = laid_out(mlp.x, c["layouts"]["x"]), laid_out(mlp.grad, c["layouts"]["grad"])
    for name in LISTS:
        setattr(mlp, name, [None if t is None else laid_out(t, c["layouts"][name]) for t in getattr(mlp, name)])
    if c["shared"]:
        mlp.lora_As[1] = mlp.lora_As[0]
    for i, kind in enumerate(c["quantized"]):
        size = mlp.weights[i].shape
        if kind == "nf4":
            mlp.weights[i] = testing.nf4_weight(*size, 64, c["seed"] % 2 == 0)
        elif kind == "fp8":
            mlp.weights[i] = testing.fp8_weight(*size)
    if is_broken(c):
        target = getattr(mlp, c["broken"])
        target = target[c["seed"] % 3] if isinstance(target, list) else target
        if isinstance(target, Tensor) and target.numel():
            target[(0,) * target.dim()] = c["value"]
    return mlp


def is_broken(c: dict[str, Any]) -> bool:
    # An expanded tensor has one element for many.
    return bool(c["broken"]) and not c["p"] and c["layouts"][c["broken"]] != "expanded"


def compute(c: dict[str, Any], mlp: MLP) -> Results:
    leaves = mlp.leaves([name for name in mlp.wanted if name not in c["left_out"]])
    torch.manual_seed(c["seed"])
    with torch.autocast(DEVICE, BF16, enabled=c["autocast"]):
        y = mlp.call(*leaves, p=c["p"])
    found = {"Y": y.detach().clone()}
    if not y.requires_grad:
        return found
    # Its gradient is that of the output before.
    y = y.add_(1) if c["in_place"] else y
    with torch.autocast(DEVICE, BF16, enabled=c["backward_in_autocast"]):
        return mlp.results(y, leaves) | found


def as_computed(mlp: MLP, dtype: torch.dtype) -> MLP:
    """The values that the op computes with. Float32 A and B are cast on the fly, with autocast or without."""
    return changed(mlp, lambda name, t: t if name.startswith("lora_") and t.dtype == FP32 else t.to(dtype))


@settings(max_examples=settings.default.max_examples // 2)
@given(calls())
def test_calls_are_no_worse_than_eager(c: dict[str, Any]) -> None:
    mlp = made(c)
    with slk.use_backend(c["backend"]), slk.use_kernel(c["kernel"]):
        found = compute(c, mlp)
        keeps, p = mlp.masks(c["p"], c["seed"])
    low = as_computed(mlp, found["Y"].dtype)
    ref, eager, absolute = low.oracle(keeps, p), low.eager(keeps, p), absolute_values(low).oracle(keeps, p)
    lowered = c["autocast"] or (c["backward_in_autocast"] and c["dtypes"][0] != FP64)
    eps = ROUNDINGS * EPS[BF16 if lowered else c["dtypes"][0]]
    assert set(found) - {"Y"} <= set(mlp.wanted) - c["left_out"]
    for name, value in found.items():
        check_value(name, value, ref[name], eager[name], absolute[name], eps, is_broken(c))


def run(c: dict[str, Any]) -> tuple[list[Any], Results]:
    """The call's launches and results."""
    mlp = made(c)
    lists = {name: getattr(mlp, name) for name in LISTS} | {"x": [mlp.x]}
    named = {
        t.data_ptr(): f"{name}{i}"
        for name, tensors in lists.items()
        for i, t in enumerate(tensors)
        if isinstance(t, Tensor) and t.numel()
    }
    with slk.use_backend("triton"), slk.use_kernel(c["kernel"]), recorded_launches(named) as launches:
        return launches, compute(c, mlp)


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy(force=True).tobytes()


@settings(max_examples=settings.default.max_examples // 10)
@given(calls().filter(lambda c: c["backend"] == "triton"))
def test_prepared_launches_are_the_first_ones(c: dict[str, Any]) -> None:
    """Remembered, prepared, found: with the operands elsewhere each time."""
    plans.clear()
    with without_plans():
        expected, results = run(c)
    for _ in range(3):
        found, values = run(c)
        assert found == expected
        assert values.keys() == results.keys()
        for name, value in values.items():
            assert bits(value) == bits(results[name]), (name, c)
