"""Gated MLPs in one op, with our layers and PEFT's: the numbers of the same MLP without, and what
an MLP keeps of itself.
"""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from stablelora_kernels.nn.fused_mlp import unfuse_mlps
from stablelora_kernels.testing import EPS, fp8_weight, nf4_weight
from stablelora_kernels.utils.memory import saved_for_backward
from tests.helpers.gated_mlps import (
    LIBRARIES,
    MLP,
    WIDTH,
    Stacked,
    adapted,
    assert_same,
    mlp_of,
    pair,
    reported_pair,
    rows,
    step,
)
from tests.helpers.quantized_weights import Linear4bit, bnb_4bit, fp8_linear, torchao

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*"
)
each_library = pytest.mark.parametrize("library", LIBRARIES)


MAKERS = {
    "as in Llama": MLP,
    "biases": lambda: MLP(bias=True),
    "stacked": Stacked,
    "stacked, up first": lambda: Stacked(up_first=True),
}
MADE = [(library, name, "all") for library in LIBRARIES for name in MAKERS]
# A projection without an adapter loses its branch only.
SOME = ["gate_proj", "up_proj|down_proj", "down_proj", "gate_proj|up_proj"]
MADE += [(library, "as in Llama", targets) for library in LIBRARIES for targets in SOME]


@pytest.mark.covering(1)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("library", "make", "targets"), MADE)
def test_on_both_backends(library, make, targets, dropout, backend, calls):
    dtype, tolerance = (FP32, 1e-4) if backend == "triton" else (FP64, 1e-10)
    some = {} if targets == "all" else {"targets": rf"(.*\.)?({targets})"}
    model, plain = (each.to(dtype) for each in pair(MAKERS[make], library, dropout=dropout, **some))
    # In a first layer whose attention has no adapter, x needs no gradient.
    for x in (rows(dtype), rows(dtype).detach()):
        calls.clear()
        found = step(model, x)
        assert len(calls.mlps) == 1 and ("x" in found) == x.requires_grad
        assert_same(found, step(plain, x), tolerance)


def test_other_arguments(calls):
    """By keyword; no rows, one row; and what the forward does not take is its own error."""
    mlp, own = (mlp_of(model) for model in pair(MLP))
    for x in (rows(), rows()[:0], rows()[0], rows()[0, 0], rows()[:, :1].expand(2, 40, WIDTH)):
        torch.testing.assert_close(mlp(x=x), own(x))
    assert len(calls.mlps) == 5
    for bad in ({"y": rows()}, {"x": rows(), "y": 1}, {}):
        with pytest.raises(TypeError, match="argument"):
            mlp(**bad)


BASES = {
    "nf4": lambda linear: Linear4bit(nf4_weight(64, 64, 64, nested=True), True, None),
    "nf4 computing in bfloat16": lambda linear: Linear4bit(
        nf4_weight(64, 64, 64, nested=True), True, BF16
    ),
    "fp8": lambda linear: fp8_linear(fp8_weight(64, 64), BF16),
    "NVFP4": lambda linear: torchao(linear, "NVFP4WeightOnlyConfig"),
    "bitsandbytes": bnb_4bit,
}
QUANTIZED = [("ours", kind) for kind in (*BASES, "nf4 and plain")] + [("PEFT", "bitsandbytes")]


@pytest.mark.parametrize(("library", "kind"), QUANTIZED)
def test_quantized_weights(library, kind, backend, calls):
    """PEFT's layers are read by Triton's kernels alone; on PyTorch's operators the base layer
    computes its product.
    """
    dtype = BF16 if kind in ("fp8", "nf4 and plain") else FP32

    def make():
        module = MLP(width=64, inner=64).to(dtype)
        for name in ("gate_proj", "up_proj", "down_proj")[: 2 if kind == "nf4 and plain" else 3]:
            setattr(module, name, BASES[kind.partition(" and")[0]](getattr(module, name)))
        module.is_loaded_in_4bit = kind == "bitsandbytes"
        return module

    (model, report), (plain, _) = reported_pair(make, library, dropout=0.2)
    is_read, x = library == "ours" or backend == "triton", torch.randn(70, 64).to(dtype)
    if not is_read:
        reason = "'gate_proj' has a quantized weight, and without Triton its Linear4bit computes the product"
        assert report.mlps[0].reason == reason
    # Its first call may choose how it computes.
    with torch.no_grad():
        model(x), plain(x)
    calls.clear()
    found, expected = (step(each, x.clone().requires_grad_()) for each in (model, plain))
    # A layer that computes in another dtype than its input's casts twice, which one op does not.
    assert calls.mlps == (["silu"] if is_read and kind != "nf4 computing in bfloat16" else [])
    assert_same(found, expected, 16 * EPS[dtype])


LOW = [
    ("ours", FP32, True, FP32),
    ("ours", BF16, True, BF16),
    ("ours", BF16, False, FP32),
    ("ours", BF16, False, BF16),
]
LOW += [("PEFT", FP32, True, FP32), ("PEFT", BF16, False, FP32)]


