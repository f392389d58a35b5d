"""accelerate_peft on PEFT's layers over quantized weights: which are read by the kernels, and that
nothing else changes.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import stablelora_kernels as slk
from stablelora_kernels import quantized
from stablelora_kernels.testing import EPS
from stablelora_kernels.testing.cases import BF16, FP16, FP32
from tests.helpers.oracle import check_layer, run_layer
from tests.helpers.peft_models import config, peft
from tests.helpers.quantized_weights import (
    K,
    N,
    bnb_4bit,
    bnb_8bit,
    compressed_tensors,
    scaled,
    torchao,
    torchao_int8,
)
from tests.integrations.test_peft import check_story

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*"
)
torchao_fp8 = partial(torchao, config="Float8WeightOnlyConfig")
torchao_nvfp4 = partial(torchao, config="NVFP4WeightOnlyConfig")


def make(quantize=bnb_4bit, dtype=FP32, r=3, lora=None, **kwargs):
    """PEFT's model around one layer, and the layer. Evaluated on a CPU, bitsandbytes would pack a
    weight for that.
    """
    torch.manual_seed(0)
    model = nn.Sequential(quantize(nn.Linear(K, N, dtype=dtype), **kwargs))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quantize is bnb_4bit, quantize is bnb_8bit
    model = peft.get_peft_model(model, config(target_modules=["0"], r=r, **lora or {})).train()
    return model, model.base_model.model[0]


def by_peft(model, *args, **kwargs):
    """What PEFT's own forward gives, of a model that is accelerated."""
    slk.restore_peft(model)
    expected = model(*args, **kwargs)
    slk.accelerate_peft(model, strict=True)
    return expected


def assert_close(found, expected, dtype=FP32):
    """Up to rounding of the largest element."""
    torch.testing.assert_close(
        found, expected, rtol=0, atol=16 * EPS[dtype] * expected.abs().max().item()
    )


