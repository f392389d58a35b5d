"""accelerate_peft on PEFT's layers over quantized weights: which are read by the kernels, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels import quantized
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, FP16, FP32
from tests.helpers.oracle import check_all, layer_oracle, run_layer
from tests.helpers.peft_models import calls, config
from tests.helpers.quantized_weights import K, N, bnb_4bit, bnb_8bit, torchao, torchao_int8

peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*")


def wrap(base, **kwargs):
    """PEFT's model around one layer, in training mode: evaluated on a CPU, bitsandbytes packs a weight for that."""
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    model.is_loaded_in_8bit = type(base).__name__ == "Linear8bitLt"
    return peft.get_peft_model(model, config(target_modules=["0"], **kwargs)).train()


def make(quantize=bnb_4bit, dtype=FP32, bias=True, r=3, lora=None, **kwargs):
    """A model, and its layer."""
    torch.manual_seed(0)
    model = wrap(quantize(nn.Linear(K, N, bias, dtype=dtype), **kwargs), r=r, **lora or {})
    return model, model.base_model.model[0]


def assert_close(found, expected, dtype=FP32):
    """Up to rounding of the largest element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * EPS[dtype] * expected.abs().max().item())


def assert_no_worse_than_peft(model, layer, x, low, autocast=None, lower=False):
    """Against float64, with PEFT's own error as the bound; ``lower``: of PEFT under autocast to ``low``."""
    grad = torch.randn(*x.shape[:-1], N).to(low)
    pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def run(dtype):
        return run_layer(torch.autocast("cpu", dtype or BF16, enabled=dtype is not None)(model), x, pair, grad)

    slk.restore_peft(model)
    eager = run(low if lower else autocast)
    slk.accelerate_peft(model, strict=True)
    found = run(autocast)
    weight = quantized.read(layer.base_layer.weight).dequantize(torch.float64)
    check_all(found, layer_oracle(x, weight, layer.base_layer.bias, pair, grad, layer.scaling["default"]), eager, low)
    assert lower or all(value.dtype == eager[name].dtype for name, value in found.items())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("shape", "r"), [((70,), 3), ((1,), 1), ((2, 19), 20), ((0,), 3), ((), 3)])
def test_4_bits_are_read_by_the_kernels(shape, r, dtype, nested, backend, poisoned_outputs, monkeypatch):
    model, layer = make(compute_dtype=dtype, dtype=dtype, compress_statistics=nested, bias=r != 20, r=r)
    x = torch.randn(*shape, K).to(dtype).requires_grad_()
    model(x)
    # PEFT computes the branch in float32 beside 16 bits; the bound is its error in x's dtype.
    assert_no_worse_than_peft(model, layer, x, dtype, lower=dtype != FP32)
    count = calls(monkeypatch)
    model(x)
    assert count == {"lora_linear" if backend == "triton" else "lora_branch": 1}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_so_many_that_the_weight_is_dequantized_first(dtype):
    model, layer = make(compute_dtype=dtype, dtype=dtype)
    x = torch.randn(300, K).to(dtype).requires_grad_()
    model(x)
    with slk.use_backend("triton"):
        assert_no_worse_than_peft(model, layer, x, dtype, lower=dtype != FP32)


@pytest.mark.parametrize("x_dtype", [FP32, BF16])
def test_autocast_to_what_the_layer_computes_in(x_dtype, backend, monkeypatch):
    """As Hugging Face's trainer has it: float32 activations, compute_dtype bfloat16. The layer returns x's dtype."""
    model, layer = make(compute_dtype=BF16, dtype=BF16)
    x = torch.randn(37, K).to(x_dtype).requires_grad_()
    model(x)
    assert_no_worse_than_peft(model, layer, x, BF16, autocast=BF16)
    count = calls(monkeypatch)
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == x_dtype
    assert count == {"lora_linear" if backend == "triton" else "lora_branch": 1}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("bias", [True, False])