@pytest.mark.parametrize(("library", "dtype", "autocast", "lora_dtype"), LOW)
def test_autocast_and_low_precision(library, dtype, autocast, lora_dtype, calls):
    results = []
    for model, _ in reported_pair(lambda: MLP(bias=True).to(dtype), library, dropout=0.2):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(lora_dtype)
        with torch.autocast("cpu", BF16, enabled=autocast):
            results.append(step(model, rows(dtype)))
    assert results[0]["y"].dtype == BF16 and calls.mlps == ["silu"]
    assert_same(*results, 8 * EPS[BF16])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("plain", "dtype"),
    [("", FP32), ("gate_proj", FP32), ("gate_proj, up_proj", BF16), ("down_proj", BF16)],
)
def test_float32_activations_of_four_bits_under_autocast(plain, dtype, backend, calls):
    """As PEFT's prepare_model_for_kbit_training leaves them. bitsandbytes' layers return their input's
    dtype; those that are ``plain``, autocast's.
    """

    def make():
        module = MLP(width=64, inner=64).to(BF16)
        for name in {"gate_proj", "up_proj", "down_proj"} - {*plain.split(", ")}:
            setattr(module, name, bnb_4bit(getattr(module, name), compute_dtype=BF16))
        module.is_loaded_in_4bit = True
        return module

    x = torch.randn(70, 64)
    results = []
    for model, _ in reported_pair(make, "PEFT", dropout=0.2):
        with torch.autocast("cpu", BF16):
            results.append(step(model, x.clone().requires_grad_()))
    assert calls.mlps == ["silu"]
    assert results[0]["y"].dtype == results[1]["y"].dtype == dtype
    assert_same(*results, 8 * EPS[BF16])


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [MLP, Stacked])
@each_library
def test_torch_compile_has_no_graph_break(library, make, calls):
    model, plain = pair(make, library)
    expected = step(plain)
    torch._dynamo.reset()
    mlp_of(model).compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected)
    # Another mode, which the compiled code must notice.
    mlp_of(model).down_proj.merge()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(rows()), expected["y"])


@each_library
def test_fuse_projections_serves_where_the_mlp_falls_back(library, calls):
    model, plain = pair(MLP, library, fuse_projections=True)
    hook = None
    for mlps, groups in (["silu"], []), ([], [2]), (["silu"], []):
        calls.clear()
        found = step(model)
        assert (calls.mlps, calls.groups) == (mlps, groups)
        assert_same(found, step(plain))
        hook = (
            hook.remove()
            if hook
            else mlp_of(model).down_proj.register_forward_hook(lambda *args: None)
        )


def test_layers_that_share_their_A_draw_two_masks(calls):
    """The halves of a stacked projection draw one."""
    models = pair(MLP, dropout=0.5)
    for model in models:
        mlp_of(model).up_proj.lora_A = mlp_of(model).gate_proj.lora_A
    assert_same(*map(step, models), 0.0)
    assert calls.mlps == []
    assert_same(*(step(model.eval()) for model in models))
    assert calls.mlps == ["silu"]


# What the module is.


def test_a_forward_bound_to_the_instance_is_given_back(calls):
    """Liger's way to patch a model that exists."""

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    module = MLP(nn.ReLU())
    module.forward = types.MethodType(forward, module)
    # Liger binds the methods that print the module, too.
    module._get_name = types.MethodType(lambda self: "LigerSwiGLUMLP", module)
    module.extra_repr = types.MethodType(lambda self: "", module)
    expected = module.__dict__["forward"]
    model, _ = adapted(module)
    copied, y = copy.deepcopy(model), model(rows(FP32))
    assert torch.equal(copied(rows(FP32)), y) and calls.mlps == ["silu"] * 2
    copied["mlp"].gate_proj.register_forward_pre_hook(lambda *args: None)
    torch.testing.assert_close(copied(rows(FP32)), y, rtol=1e-4, atol=1e-3)
    assert len(calls.mlps) == 2
    unfuse_mlps(model.modules())
    assert type(module) is MLP and module.__dict__["forward"] == expected


def test_hooks_like_accelerates_outlive_it(calls):
    """They keep the method that they wrap, and go on calling it after the module got its class
    back.
    """
    model, plain = pair(MLP)
    mlp = model["mlp"]
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 2
    expected = step(plain)["y"] * 2
    torch.testing.assert_close(mlp(rows()), expected)
    assert calls.mlps == ["silu"]
    unfuse_mlps(model.modules())
    torch.testing.assert_close(mlp(rows()), expected)
    assert type(mlp) is MLP and calls.mlps == ["silu"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_tiles_keep_the_input_alone(library, calls):
    """In a model, by the usual path and by the one of a first call."""
    model, report = adapted(MLP().double(), library, fuse=False, tile=16)
    assert [mlp.tiled for mlp in report.mlps] == [16]
    x = rows()
    for _ in range(2):
        kept = saved_for_backward(lambda: model(x), [*model.parameters(), x])
        assert kept == 0
    assert calls.fused == ["silu"] * 2