READ = {
    **{
        f"4 bits, {dtype}": (bnb_4bit, dtype, {"compute_dtype": dtype}, None)
        for dtype in (FP32, BF16, FP16)
    },
    "4 bits, bias": (bnb_4bit, BF16, {"compute_dtype": BF16, "compress_statistics": False}, None),
    # As Hugging Face's trainer has it: float32 activations, compute_dtype bfloat16. The layer
    # returns x's dtype.
    "4 bits under autocast": (bnb_4bit, BF16, {"compute_dtype": BF16}, FP32),
    "4 bits and x under autocast": (bnb_4bit, BF16, {"compute_dtype": BF16}, BF16),
    "float8, bfloat16": (torchao_fp8, BF16, {}, None),
    "float8, float32": (torchao_fp8, FP32, {}, None),
    "NVFP4, bfloat16": (torchao_nvfp4, BF16, {}, None),
    "NVFP4, float32": (torchao_nvfp4, FP32, {}, None),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize(("quantize", "dtype", "options", "autocast"), READ.values(), ids=READ)
def test_what_the_kernels_read_is_as_exact_as_pefts(
    quantize, dtype, options, autocast, backend, calls
):
    """``autocast``: x's dtype, under autocast to bfloat16. Shapes and ranks are in
    tests/ops/test_ops_oracle.py.
    """
    model, layer = make(quantize, dtype, **options)
    x = torch.randn(37, K).to(autocast or dtype).requires_grad_()
    model(x)
    grad = torch.randn(37, N).to(dtype)
    pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    # PEFT computes the branch in float32 beside 16 bits; the bound is its error in x's dtype.
    lower = torch.autocast(
        "cpu", dtype if dtype != FP32 else BF16, enabled=dtype != FP32 or autocast is not None
    )
    eager = run_layer(lower(model), x, pair, grad)
    slk.accelerate_peft(model, strict=True)
    calls.clear()
    found = run_layer(
        torch.autocast("cpu", BF16, enabled=autocast is not None)(model), x, pair, grad
    )
    assert calls.layers == {"lora_linear" if backend == "triton" else "lora_branch": 1}
    assert found["Y0"].dtype == x.dtype
    weight = quantized.read(layer.base_layer.weight).dequantize(torch.float64)
    bias, scaling = layer.base_layer.bias, layer.scaling["default"]
    check_layer(found, eager, x, weight, bias, pair, grad, scaling, dtype)


@pytest.mark.parametrize("quantize", [torchao_fp8, torchao_nvfp4], ids=["float8", "NVFP4"])
def test_torchaos_weights_under_autocast_keep_torchaos_product(quantize, backend, calls):
    """Whose weight we would round otherwise."""
    model, _ = make(quantize)
    slk.accelerate_peft(model, strict=True)
    with torch.autocast("cpu", BF16):
        model(torch.randn(37, K))
    assert calls.layers == {"lora_branch": 1}


def to_bfloat16(base):
    base.bias.data = base.bias.data.to(BF16)


# What the model is made of, a change of its base layer, and whether its first call settles how it
# computes.
OWN = {
    "x in another dtype": ({"dtype": BF16, "compute_dtype": BF16}, lambda base: None, False),
    "compute_dtype not chosen": ({"compute_dtype": None}, lambda base: None, True),
    "compute_dtype not confirmed": (
        {},
        lambda base: setattr(base, "compute_type_is_set", False),
        True,
    ),
    "bias in another dtype": ({}, to_bfloat16, True),
    "hook": ({}, lambda base: base.register_forward_hook(lambda *args: None), False),
    "quantized in 8 bits": ({"quantize": bnb_8bit}, lambda base: None, False),
    "quantized in 8 bits by torchao": ({"quantize": torchao_int8}, lambda base: None, False),
}


@pytest.mark.parametrize(("compute_dtype", "notes"), [(FP32, 1), (BF16, 0), (None, 0)])
def test_a_note_says_that_a_16_bit_model_computes_in_float32(compute_dtype, notes):
    """As of transformers' BitsAndBytesConfig without bnb_4bit_compute_dtype."""
    model, _ = make(dtype=BF16, compute_dtype=compute_dtype)
    plain = nn.Sequential(bnb_4bit(nn.Linear(K, N, dtype=BF16), compute_dtype=compute_dtype))
    for report in (slk.accelerate_peft(model), slk.apply_lora(plain, ["0"], r=3)):
        found = [note for note in report.notes if "bnb_4bit_compute_dtype" in note]
        assert len(found) == notes
    # A float32 model computes in float32.
    model, _ = make(dtype=FP32, compute_dtype=FP32)
    assert not slk.accelerate_peft(model).notes


@pytest.mark.parametrize(("options", "change", "settles"), OWN.values(), ids=OWN)
def test_what_only_the_layer_itself_computes(options, change, settles, calls):
    """On Triton, whose kernels would read the weight."""
    options = options if "quantize" in options else {"compute_dtype": FP32} | options
    model, layer = make(**options)
    change(layer.base_layer)
    x = torch.randn(37, K).requires_grad_()
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    grad = torch.randn(37, N)
    twin = copy.deepcopy(model)
    own = twin.base_model.model[0]
    expected = run_layer(
        twin, x, (own.lora_A["default"].weight, own.lora_B["default"].weight), grad
    )
    slk.accelerate_peft(model, strict=True)
    with slk.settings(backend="triton"):
        for name, value in run_layer(model, x, pair, grad).items():
            assert value.dtype == expected[name].dtype
            assert_close(value, expected[name])
        assert calls.layers == {"lora_branch": 1}
        assert_close(model(x), expected["Y0"])
    assert calls.layers == ({"lora_branch": 1, "lora_linear": 1} if settles else {"lora_branch": 2})


def test_a_weight_packed_for_inference_on_a_cpu_is_the_layers(calls, monkeypatch):
    """Few CPUs have bitsandbytes' own forward for that."""
    model, layer = make()
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    monkeypatch.setattr(type(layer.base_layer), "forward", lambda self, x: torch.zeros(5, N))
    slk.accelerate_peft(model, strict=True)
    with slk.settings(backend="triton"):
        model(torch.randn(5, K))
    assert calls.layers == {"lora_branch": 1}


def test_switched_scaled_disabled_merged_and_unloaded(backend, calls, tmp_path):
    """Never a weight of before: merging and unmerging quantize it anew."""
    x = torch.randn(37, K).requires_grad_()

    def run(model):
        out = model(x)
        return {"Y": out.detach(), "x": torch.autograd.grad(out.sum(), x)[0]}

    check_story(lambda: make(lora={"lora_bias": True})[0], run, tmp_path, calls)


@pytest.mark.covering(1)
@pytest.mark.parametrize("quantize", [bnb_4bit, bnb_8bit, torchao_int8])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_mixed_batches(quantize, dtype, backend, calls):
    model, _ = make(quantize, dtype)
    model.add_adapter("more", config(target_modules=["0"]))
    x, names = torch.randn(70, K).to(dtype), ["more", "__base__"] * 35
    with torch.no_grad():
        expected = by_peft(model.eval(), x, adapter_names=names)
        assert_close(model(x, adapter_names=names), expected, dtype)
    assert calls.layers == {"lora_branch": 1}


@pytest.mark.parametrize("quantize", [bnb_4bit, torchao_nvfp4], ids=["4 bits", "NVFP4"])
def test_copies_checkpoints_and_compile(quantize, backend):
    model, layer = make(quantize)
    x = torch.randn(37, K).requires_grad_()
    slk.accelerate_peft(model, strict=True)
    expected = model(x)
    wanted = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    gradients = torch.autograd.grad(expected.sum(), wanted)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    for use_reentrant in (False, True):
        again = checkpoint(model, x, use_reentrant=use_reentrant)
        again.sum().backward()
        for tensor, gradient in zip(wanted, gradients, strict=True):
            assert torch.equal(tensor.grad, gradient)
            tensor.grad = None
        assert torch.equal(again, expected)
    if backend == "triton":
        # bitsandbytes' own forward can't be compiled whole, as it may change its bias.
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def torchao_with(name):
    return partial(torchao, config=f"{name}Config")


# How a layer is quantized, and why LoRA before it would train wrongly.
KINDS = {
    "plain": (nn.Linear.eval, None),
    "4 bits": (bnb_4bit, None),
    "8 bits": (bnb_8bit, None),
    "torchao int8": (torchao_int8, None),
    "torchao intx": (torchao_with("IntxWeightOnly"), None),
    "torchao float8": (torchao_fp8, None),
    "torchao NVFP4": (torchao_nvfp4, None),
    "another library's weight": (scaled, None),
    "compressed-tensors, weights": (partial(compressed_tensors, input_activations=False), None),
    "torchao int8, inputs": (
        torchao_with("Int8DynamicActivationInt8Weight"), "its Int8Tensor's product has no gradient for the input",
    ),
    "torchao intx, inputs": (
        torchao_with("Int8DynamicActivationIntxWeight"),
        "its IntxUnpackedToInt8Tensor's product has no gradient for the input",
    ),
    "compressed-tensors, inputs": (
        partial(compressed_tensors, input_activations=True), "compressed-tensors quantizes the input without a gradient",
    ),
}  # fmt: skip


def gradient_of_the_first(model):
    """Of B of the layer "0", which has the only branch."""
    x = torch.randn(37, K, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    (gradient,) = (p.grad for name, p in model.named_parameters() if "lora_B" in name)
    return gradient.flatten()


def two_layers(quantize):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), quantize(nn.Linear(K, N)))


