"""Prepared launches: which calls share them, when they are prepared, and that nothing keeps what a
call was given.

``tests/fuzz/test_plans_fuzz.py`` compares random calls, and ``tests/kernels/test_null_driver.py``
Triton's own launcher.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import stablelora_kernels as slk
from stablelora_kernels import functional
from stablelora_kernels.launch.workspace import Workspace
from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    Case,
    forced,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.inputs import QUANTIZED
from stablelora_kernels.testing.ops.lora_linear import on_device
from tests.helpers.case_checks import assert_close, run_recorded
from tests.helpers.cases import OPS, small
from tests.helpers.launches import count_launches, without_plans
from tests.helpers.operators import Operators
from tests.helpers.precision import switched

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from stablelora_kernels.launch import lora_linear as linear_launches
from stablelora_kernels.launch import prepared as prepared_launches


@pytest.fixture(autouse=True)
def on_triton():
    with slk.settings(backend="triton"):
        yield
    torch._dynamo.reset()


# Which calls share them.


CALL = Case("linear", (70, 64), (48,), (8,), BF16, FP32)
MLP = {
    "op": "mlp",
    "sizes": (48, 48, 32),
    "ranks": (8, 8, 4),
    "scalings": (2.0, 1.5, 0.5),
    "p": 0.2,
}
# Two calls that differ in one thing on which launches depend, by how each differs from CALL.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shape": ({}, {"shape": (76, 64)}),
    "strides of an operand": ({}, {"layouts": {"lora_A": "transposed"}}),
    "strides of a gradient": ({}, {"layouts": {"grad": "transposed"}}),
    "dtype": ({}, {"dtype": FP16}),
    "alignment of an operand": ({}, {"layouts": {"x": "shifted"}}),
    "alignment of a gradient": ({}, {"layouts": {"grad": "shifted"}}),
    "a view whose memory holds the values times -1": ({}, {"layouts": {"x": "negated"}}),
    "requires_grad": ({"wanted": ["x", "lora_A0"]}, {}),
    "wanted gradients": ({}, {"wanted": ["x", "lora_B0"]}),
    "scaling": ({}, {"scalings": (2.5,)}),
    "sign of a zero": ({"scalings": (0.0,)}, {"scalings": (-0.0,)}),
    "dropout": ({"p": 0.2}, {"p": 0.3}),
    "training": ({"p": 0.2}, {"p": 0.2, "training": False}),
    "grad mode": ({"within": torch.no_grad}, {}),
    "backend": ({}, {"backend": "torch"}),
    "strategy": ({}, {"strategy": "branch_first"}),
    "a mask that gate and up share": (MLP, MLP | {"shared": True}),
} | {
    name: ({"dtype": FP32}, {"dtype": FP32, "within": partial(switched, name)})
    for name in ("set_float32_matmul_precision('high')", "backends.fp32_precision = 'tf32'")
}  # fmt: skip


def called(
    within: Callable[[], Any] = nullcontext, **changes: Any
) -> tuple[list[Any], dict[str, Tensor]]:
    with within():
        return run_recorded(CALL.but(**changes))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_call_does_not_take_anothers_launches(pair):
    first, other = PAIRS[pair]
    with without_plans():
        (before, _), (launches, results) = called(**first), called(**other)
    assert before != launches
    for _ in range(3):
        called(**first)
    found, values = called(**other)
    assert found == launches
    assert_close(values, results)


class _Subclass(Tensor):
    pass


UNUSUAL = {
    "dispatch mode": lambda x: (Operators(), (x,)),
    "function mode": lambda x: (BaseTorchFunctionMode(), (x,)),
    "forward-mode gradients": lambda x: (torch.autograd.forward_ad.dual_level(), (x,)),
    "subclass": lambda x: (nullcontext(), (x.as_subclass(_Subclass),)),
    "sparse": lambda x: (nullcontext(), (x.to_sparse(),)),
    "nested": lambda x: (nullcontext(), (torch.nested.nested_tensor([x, x]),)),
    "empty": lambda x: (nullcontext(), (x[:0],)),
    "meta": lambda x: (nullcontext(), (x.to("meta"),)),
    "a tensor for a number": lambda x: (nullcontext(), (x, [object()])),
    "no tensor": lambda x: (nullcontext(), (1.0, None)),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_call_has_no_key(what):
    x = torch.ones(3, 5, device=DEVICE)
    assert plans.key_of("kind", (x, 0.0)) is not None
    within, args = UNUSUAL[what](x)
    with within:
        assert plans.key_of("kind", args) is None


@pytest.mark.parametrize("captures", [False, True])
def test_a_call_that_a_graph_records_is_unusual(captures, monkeypatch):
    """A prepared launch counts where eager ones do."""

    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(plans, "_describe", lambda args, key: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    assert plans.key_of("kind", (torch.zeros(2),)) is not None
    key = plans.key_of("kind", (torch.zeros(2).as_subclass(OnGpu),))
    assert (key is None) == captures


def test_transformed_and_traced_calls_have_no_key():
    keys: list[Any] = []

    def look(x):
        keys.append(plans.key_of("kind", (x,)))
        return x * 2

    x = torch.ones(3, device=DEVICE)
    torch.func.vmap(look)(x[None])
    torch.func.jacrev(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    torch.compile(look, backend="eager", fullgraph=True)(x)
    assert len(keys) >= 4 and not any(keys)


# When they are prepared.


def everything() -> tuple[nn.ModuleDict, Callable[[Tensor], Tensor]]:
    """A model with each op, and its forward."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj", "down_proj")
    model = nn.ModuleDict({name: nn.Linear(64, 64, device=DEVICE, dtype=BF16) for name in names})
    slk.apply_lora(model, names, r=8, lora_dropout=0.1, fuse_projections=True)
    for layer in model.values():
        nn.init.normal_(layer.lora_B)
    weights = [
        functional.LoRAWeights(m.weight, m.bias, m.lora_A, m.lora_B, m.scaling)
        for m in model.values()
    ]
    stored = on_device(QUANTIZED["nf4"](64, 64), DEVICE)

    def forward(x):
        x = x + sum(model[name](x) for name in names[:3])
        x = functional.lora_branch(2 * x, x, *weights[3][2:])
        x = functional.lora_linear(model["down_proj"](x), stored, *weights[3][1:])
        return functional.lora_mlp(x, *weights[:3], "silu")

    return model, forward


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_after_the_second_round_nothing_is_prepared(compiled):
    """By no op, also where a compiled graph calls it without this library's Python before it."""
    x, (model, forward) = torch.randn(70, 64, device=DEVICE, dtype=BF16), everything()
    forward = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward

    def results():
        torch.manual_seed(1)
        model.zero_grad()
        y = forward(x)
        y.float().square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    with without_plans(), count_launches() as launches:
        expected = results()
    for _ in range(2):
        results()
    again = mock.patch.object(
        plans.PlannedOp, "_prepare", side_effect=AssertionError("prepared again")
    )
    with again, count_launches() as made:
        found = results()
    assert made == launches
    # Forward and backward of a group, a branch, an MLP, a layer, and one with a quantized weight.
    assert len(prepared()) == 10
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def layer_and_x(**options: Any) -> tuple[slk.LoRALinear, Tensor]:
    torch.manual_seed(0)
    layer = slk.LoRALinear(
        64, 96, r=8, device=DEVICE, dtype=BF16, init_lora_weights=False, **options
    )
    return layer, torch.randn(130, 64, device=DEVICE, dtype=BF16)


