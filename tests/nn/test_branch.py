"""LoRA on layers that compute their own product, since only their own code can read the weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_branch
from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.testing import EPS, fp8_weight
from tests.helpers.inputs import BF16, FP32
from tests.helpers.oracle import run_layer
from tests.helpers.quantized_weights import K, N, bnb_8bit, fp8_linear, torchao, torchao_int8
from tests.helpers.small_models import fill_b, lora_config, lora_over, reasons


class Scaled(Tensor):
    """A weight that only its own code can read: the tensor holds half of each element."""

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().as_subclass(Tensor).clone().as_subclass(type(self)), self.requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, 2 * weight.as_subclass(Tensor), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def scaled(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter((linear.weight.detach() / 2).as_subclass(Scaled))
    return linear


def torchao_fp8_a_tensor(linear: nn.Linear) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    one = quantization.PerTensor()
    quantization.quantize_(linear, quantization.Float8WeightOnlyConfig())
    weight = type(linear.weight).from_hp(torch.randn(N, K).to(linear.weight.dtype), granularity=one)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


BASES = {
    "a tensor of its own": scaled,
    "bitsandbytes 8-bit": bnb_8bit,
    "torchao int8": torchao_int8,
    "torchao int4": lambda linear: torchao(linear, "IntxWeightOnlyConfig"),
    "torchao float8, a scale a tensor": torchao_fp8_a_tensor,
}


@pytest.fixture(params=BASES)
def base(request) -> nn.Module:
    torch.manual_seed(0)
    return BASES[request.param](nn.Linear(K, N))


def test_the_layer_computes_its_own_product(base, backend, monkeypatch):
    layer = lora_over(base)
    assert type(layer) is LoRABranchLinear and layer.base_layer is base
    assert layer.weight is base.weight and layer.bias is base.bias
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(70, K, requires_grad=True)
    pair, grad = (layer.lora_A, layer.lora_B), torch.randn(70, N)
    found = run_layer(layer, x, pair, grad)
    expected = run_layer(lambda x: lora_branch(base(x), x, *pair, layer.scaling), x, pair, grad)
    assert all(torch.equal(value, expected[name]) and bool(value.any()) for name, value in found.items())
    assert not torch.equal(found["Y"], base(x))
    assert layer(x[:0]).shape == (0, N)
    with torch.autocast("cpu", BF16):
        assert layer(x).dtype == base(x).dtype
    assert "base_layer" in repr(layer) and "r=3" in repr(layer)


def test_pefts_layer_gives_the_same(base, backend):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    if type(base.weight) is Scaled or type(base.weight).__name__ == "IntxUnpackedToInt8Tensor":
        pytest.skip("PEFT reads the weight of a layer that it does not know")
    model = nn.Sequential(copy.deepcopy(base))
    model.is_loaded_in_8bit = type(base).__name__ == "Linear8bitLt"
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    ours, pair = lora_over(base), (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    with torch.no_grad():
        ours.lora_A.copy_(pair[0])
        ours.lora_B.copy_(pair[1])
    x, grad = torch.randn(70, K, requires_grad=True), torch.randn(70, N)
    expected = run_layer(theirs, x, pair, grad)
    for name, value in run_layer(ours, x, (ours.lora_A, ours.lora_B), grad).items():
        atol = 16 * EPS[FP32] * expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol)


class Holder(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.head = base, nn.Linear(N, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.q_proj(x)))


def test_from_apply_to_remove(base, tmp_path):
    model, x = Holder(base), torch.randn(5, K)
    plain, keys = model(x), set(model.state_dict())
    seen: list[nn.Module] = []
    handle = base.register_forward_hook(lambda module, args, out: seen.append(module))
    report = slk.apply_lora(model, lora_config(target_modules=["q_proj"], bias="lora_only"))
    kind = type(base).__name__ if type(base) is not nn.Linear else f"nn.Linear with {type(base.weight).__name__}"
    assert report.notes == (
        "1 hook of 'q_proj' moved to the new layer",
        f"1 {kind} compute their own product, with the branch on it; these layers can't be merged",
    )
    layer = model.q_proj
    assert [pair.name for pair in slk.lora_pairs(model)] == ["q_proj"] and layer.bias.requires_grad
    own = {key.replace("q_proj.", "q_proj.base_layer.") for key in keys if key.startswith("q_proj.")}
    assert set(model.state_dict()) == own | {"head.weight", "head.bias", "q_proj.lora_A", "q_proj.lora_B"}
    assert torch.equal(model(x), plain) and seen == [layer]
    fill_b(model)
    expected = model(x)
    assert not torch.allclose(expected, plain, atol=1e-3)

    slk.save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.q_proj."
    assert set(saved) == {prefix + "lora_A.weight", prefix + "lora_B.weight", prefix + "base_layer.bias"}
    other = Holder(copy.deepcopy(base))
    slk.load_adapter(other, tmp_path)
    other.head = model.head
    assert torch.equal(other(x), expected)
    slk.load_adapter(model, tmp_path)
    assert torch.equal(copy.deepcopy(model)(x), expected)

    again = slk.apply_lora(nn.Sequential(model, nn.Linear(2, 2)), lora_config(target_modules="all-linear"))
    assert reasons(again) == {
        "0.q_proj": "it is a LoRALinear already",
        "0.q_proj.base_layer": "it is the base layer of a LoRALinear",
    }
    with pytest.raises(ValueError, match=r"'q_proj': the weight is a \w+ that only its \w+ can read"):
        slk.merge_lora(model)
    with pytest.raises(ValueError, match=r"remove_lora\(model, merge=False\)"):
        slk.remove_lora(model)
    assert model.q_proj is layer
    slk.remove_lora(model.eval(), merge=False)
    assert model.q_proj is base and not base.training
    seen.clear()
    model(x)
    handle.remove()
    model(x)
    assert seen == [base]


def test_training_moves_and_pickles(backend):
    """By a base that pickles, as torchao's layers do not."""
    model, x = Holder(bnb_8bit(nn.Linear(K, N))), torch.randn(8, K)
    slk.apply_lora(model, lora_config(target_modules=["q_proj"], lora_dropout=0.3))
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.1)
    before = model.eval()(x)
    assert torch.equal(model(x), before)
    torch.manual_seed(0)
    model.train()(x).square().mean().backward()
    optimizer.step()
    first = model(x)
    assert not torch.equal(model(x), first) and not torch.equal(model.eval()(x), before)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
        assert torch.equal(twin(x), model(x))