def two_pefts(quantize, targets):
    """Two layers with PEFT's adapters on ``targets``."""
    model = two_layers(quantize)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(target_modules=targets)).train()


RIGHT = {name: quantize for name, (quantize, reason) in KINDS.items() if reason is None}
WRONG = {name: kind for name, kind in KINDS.items() if name not in RIGHT}


@pytest.mark.parametrize("quantize", RIGHT.values(), ids=RIGHT)
def test_layers_that_give_their_input_a_gradient_are_accepted(quantize, recwarn):
    found = gradient_of_the_first(two_pefts(quantize, ["0"]))
    expected = gradient_of_the_first(two_pefts(nn.Linear.eval, ["0"]))
    assert nn.functional.cosine_similarity(found, expected, 0) > 0.99
    for targets in (["0"], ["0", "1"]):
        assert slk.accelerate_peft(two_pefts(quantize, targets), strict=True).notes == ()
        report = slk.apply_lora(two_layers(quantize), ["0"])
        assert not any("gradient" in note for note in report.notes)
    assert not any("gradient" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(("quantize", "reason"), WRONG.values(), ids=WRONG)
def test_layers_that_give_their_input_no_gradient_are_named_and_refused(quantize, reason):
    """Whether they have adapters themselves or come behind layers that have."""
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient_of_the_first(two_pefts(quantize, ["0"]))
    text = f"{reason}, so adapters before it get wrong gradients: "
    for targets in (["0"], ["0", "1"]):
        with pytest.raises(ValueError, match=f"strict=True, but {text}base_model.model.1$"):
            slk.accelerate_peft(two_pefts(quantize, targets), strict=True)
        with pytest.warns(UserWarning, match=text):
            assert slk.accelerate_peft(two_pefts(quantize, targets)).notes == (
                f"{text}base_model.model.1",
            )
        with pytest.warns(UserWarning, match=text):
            report = slk.apply_lora(two_layers(quantize), targets)
        assert report.notes == (f"{text}1",) and [row.name for row in report.replaced] == ["0"]
        assert len(report.skipped) == ("1" in targets)
        # Where nothing trains, nothing trains wrongly.
        assert (
            slk.accelerate_peft(
                two_pefts(quantize, targets).requires_grad_(False), strict=True
            ).notes
            == ()
        )


def test_layers_of_quantization_aware_training_keep_their_own_product(calls):
    """torchao's fake-quantized layers: the branch is ours, and all trains as with PEFT."""
    quantization = pytest.importorskip(
        "torchao.quantization", reason="runs where torchao is installed: pip install .[test]"
    )
    qat = pytest.importorskip(
        "torchao.quantization.qat", reason="runs where torchao has qat: pip install .[test]"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    qat_config = qat.QATConfig(quantization.Int8DynamicActivationIntxWeightConfig(), step="prepare")
    quantization.quantize_(model, qat_config)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    )
    assert type(model.base_model.model[0].base_layer).__name__ == "FakeQuantizedLinear"
    x = torch.randn(5, 64)

    def step():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = step()
    slk.accelerate_peft(model, strict=True)
    for value, right in zip(step(), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-3)
    assert calls.layers == {"lora_branch": 2}