def prepared():
    """An op's key and that of the function which calls it share what is prepared."""
    return {entry.prepared for entry in plans._young.values() if entry.prepared}


def test_the_second_call_prepares_and_layers_of_one_shape_share():
    """And nothing that is prepared keeps a tensor."""
    for count in (0, 2, 2):
        layer, x = layer_and_x(lora_dropout=0.1)
        y = layer(x.requires_grad_())
        y.sum().backward()
        assert len(prepared()) == count
    alive = [weakref.ref(t) for t in (x, y, layer.weight, layer.lora_A, layer.lora_A.grad)]
    del x, y, layer
    gc.collect()
    assert not any(t() is not None for t in alive)


def test_the_table_is_bounded_and_keeps_what_is_used(monkeypatch):
    monkeypatch.setattr(plans, "LIMIT", 8)
    kept = plans.remember(("kept",), "triton")
    for i in range(100):
        plans.remember((i,), "triton")
        assert plans.find(("kept",)) is kept
        assert len(plans._young) + len(plans._old) <= 8
    assert plans.find((0,)) is None


def test_parts_of_the_scratch_memory_begin_at_aligned_addresses():
    """A GPU reads 16 bytes at a time there. All parts are one allocation; these have 12, 10 and 256
    bytes.
    """
    taken = Workspace()
    taken.scratch = [torch.empty(3), torch.empty(5, dtype=BF16), torch.empty(64)]
    tensors = prepared_launches._CallTensors([torch.empty(4)], [torch.empty(4)], taken)
    offsets = [tensors.view(memory).offset for memory in taken.scratch]
    assert offsets == [0, 256, 512] and tensors.scratch_bytes == 768


