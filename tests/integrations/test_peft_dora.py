"""accelerate_peft on DoRA: without dropout on this library's ops, against PEFT's own forward and
float64.
"""

from __future__ import annotations

import copy
import gc
import weakref
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.integrations.peft import dora as peft_dora
from stablelora_kernels.integrations.peft.read import read_dora
from stablelora_kernels.ops import dora
from stablelora_kernels.quantized import read
from stablelora_kernels.reference import StableAdamWRef
from stablelora_kernels.testing.cases import BF16, FP16, FP32, FP64
from tests.helpers.peft_models import config, make, peft
from tests.helpers.quantized_weights import (
    bnb_4bit,
    bnb_8bit,
    torchao,
    torchao_fp8_a_tensor,
)
from tests.helpers.small_models import output

K, N, R = 40, 48, 3
TRAINED = ("lora_A", "lora_B", "lora_magnitude_vector")
WITH_DROPOUT = (
    "adapter 'default' is DoRA with dropout, which needs the base product of two inputs to train; evaluation runs on "
    "the ops"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight's elements, and rows of Z, in several blocks of which the last is smaller."""
    monkeypatch.setattr(dora, "_ELEMENTS", 5 * K)
    monkeypatch.setattr(dora, "_ROWS", 16)


def one_layer(layer: nn.Module | None = None, dtype: Any = FP32, **options: Any) -> Any:
    """PEFT's model around one layer, whose magnitude has moved away from the norms."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N).to(dtype) if layer is None else layer)
    model = peft.get_peft_model(base, config(target_modules=["0"], use_dora=True, r=R, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 2, parameter.numel(), dtype=dtype)
    return model


def results(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=FP64).view(y.shape).to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"Y": y.detach(), "dX": x.grad} | grads


@pytest.mark.covering
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (70,), (3, 5)])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    # The Triton kernels do not compute in float64.
    [("torch", FP64), *product(["torch", "triton"], [FP32, BF16, FP16])],
    indirect=["backend"],
)
def test_output_and_gradients(dtype, rows, bias, backend, calls):
    model = one_layer(nn.Linear(K, N, bias).to(dtype), dtype)
    x = torch.randn(*rows, K).to(dtype)
    exact, own = results(copy.deepcopy(model).double(), x.double()), results(model, x)
    slk.accelerate_peft(model, strict=True)
    found = results(model, x)
    assert calls.layers == {"lora_linear": 1} and found.keys() == own.keys() and len(found) == 5
    for name, value in found.items():
        ref = exact[name]
        error, of_peft = ((t.double() - ref).abs().max().item() for t in (value, own[name]))
        # PEFT's float64 is the reference itself.
        unit = torch.finfo(dtype).eps * ref.abs().max().item()
        assert (
            value.dtype == own[name].dtype
            and error <= 2 * of_peft + (8 if dtype == FP64 else 2) * unit
        ), (
            name,
            error,
            of_peft,
        )


@pytest.mark.parametrize("dtype", [FP64, FP32])
def test_a_new_adapter_leaves_the_output_to_the_bit(dtype):
    """As PEFT's does: m / n is 1 for each row, and B is zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(500, 300, dtype=dtype))
    x = torch.randn(70, 500, dtype=dtype)
    expected = base(x).detach()
    adapted = config(target_modules=["0"], use_dora=True, r=R, init_lora_weights=True)
    model = peft.get_peft_model(base, adapted, autocast_adapter_dtype=False)
    model.base_model.model[0].to(dtype)
    slk.accelerate_peft(model, strict=True)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [FP64, BF16])
def test_a_bias_that_trains(dtype, calls):
    model = one_layer(nn.Linear(K, N, dtype=dtype), dtype, bias="all")
    x = torch.randn(70, K).to(dtype)
    exact, own = results(copy.deepcopy(model).double(), x.double()), results(model, x)
    slk.accelerate_peft(model, strict=True)
    found = results(model, x)
    (bias,) = (name for name in found if name.endswith("bias"))
    assert calls.layers == {"lora_linear": 1} and found[bias].dtype == dtype
    error, of_peft = ((r[bias].double() - exact[bias]).abs().max().item() for r in (found, own))
    # A sum over the rows of dY, whose elements are at most 1.
    assert error <= of_peft + len(x) * torch.finfo(dtype).eps


def test_row_norms_in_bfloat16_are_closer_than_pefts():
    model = one_layer(nn.Linear(512, 512).to(BF16), BF16)
    layer = model.base_model.model[0]
    w = layer.base_layer.weight
    a = layer.lora_A["default"].weight
    b = layer.lora_B["default"].weight
    s = layer.scaling["default"]
    exact = (w.double() + s * b.double() @ a.double()).norm(dim=1)
    own = layer.lora_magnitude_vector["default"].get_weight_norm(w, b @ a, s)
    found = dora.row_norms(dora.square_sums(w), nn.functional.linear(a, w), a, b, s)
    error, of_peft = (((t.double() - exact) / exact).abs().max().item() for t in (found, own))
    assert found.dtype == FP32 and error <= min(1e-3, of_peft)