def test_float8_is_read_by_the_kernels(bias, dtype, backend, monkeypatch):
    model, layer = make(partial(torchao, config="Float8WeightOnlyConfig"), dtype, bias)
    x = torch.randn(37, K).to(dtype).requires_grad_()
    assert_no_worse_than_peft(model, layer, x, dtype, lower=dtype != FP32)
    count = calls(monkeypatch)
    model(x)
    assert count == {"lora_linear" if backend == "triton" else "lora_branch": 1}
    if dtype == FP32:
        # torchao's product would be autocast's, whose weight we would round otherwise.
        with torch.autocast("cpu", BF16):
            model(x)
        assert count["lora_branch"] == (1 if backend == "triton" else 2)


def own_product(case):
    """A model whose base layer has to compute its product itself, and an input."""
    dtype, kwargs = FP32, {}
    if case == "x in another dtype":
        dtype = BF16
    if case == "compute_dtype not chosen yet":
        kwargs = {"compute_dtype": None}
    model, layer = make(**{"dtype": dtype, "compute_dtype": dtype} | kwargs)
    base, x = layer.base_layer, torch.randn(37, K).requires_grad_()
    if case == "compute_dtype not confirmed yet":
        base.compute_type_is_set = False
    if case == "compute_dtype not confirmed yet":
        base.compute_type_is_set = False
    if case == "bias in another dtype":
        base.bias.data = base.bias.data.to(BF16)
    if case == "hook":
        base.register_forward_hook(lambda *args: None)
    if case == "subclass":
        base.__class__ = type("Mine", (type(base),), {})
    if case == "forward replaced":
        base.forward = lambda x: type(base).forward(base, x)
    return model, x


OWN = [
    "x in another dtype",
    "compute_dtype not chosen yet",
    "compute_dtype not confirmed yet",
    "bias in another dtype",
    "hook",
    "subclass",
    "forward replaced",
]


@pytest.mark.parametrize("case", OWN)
def test_what_only_the_layer_itself_computes(case, backend, monkeypatch):
    model, x = own_product(case)
    twin = copy.deepcopy(model)
    expected = twin(x)
    slk.accelerate_peft(model, strict=True)
    count = calls(monkeypatch)
    found = model(x)
    assert count == {"lora_branch": 1} and found.dtype == expected.dtype
    assert_close(found, expected)
    if (
        case in ("compute_dtype not chosen yet", "compute_dtype not confirmed yet", "bias in another dtype")
        and backend == "triton"
    ):
        # The layer has made up its mind now.
        assert_close(model(x), expected)
        assert count == {"lora_branch": 1, "lora_linear": 1}


def test_what_can_not_be_read_is_not():
    """Quantized as [K, N], packed by bitsandbytes for inference on a CPU (which few can do), and without its quant_state."""
    from stablelora_kernels.integrations import peft_layers

    _, layer = make()
    base, x = layer.base_layer, torch.randn(5, K)
    with slk.use_backend("triton"):
        assert peft_layers.base_operand(base, x).weight.shape == (N, K)
        base.in_features, base.out_features = N, K
        assert peft_layers.base_operand(base, x) is None
        base.in_features, base.out_features = K, N
        base.weight.quant_state.packing_format_for_cpu = True
        assert peft_layers.base_operand(base, x) is None
        base.weight.quant_state = None
        assert peft_layers.base_operand(base, x) is None


def test_several_adapters_lora_bias_disabled_and_merged(backend, monkeypatch):
    model, layer = make(lora={"lora_bias": True})
    nn.init.normal_(layer.lora_B["default"].bias)
    model.add_adapter("more", config(target_modules=["0"], r=2))
    x = torch.randn(37, K).requires_grad_()
    slk.accelerate_peft(model, strict=True)
    count = calls(monkeypatch)
    for active in ("default", "more", ["default", "more"], ["more", "default"]):
        model.base_model.set_adapter(active)
        found = model(x)
        slk.restore_peft(model)
        expected = model(x)
        slk.accelerate_peft(model)
        assert_close(found, expected)
    assert count == ({"lora_linear": 4, "lora_branch": 2} if backend == "triton" else {"lora_branch": 6})
    before = sum(count.values())
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    assert sum(count.values()) == before


