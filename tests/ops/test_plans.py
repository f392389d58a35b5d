"""Prepared launches: when they are prepared, and that nothing keeps what a call was given.

``tests/fuzz/test_plans_fuzz.py`` compares random calls, and ``tests/kernels/test_null_driver.py`` Triton's own launcher.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.ops import plans
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32, make_inputs
from tests.helpers.launches import count_launches, without_plans

pytest.importorskip("triton", reason="Triton is not installed on this platform")

OPERANDS = ("x", "weight", "bias", "lora_A", "lora_B")


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with slk.use_backend("triton"):
        yield


def test_bad_input_raises_from_a_warm_cache_as_from_a_cold_one() -> None:
    inputs = make_inputs((130, 64), 96, 8, dtype=BF16, lora_dtype=FP32)
    good = {name: inputs[name] for name in OPERANDS} | {"scaling": 1.7, "dropout_p": 0.0, "training": False}
    bad = {
        "x": good["x"][:, :63],
        "weight": good["weight"][:95],
        "bias": good["bias"].float(),
        "lora_A": good["lora_A"][:7],
        "lora_B": good["lora_B"].to(FP16),
        "dropout_p": 1.0,
    }
    messages = {}
    for warm in (False, True):
        for name, value in bad.items():
            with pytest.raises((ValueError, TypeError)) as raised:
                lora_linear(**(good | {name: value}))
            assert messages.setdefault(name, str(raised.value)) == str(raised.value)
        for _ in range(3 * (not warm)):
            lora_linear(**good)


def _layer(**options: Any) -> slk.LoRALinear:
    torch.manual_seed(0)
    return slk.LoRALinear(64, 96, r=8, device=DEVICE, dtype=BF16, init_lora_weights=False, **options)


def _prepared() -> set[Any]:
    """An op's key and that of the function which calls it share what is prepared."""
    return {entry.prepared for entry in plans._table.young.values() if entry.prepared}


def test_the_second_call_prepares_and_layers_of_one_shape_share() -> None:
    x = torch.randn(130, 64, device=DEVICE, dtype=BF16)
    layers = [_layer() for _ in range(3)]
    for layer, prepared in zip(layers, (0, 2, 2), strict=True):
        layer(x).sum().backward()
        assert len(_prepared()) == prepared


def test_a_moved_parameter_is_read_where_it_is() -> None:
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16), _layer()
    for _ in range(3):
        y = layer(x)
    for parameter in (layer.weight, layer.lora_A, layer.lora_B):
        parameter.data = parameter.data.clone()
    assert torch.equal(layer(x), y)
    layer.lora_A.data = -layer.lora_A.data
    with without_plans():
        expected = layer(x)
    assert torch.equal(layer(x), expected) and not torch.equal(expected, y)


def test_a_plan_keeps_no_tensor() -> None:
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16, requires_grad=True), _layer(lora_dropout=0.1)
    y = None
    for _ in range(3):
        y = layer(x)
        y.sum().backward()
    assert len(_prepared()) == 2
    alive = [weakref.ref(t) for t in (x, y, layer.weight, layer.lora_A, layer.lora_A.grad)]
    del x, y, layer
    gc.collect()
    assert not any(t() is not None for t in alive)


def test_copies_and_pickles_hold_no_plan() -> None:
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16), _layer()
    before = set(layer.__dict__)
    for _ in range(3):
        y = layer(x)
    assert set(layer.__dict__) == before
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(layer)))(x), y)


def test_the_table_is_bounded_and_keeps_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LIMIT", 8)
    kept = plans.remember(("kept",), "triton")
    for i in range(100):
        plans.remember((i,), "triton")
        assert plans.find(("kept",)) is kept
        assert len(plans._table.young) + len(plans._table.old) <= 8
    assert plans.find((0,)) is None


def test_a_changed_saved_tensor_is_looked_at_again() -> None:
    """Saved-tensor hooks may give backward tensors of another layout."""
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16), _layer()
    for _ in range(3):
        layer(x).sum().backward()
    layer.zero_grad()
    layer(x).sum().backward()
    expected = layer.lora_A.grad.clone()
    layer.zero_grad()

    def unpack(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, expected, rtol=1e-2, atol=1e-2)


