"""LoRA on layers whose weights are in 4 or 8 bits: by hand, through apply_lora, and against PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import is_quantized, read
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.oracle import run_layer
from tests.helpers.quantized_weights import Linear4bit, bnb_4bit, fp8_linear, torchao

BF16, FP32 = torch.bfloat16, torch.float32
LAYERS = {
    "nf4": lambda: Linear4bit(nf4_weight(20, 64, 64, nested=True), True, BF16),
    "nf4 in the input's dtype": lambda: Linear4bit(nf4_weight(20, 64, 64, nested=False), False, None),
    "fp8": lambda: fp8_linear(fp8_weight(20, 64), BF16),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = LAYERS["nf4"](), LAYERS["fp8"]()
        self.v_proj = nn.Linear(64, 20)

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x.to(BF16)).to(x.dtype) + self.v_proj(x)


def lora(kind: str, **kwargs) -> tuple[nn.Linear, LoRAQuantizedLinear]:
    torch.manual_seed(0)
    base = LAYERS[kind]()
    layer = slk.LoRALinear.from_linear(base, r=4, **kwargs)
    nn.init.normal_(layer.lora_B, std=0.1)
    return base, layer


def dtype_of(kind: str) -> torch.dtype:
    return BF16 if kind == "fp8" else FP32


@pytest.mark.parametrize("kind", LAYERS)
def test_from_linear_shares_freezes_and_starts_at_the_base(kind):
    base = LAYERS[kind]().eval()
    layer = slk.LoRALinear.from_linear(base, r=4)
    assert type(layer) is LoRAQuantizedLinear and not layer.training
    assert layer.weight is base.weight and layer.bias is base.bias
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.lora_A.dtype) == ((4, 64), (20, 4), FP32)
    x = torch.randn(70, 64, dtype=dtype_of(kind))
    expected = base(x) if kind != "fp8" else nn.functional.linear(x, read(base.weight).dequantize(BF16), base.bias)
    torch.testing.assert_close(layer(x), expected)
    assert type(base.weight).__name__ in repr(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients_are_the_functions(kind, backend):
    _, layer = lora(kind)
    inputs, compute = dtype_of(kind), FP32 if kind == "nf4 in the input's dtype" else BF16
    x = torch.randn(70, 64, dtype=inputs, requires_grad=True)
    args = (read(layer.weight), None if layer.bias is None else layer.bias.to(compute), layer.lora_A, layer.lora_B)
    pair, grad = (layer.lora_A, layer.lora_B), torch.randn(70, 20, dtype=inputs)
    found = run_layer(layer, x, pair, grad)
    expected = run_layer(lambda x: lora_linear(x.to(compute), *args, layer.scaling), x, pair, grad)
    assert found["Y"].dtype == inputs and torch.equal(found["Y"], expected["Y"].to(inputs))
    assert all(torch.equal(found[name], expected[name]) and bool(found[name].any()) for name in ("dX", "dA", "dB"))


def test_autocast_decides_where_it_is_on():
    _, layer = lora("nf4 in the input's dtype")
    with torch.autocast("cpu", BF16):
        assert layer(torch.randn(3, 64)).dtype == BF16
    assert layer(torch.randn(3, 64)).dtype == FP32


def test_a_branch_of_the_computing_dtype():
    _, layer = lora("nf4", lora_dtype=BF16)
    assert layer.lora_A.dtype == BF16
    assert layer(torch.randn(3, 64)).dtype == FP32
    with pytest.raises(
        TypeError, match=r"lora_dtype must be torch.float32 or the weight's torch.bfloat16, got torch.float16"
    ):
        lora("nf4", lora_dtype=torch.float16)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_is_refused_and_changes_nothing(kind):
    base, layer = lora(kind)
    model = nn.ModuleDict({"plain": slk.LoRALinear(64, 20), "low": layer})
    with pytest.raises(ValueError, match=r"'low': a weight in .* would have to be quantized anew to be merged"):
        slk.merge_lora(model)
    with pytest.raises(ValueError, match="quantized anew"):
        slk.remove_lora(model)
    assert not any(other.merged for other in lora_layers(model).values()) and layer.weight is base.weight
    x = torch.randn(5, 64, dtype=dtype_of(kind))
    slk.remove_lora(model.eval(), merge=False)
    assert model["low"] is base and not base.training
    assert base.weight is layer.weight and type(model["plain"]) is nn.Linear
    if kind != "fp8":
        assert base(x).shape == (5, 20)


def test_copies_and_state_dicts():
    base, layer = lora("nf4")
    x = torch.randn(5, 64)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
    assert other.to_linear() is not base
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "weight.absmax", "weight.quant_map"}


def test_apply_lora_replaces_and_reports():
    model = Model()
    weights = {name: model.get_submodule(name).weight for name in ("q_proj", "k_proj", "v_proj")}
    report = slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules="all-linear", bias="all"))
    assert [m.name for m in report.replaced] == ["q_proj", "k_proj", "v_proj"] and report.skipped == ()
    assert report.notes == (
        "quantized weights (1 Params4bit, 1 Float8Tensor) stay as they are stored; these layers can't be merged",
    )
    # 4 bits are counted by elements: three weights, three biases, three pairs.
    assert report.total == 3 * (20 * 64 + 20 + 4 * (20 + 64))
    layers = lora_layers(model)
    assert [type(layer) for layer in layers.values()] == [LoRAQuantizedLinear, LoRAQuantizedLinear, slk.LoRALinear]
    assert all(layers[name].weight is weight for name, weight in weights.items())
    assert len(slk.lora_pairs(model)) == 3
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.1)
    x, before = torch.randn(8, 64), model(torch.ones(1, 64)).detach()
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(model(torch.ones(1, 64)), before)
    assert all(layers[name].weight is weight for name, weight in weights.items())


def test_adapters_are_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed (pip install .[adapters])")
    model, other = Model(), Model()
    slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules=["q_proj", "k_proj"]))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    slk.save_adapter(model, tmp_path / "adapter")
    slk.load_adapter(other, tmp_path / "adapter")
    for name, layer in lora_layers(other).items():
        assert type(layer) is LoRAQuantizedLinear
        assert torch.equal(layer.lora_B, model.get_submodule(name).lora_B)


def test_what_can_not_be_read_is_skipped_with_the_reason():
    model = Model()
    model.q_proj.weight.quant_state = None
    model.k_proj.weight.act_quant_kwargs = "rows"
    report = slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules="all-linear"))
    assert [m.name for m in report.replaced] == ["v_proj"]
    reasons = {m.name: m.reason for m in report.skipped}
    assert reasons["q_proj"].startswith("weight must be a quantized Params4bit of two dimensions, got Params4bit")
    assert reasons["k_proj"].startswith(
        "linear must give its input a gradient, which a layer that quantizes it does not"
    )
    with pytest.raises(TypeError, match="weight must be a quantized Params4bit"):
        slk.LoRALinear.from_linear(model.q_proj)


# With the packages themselves.


def bnb_layer(compute_dtype: torch.dtype | None = BF16) -> nn.Linear:
    torch.manual_seed(0)
    return bnb_4bit(nn.Linear(64, 48), compute_dtype).train()


@pytest.mark.parametrize("compute_dtype", [BF16, FP32], ids=str)
def test_pefts_layer_over_bitsandbytes_gives_the_same(compute_dtype):
    base = bnb_layer(compute_dtype)
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    model = nn.Sequential(copy.deepcopy(base))
    model.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).base_model.model[0]
    assert type(theirs).__name__ == "Linear4bit" and type(theirs).__module__.startswith("peft.")
    ours = slk.LoRALinear.from_linear(base, r=4, lora_alpha=8)
    pair = (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    with torch.no_grad():
        nn.init.normal_(pair[1], std=0.1)
        ours.lora_A.copy_(pair[0])
        ours.lora_B.copy_(pair[1])
    x, grad = torch.randn(70, 64, requires_grad=True), torch.randn(70, 48)
    found, expected = run_layer(ours, x, (ours.lora_A, ours.lora_B), grad), run_layer(theirs, x, pair, grad)
    bound = 2e-2 if compute_dtype == BF16 else 1e-5
    for name, value in found.items():
        scale = 1.0 if name == "Y" else expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=bound, atol=bound * scale)


def test_a_model_of_bitsandbytes_from_apply_to_remove():
    model = nn.Sequential(bnb_layer(), nn.Linear(48, 8))
    base, x = model[0], torch.randn(5, 64)
    expected, keys = model(x), set(model.state_dict())
    slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules=["0"]))
    assert type(model[0]) is LoRAQuantizedLinear and is_quantized(model[0].weight)
    torch.testing.assert_close(model(x), expected)
    assert set(model.state_dict()) == keys | {"0.lora_A", "0.lora_B"}
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    slk.remove_lora(model, merge=False)
    assert model[0] is base and torch.equal(model(x), expected)


def test_a_layer_of_torchao():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=BF16), nn.Linear(48, 8, dtype=BF16))
    torchao(model[0], "Float8WeightOnlyConfig")
    x = torch.randn(5, 64, dtype=BF16)
    expected = model(x)
    report = slk.apply_lora(model, slk.LoRAConfig(r=4, target_modules=["0", "1"]))
    assert len(report.replaced) == 2 and type(model[0]) is LoRAQuantizedLinear
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    model(x).sum().backward()
    assert bool(model[0].lora_B.grad.any())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    slk.remove_lora(model, merge=False)
    assert torch.equal(model(x), expected) and type(model[0].weight).__name__ == "Float8Tensor"