def test_merging_replaces_what_is_read(backend):
    """Never a weight of before: merging and unmerging quantize it anew."""
    model, layer = make()
    x = torch.randn(37, K)
    slk.accelerate_peft(model, strict=True)
    first = model(x)
    weight = layer.base_layer.weight
    model.merge_adapter()
    assert torch.equal(model(x), layer.base_layer(x))
    model.unmerge_adapter()
    assert layer.base_layer.weight is not weight
    found = model(x)
    slk.restore_peft(model)
    expected = model(x)
    assert_close(found, expected)
    assert not torch.equal(found, first)


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout(p, backend):
    model, layer = make(lora={"lora_dropout": p})
    x = torch.randn(1, K).requires_grad_()
    slk.accelerate_peft(model, strict=True)
    base = layer.base_layer(x)
    still = model.eval()(x)
    torch.manual_seed(1)
    with torch.no_grad():
        draws = model.train()(x.expand(256, K))
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(model(x.expand(256, K)), draws)
    error = (draws.mean(0) - still[0]).abs() / (draws.std(0) / 256**0.5)
    assert (error < 5).all() and draws.std(0).min() > 0
    nn.init.zeros_(layer.lora_B["default"].weight)
    torch.testing.assert_close(model(x), base)


def test_copies_and_compile(backend):
    model, _ = make()
    x = torch.randn(37, K).requires_grad_()
    slk.accelerate_peft(model, strict=True)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    if backend == "torch":
        return
    # bitsandbytes' own forward can't be compiled whole, as it may change its bias.
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_what_is_remembered_of_a_weight_is_that_it_was_checked():
    weight = make()[1].base_layer.weight
    state, before = weight.quant_state, quantized.read(weight)
    again = quantized.read(weight)
    assert again.stored.layout == before.stored.layout and again.absmax is state.absmax
    # What the state holds is read anew each time, and what is new is checked.
    state.code = state.code * 2
    assert torch.equal(quantized.read(weight).dequantize(FP32), 2 * before.dequantize(FP32))
    state.absmax = state.absmax[:-1]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"absmax must be \[96\], got \[95\]"):
            quantized.read(weight)
    count = len(quantized._checked)
    del weight, state, before, again
    gc.collect()
    assert len(quantized._checked) < count


@pytest.mark.parametrize("quantize", [bnb_8bit, torchao_int8])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_quantized_otherwise_the_base_computes_its_product(quantize, dtype, backend, monkeypatch):
    model, layer = make(quantize, dtype, r=2, lora={"lora_dropout": 0.1})
    model.eval()
    x = torch.randn(70, K).to(dtype).requires_grad_()
    pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    expected = run_layer(model, x, pair, torch.ones(70, N))
    count = calls(monkeypatch)
    assert [m.adapter for m in slk.accelerate_peft(model, strict=True).replaced] == ["default"]
    for name, value in run_layer(model, x, pair, torch.ones(70, N)).items():
        assert value.dtype == expected[name].dtype
        assert_close(value, expected[name], dtype)
    assert count == {"lora_branch": 1}


@pytest.mark.parametrize("quantize", [bnb_4bit, bnb_8bit, torchao_int8])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_mixed_batches(quantize, dtype, backend, monkeypatch):
    model, _ = make(quantize, dtype)
    model.add_adapter("more", config(target_modules=["0"]))
    x, count = torch.randn(70, K).to(dtype), calls(monkeypatch)
    names = ["more", "__base__"] * 35
    with torch.no_grad():
        mixed = model.eval()(x, adapter_names=names)
        slk.accelerate_peft(model)
        found = model(x, adapter_names=names)
    assert_close(found, mixed, dtype)
    assert count == {"lora_branch": 1}
    twin = copy.deepcopy(model)
    slk.restore_peft(model)
    assert type(twin.base_model.model[0]) is not type(model.base_model.model[0])