def test_operands_that_were_one_tensor_may_be_two() -> None:
    """A projection group's gradients are one tensor in the first rounds, and three later."""
    x = torch.randn(70, 64, device=DEVICE, dtype=BF16)
    members = [make_inputs((70, 64), 96, 8, dtype=BF16, lora_dtype=FP32, seed=i) for i in range(3)]
    lists = [[inputs[name] for inputs in members] for name in ("weight", "bias", "lora_A", "lora_B")]
    for t in (*lists[2], *lists[3]):
        t.requires_grad_()
    one = torch.randn(70, 96, device=DEVICE, dtype=BF16)
    for grads in ([one] * 3, [one] * 3, [one * scale for scale in (1, 2, 3)]):
        ys = functional.lora_linear_group(x, *lists, [1.0] * 3)
        found = torch.autograd.grad(ys, lists[2], grads)
    with without_plans():
        expected = torch.autograd.grad(functional.lora_linear_group(x, *lists, [1.0] * 3), lists[2], grads)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_copy_that_a_launcher_makes_is_made_in_each_call() -> None:
    """Kernels take no stride of a bias, so its launcher copies a strided one: its launches cannot be prepared."""
    inputs = make_inputs((130, 64), 96, 8, dtype=BF16, lora_dtype=FP32)
    inputs["bias"] = torch.randn(192, device=DEVICE).to(BF16)[::2]
    for _ in range(4):
        inputs["bias"].mul_(2)
        y = lora_linear(*(inputs[name] for name in OPERANDS), 1.0)
        with without_plans():
            assert torch.equal(y, lora_linear(*(inputs[name] for name in OPERANDS), 1.0))
    assert [entry.prepared for entry in plans._table.young.values()] == [False, False]


def test_the_profiler_shows_the_op() -> None:
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16), _layer()
    for _ in range(3):
        layer(x).sum().backward()
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"stablelora_kernels::lora_linear_fwd", "stablelora_kernels::lora_linear_bwd"} <= names


def test_second_derivatives_raise_from_a_warm_cache() -> None:
    x, layer = torch.randn(130, 64, device=DEVICE, dtype=BF16, requires_grad=True), _layer()
    for _ in range(3):
        layer(x).sum().backward()
    (grad,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()


def test_every_op_uses_plans() -> None:
    """A projection group, a branch, a gated MLP and a quantized weight: after the second round nothing is prepared."""
    x = torch.randn(70, 64, device=DEVICE, dtype=BF16, requires_grad=True)
    model = nn.ModuleDict(
        {name: nn.Linear(64, 96, device=DEVICE, dtype=BF16) for name in ("q_proj", "k_proj", "v_proj")}
    )
    slk.apply_lora(model, slk.LoRAConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]), fuse_projections=True)
    base, weight = nn.Linear(64, 96, device=DEVICE, dtype=BF16), slk.testing.nf4_weight(96, 64, 64, True)
    a, b = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((8, 64), (96, 8)))
    up = functional.LoRAWeights(base.weight.detach(), None, a, b, 1.0)
    down = functional.LoRAWeights(
        base.weight.detach().t().contiguous(), None, b.detach().t().contiguous(), a.detach().t(), 1.0
    )

    def everything() -> None:
        loss = sum(layer(x).sum() for layer in model.values())
        loss = loss + functional.lora_branch(base(x), x, a, b, 1.0).sum()
        loss = loss + functional.lora_mlp(x, up._replace(lora_A=a.clone(), lora_B=b.clone()), up, down, "silu").sum()
        if DEVICE == "cpu":
            loss = loss + lora_linear(x, weight, None, a, b, 1.0).sum()
        loss.backward()

    counts = []
    for _ in range(3):
        with count_launches() as launches:
            everything()
        counts.append(launches)
    assert counts[0] == counts[1] == counts[2]
    kinds = {key[0].removeprefix("stablelora_kernels::") for key, entry in plans._table.young.items() if entry.prepared}
    ops = {"lora_linear_group", "lora_branch", "lora_mlp"}
    ops |= {f"{op}_bwd" for op in ops}
    assert kinds >= (ops | {"lora_linear", "lora_linear_quantized_bwd"} if DEVICE == "cpu" else ops)
    made = len(plans._table.young)
    with mock.patch.object(plans.PlannedOp, "_prepare", side_effect=AssertionError("a miss")):
        everything()
    assert len(plans._table.young) == made