def test_the_norm_of_a_row_that_is_nothing_is_zero():
    a, b = torch.ones(1, K), torch.zeros(N, 1)
    zero = torch.zeros(N, K)
    assert not dora.row_norms(
        dora.square_sums(zero), nn.functional.linear(a, zero), a, b, 1.0
    ).any()
    # W = -B A: what is left is rounding, and no NaN.
    b += 1 / 3
    left = dora.row_norms(dora.square_sums(-b @ a), nn.functional.linear(a, -b @ a), a, b, 1.0)
    assert left.isfinite().all() and left.max() <= 1e-3


def parts_of(weight) -> list[torch.Tensor]:
    """What a quantized weight's values come from, without NF4's 16 levels, which nobody changes."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return [weight, state.absmax, *nested]
    parts = (getattr(weight, name, None) for name in ("qdata", "scale", "per_tensor_scale"))
    return [part for part in parts if part is not None]


@pytest.mark.parametrize(
    ("quantize", "options"),
    [
        (bnb_4bit, {"compute_dtype": FP32}),
        (bnb_4bit, {"compute_dtype": FP32, "compress_statistics": False}),
        (torchao, {"config": "Float8WeightOnlyConfig"}),
        (torchao, {"config": "NVFP4WeightOnlyConfig"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_quantized_bases_are_multiplied_not_dequantized_again(
    quantize, options, backend, monkeypatch
):
    model = one_layer(quantize(nn.Linear(128, N), **options))
    x = torch.randn(70, 128)
    expected = results(model, x)
    slk.accelerate_peft(model, strict=True)
    sums = []
    monkeypatch.setattr(
        "stablelora_kernels.integrations.peft.dora.square_sums",
        lambda w: sums.append(w.shape) or dora.square_sums(w),
    )
    for _ in range(2):
        found = results(model, x)
        for name, value in found.items():
            atol = 1e-5 * expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)
    assert sums == [(N, 128)]
    # Each part of the weight is written to, or gets other memory. In inference mode, a view of the
    # part would not tell.
    parts = parts_of(model.base_model.model[0].base_layer.weight)
    changes = [*((part, False) for part in parts), *((part, True) for part in parts)]
    for count, (part, exchanges_memory) in enumerate(changes, 2):
        values = part.data.clone()
        with torch.no_grad():
            if exchanges_memory:
                part.data = values
            else:
                part.copy_(values)
        for mode in [torch.no_grad] if exchanges_memory else [torch.inference_mode, torch.no_grad]:
            with mode():
                model(x)
            assert sums == [(N, 128)] * count


@pytest.mark.filterwarnings("ignore")
def test_a_weight_packed_for_inference_on_a_cpu_has_the_same_norms(monkeypatch):
    """bitsandbytes packs a weight in the first call in evaluation, for good. Few CPUs have its own
    forward for that.

    Then only the layer reads the weight, and adds its bias. This bias leaves few digits of a
    product in bfloat16.
    """
    torch.manual_seed(0)
    model = one_layer(bnb_4bit(nn.Linear(128, N), compute_dtype=BF16))
    layer, bias = model.base_model.model[0], 20.0
    base, scaling = layer.base_layer, layer.scaling["default"]
    base.bias.data.fill_(bias)
    weight = read(base.weight).dequantize(BF16)

    def packing_forward(self, x):
        self.weight.quant_state.packing_format_for_cpu |= not self.training
        return nn.functional.linear(x.to(BF16), weight, self.bias.to(BF16)).to(x.dtype)

    base.weight.quant_state.packing_format_for_cpu = False
    monkeypatch.setattr(type(base), "forward", packing_forward)
    slk.accelerate_peft(model, strict=True)
    x = torch.randn(70, 128)
    # The worst that rounding A, the products and their sums with the bias to bfloat16 can do to the
    # norms.
    w, a, b = (
        t.detach().double()
        for t in (weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    exact, unit = (w + scaling * b @ a).norm(dim=1), torch.finfo(BF16).eps / 2
    of_products = unit * (
        w.abs() @ a.abs().T + (w @ a.T).abs() + bias * a.abs().max() / peft_dora._LARGEST
    )
    of_squares = 2 * unit * w.abs() * (w.abs() + bias / peft_dora._LARGEST)
    allowed = (2 * scaling * (b.abs() * of_products).sum(1) + of_squares.sum(1)) / (2 * exact)
    assert (allowed / exact).median() < 0.02
    for trains in (True, False, True):
        y = model.train(trains)(x)
        norms = read_dora(layer, "default").norms()
        assert ((norms - exact).abs() <= allowed).all()
        assert y.dtype == FP32 and y.isfinite().all()
    assert base.weight.quant_state.packing_format_for_cpu


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_weight_is_freed_with_its_model():
    model = one_layer(bnb_4bit(nn.Linear(128, N), compute_dtype=FP32))
    slk.accelerate_peft(model, strict=True)
    model(torch.randn(3, 128))
    weight = weakref.ref(model.base_model.model[0].base_layer.weight)
    del model
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("magnitude_trains", [True, False])
def test_it_keeps_x_s_and_z_and_makes_nothing_of_the_weights_size(magnitude_trains, calls):
    model = one_layer(nn.Linear(512, 512))
    model.base_model.model[0].lora_magnitude_vector["default"].weight.requires_grad_(
        magnitude_trains
    )
    slk.accelerate_peft(model)
    x = torch.randn(70, 512).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    parameters = {p.data_ptr() for p in model.parameters()}
    sizes = sorted(
        {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in parameters}.values()
    )
    # The factor and the norms, S, x and, for the magnitude alone, Z.
    wide = 1 + magnitude_trains
    assert sizes[-wide:] == [70 * 512] * wide and all(
        size <= 70 * max(R, 8) for size in sizes[:-wide]
    )


def test_with_dropout_only_evaluation_is_ours(backend, calls):
    model = one_layer(lora_dropout=0.3)
    assert [row.reason for row in slk.accelerate_peft(model).skipped] == [WITH_DROPOUT]
    with pytest.raises(ValueError, match=f"strict=True, but .*{WITH_DROPOUT}"):
        slk.accelerate_peft(model, strict=True)
    x = torch.randn(70, K)
    torch.manual_seed(3)
    found = model.train()(x)
    assert not calls.layers
    assert f"PEFT's own forward of 1 x 0: {WITH_DROPOUT}" in str(slk.status(model))
    evaluated = model.eval()(x)
    assert calls.layers == {"lora_linear": 1}
    slk.restore_peft(model)
    torch.manual_seed(3)
    assert torch.equal(model.train()(x), found)
    torch.testing.assert_close(model.eval()(x), evaluated)


def test_what_peft_computes_itself(calls):
    """Two adapters at once, hooks, offloading, and layers that quantize their input."""
    model = make(use_dora=True)
    slk.accelerate_peft(model, strict=True)
    output(model)
    assert calls.layers == {"lora_linear": 4}
    calls.clear()
    model.add_adapter("more", config(use_dora=True))
    model.base_model.set_adapter(["default", "more"])
    found = output(model)
    with model.disable_adapter():
        output(model)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    output(model)
    model.unmerge_adapter()
    assert not calls.layers
    model.base_model.set_adapter(["default", "more"])
    slk.restore_peft(model)
    torch.testing.assert_close(output(model), found)
    hooked = one_layer()
    hooked.base_model.model[0].base_layer.register_forward_hook(lambda *args: None)
    eight = one_layer(bnb_8bit(nn.Linear(K, N)))
    for model, text in ((hooked, "Linear"), (eight, "Linear8bitLt")):
        (row,) = slk.accelerate_peft(model).skipped
        assert row.reason == f"adapter 'default' is DoRA on a {text}, or on a layer with hooks"
    (row,) = slk.accelerate_peft(one_layer(torchao_fp8_a_tensor(nn.Linear(K, N)))).skipped
    assert row.reason.startswith("adapter 'default' is DoRA, and weight must have a scale a row")
    offloaded = one_layer()
    # PEFT's option for it needs a GPU.
    offloaded.base_model.model[0].ephemeral_gpu_offload = True
    (row,) = slk.accelerate_peft(offloaded).skipped
    assert row.reason == "adapter 'default' is DoRA with hooks, or with a weight on another device"


def test_torch_compile_has_no_graph_break(backend):
    model = one_layer()
    slk.accelerate_peft(model)
    x = torch.randn(70, K)
    expected = results(model, x)
    torch._dynamo.reset()
    for name, value in results(
        torch.compile(model, backend="aot_eager", fullgraph=True), x
    ).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], msg=name)


def test_the_optimizer_shrinks_a_and_treats_the_magnitude_as_any_parameter():
    model = one_layer()
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "shrink_ratio": 0.1}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    a, b, m = (next(p for name, p in named.items() if part in name) for part in TRAINED)
    wide = [p.detach().double() for p in (a, b, m)]
    optimizer = slk.StableLoRAAdamW(named.items(), **options)
    oracle = StableAdamWRef([slk.LoRAPair("0", *wide[:2])], wide[2:], **options)
    for step in range(5):
        for i, p in enumerate((a, b, m)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        oracle.step({each: p.grad.double() for each, p in zip(wide, (a, b, m), strict=True)})
        optimizer.step()
    assert len(named) == 3
    for p, expected in zip((a, b, m), wide, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)