def test_a_layer_that_gives_its_input_no_gradient():
    """Its input would be trained on the branch's gradient alone. torchao's products in 8 bits are known for that."""
    quiet = torchao(nn.Linear(K, N, dtype=BF16), "Int8DynamicActivationInt8WeightConfig")
    model = nn.Sequential(quiet, nn.Linear(N, 8))
    report = slk.apply_lora(model, lora_config(target_modules="all-linear"))
    assert reasons(report)["0"].startswith(
        "linear must give its input a gradient, which a layer that quantizes it does not"
    )
    with pytest.raises(ValueError, match="linear must give its input a gradient"):
        slk.LoRALinear.from_linear(quiet)

    class Deaf(Scaled):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out.detach() if func is nn.functional.linear else out

    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Deaf))
    layer, x = lora_over(linear), torch.randn(5, K)
    assert layer(x).requires_grad
    with pytest.raises(RuntimeError, match=r"base_layer must give its input a gradient, .* Linear with a Deaf"):
        layer(x.requires_grad_())
    with torch.no_grad():
        layer(x)


def test_lora_dtypes_and_hooks_of_weights():
    assert lora_over(scaled(nn.Linear(K, N)).to(BF16), lora_dtype=BF16).lora_A.dtype == BF16
    with pytest.raises(
        TypeError, match=r"lora_dtype must be torch.float32 or the weight's torch.float32, got torch.bfloat16"
    ):
        lora_over(bnb_8bit(nn.Linear(K, N)), lora_dtype=BF16)
    # Computed at each access, by code of the layer's own.
    layer = lora_over(nn.utils.parametrizations.weight_norm(nn.Linear(K, N)))
    assert type(layer) is LoRABranchLinear
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_float8_with_other_scales_without_torchao():
    linear = fp8_linear(fp8_weight(20, 64), BF16)
    assert type(lora_over(linear)).__name__ == "LoRAQuantizedLinear"
    linear.weight.scale = torch.ones(())
    assert type(lora_over(linear)) is LoRABranchLinear