@pytest.mark.parametrize("op", OPS)
def test_without_rows_nothing_is_launched_or_prepared(op):
    """Gradients of A and B are zeros."""
    case = small(op, 0, p=0.2)
    with count_launches() as made:
        for _ in range(3):
            found = run(case)
    assert not made and not prepared() and not plans._young
    of_branches = [found[name] for name in case.wanted_names if name.startswith("lora_")]
    assert all(grad.numel() and not grad.any() for grad in of_branches)


def test_the_profiler_shows_the_op():
    layer, x = layer_and_x()
    for _ in range(3):
        with torch.profiler.profile() as profile:
            layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"stablelora_kernels::lora_linear_fwd", "stablelora_kernels::lora_linear_bwd"} <= names


# What a later call may change.


@pytest.mark.parametrize("op", OPS)
def test_a_changed_saved_tensor_is_looked_at_again(op):
    """Saved-tensor hooks may give backward tensors of another layout."""

    def turned(t):
        return t.t().contiguous().t() if t.dim() == 2 else t

    def hooked(case: Case, leaf: dict[str, Any]) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
            return ours(case, leaf)

    case = small(op, dtype=BF16)
    for _ in range(3):
        expected = run(case)
    assert_close(run(case, call=hooked), expected, 1e-2)


def test_operands_that_were_one_tensor_may_be_two():
    """A projection group's gradients are one tensor in the first rounds, and three later."""
    case = Case("group", (70, 64), (96, 96, 96), (8, 8, 8), BF16, FP32)
    given = make(case)
    one = {f"grad{i}": given["grad0"] for i in range(3)}
    for _ in range(2):
        run(case, given | one)
    found = run(case, given)
    with without_plans():
        assert_close(found, run(case, given))


def test_a_copy_that_a_launcher_makes_is_made_in_each_call():
    """Kernels take no stride of a bias, so its launcher copies a strided one: its launches cannot
    be prepared.
    """
    given = make(CALL.but(layouts={"bias": "every second"}))
    for _ in range(4):
        given["bias0"].mul_(2)
        found = ours(CALL, given)
        with without_plans():
            assert torch.equal(found[0], ours(CALL, given)[0])


def test_a_group_computes_its_s_once(monkeypatch):
    """In one launch, which reads x once; the products read what it stored."""
    case = small("group", 70, strategy="one_launch", arch="sm_80")
    given = leaves(case, make(case))
    computes_s = []
    linear = linear_launches.linear

    def spy(*args, chained=False, **options):
        computes_s.append(chained)
        return linear(*args, chained=chained, **options)

    monkeypatch.setattr(linear_launches, "linear", spy)
    with forced(case), count_launches() as made:
        ours(case, given)
    assert made == {"_lora_down_kernel": 1, "_lora_linear_kernel": 3}
    assert computes_s == [False] * 3
