"""LoRA on layers that hold no plain [out, in] weight: transformers' Conv1D, and layers that compute their own product."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_branch
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.testing import EPS, assert_no_worse
from tests.helpers.quantized_weights import fp8_linear, fp8_weight
from tests.helpers.small_models import IDS, Model, fill_b, lora_config, output, reasons
from tests.integrations.test_peft_quantized import bnb_8bit, torchao, torchao_int8

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, K = 96, 64


def conv1d(n: int = N, k: int = K, dtype: torch.dtype = FP32) -> nn.Module:
    utils = pytest.importorskip(
        "transformers.pytorch_utils", reason="transformers is not installed (pip install .[test])"
    )
    layer = utils.Conv1D(n, k)
    nn.init.normal_(layer.weight, std=k**-0.5)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def over(base: nn.Module, **kwargs) -> slk.LoRALinear:
    layer = slk.LoRALinear.from_linear(base, **{"r": 3, "lora_alpha": 6} | kwargs)
    nn.init.normal_(layer.lora_B, std=layer.r**-0.5)
    return layer


# Conv1D


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("shape", "n", "k", "r"),
    [((70,), N, K, 3), ((1,), 64, 64, 1), ((2, 19), 64, 64, 20), ((0,), N, K, 3), ((5,), 31, 17, 3)],
)
def test_conv1d_against_float64(shape, n, k, r, dtype, backend, poisoned_outputs):
    """Square weights too, of which nobody can tell by their sizes in which order they lie."""
    torch.manual_seed(0)
    base = conv1d(n, k, dtype)
    layer = over(base, r=r)
    assert type(layer) is LoRAConv1D and layer.weight is base.weight and layer.weight.shape == (k, n)
    assert (layer.in_features, layer.out_features) == (k, n)
    x, grad = torch.randn(*shape, k).to(dtype).requires_grad_(), torch.randn(*shape, n).to(dtype)
    wanted = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    found = (y.detach(), *torch.autograd.grad(y, wanted, grad))
    a, b = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    plain = base(x) + layer.scaling * (x @ a.t() @ b.t())
    eager = (plain.detach(), *torch.autograd.grad(plain, wanted, grad))
    w, bias, a, b = (t.detach().double() for t in (layer.weight.t(), layer.bias, layer.lora_A, layer.lora_B))
    ref = slk.reference.lora_linear_grads_ref(grad.double(), x.detach().double(), w, a, b, layer.scaling)
    exact = (
        slk.reference.lora_linear_ref(x.detach().double(), w, bias, a, b, layer.scaling), ref["dX"], ref["dA"], ref["dB"],
    )  # fmt: skip
    for name, mine, right, theirs in zip(("Y", "dX", "dA", "dB"), found, exact, eager, strict=True):
        assert_no_worse(mine, right, theirs, dtype=dtype, name=name)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", [N, K])
def test_conv1d_merges_transposed_and_back(dtype, n):
    base = conv1d(n, K, dtype)
    layer = over(base)
    frozen, x = base.weight.detach().clone(), torch.randn(5, K).to(dtype)
    apart, delta = layer.eval()(x), layer.scaling * (layer.lora_B @ layer.lora_A).t()
    error = layer.merge()
    assert torch.equal(layer.weight, (frozen.float() + delta).to(dtype)) and base.weight is not layer.weight
    exact = frozen.double() + layer.delta_weight().t().double()
    assert error.largest_error == pytest.approx((layer.weight.double() - exact).abs().max().item(), rel=1e-5)
    assert layer.merge_error() == error
    torch.testing.assert_close(layer(x), apart, rtol=0, atol=8 * EPS[dtype] * apart.abs().max().item())
    assert torch.equal(layer.state_dict()["weight"], frozen)
    with pytest.raises(RuntimeError, match="is merged, so lora_A and lora_B would get no gradient"):
        layer.train()(x)
    layer.unmerge()
    assert layer.weight is base.weight and torch.equal(base.weight, frozen)


def test_conv1d_moves_copies_and_comes_back():
    base = conv1d()
    model = nn.Sequential(base, nn.Linear(N, 8))
    keys, x = set(model.state_dict()), torch.randn(5, K)
    plain = model(x)
    report = slk.apply_lora(model, lora_config(target_modules=["0"], fan_in_fan_out=True))
    assert report.notes == () and set(model.state_dict()) == keys | {"0.lora_A", "0.lora_B"}
    assert torch.equal(model(x), plain)
    fill_b(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert type(twin[0].to_linear()) is type(base) and twin[0].to_linear() is not base
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected)
    moved = copy.deepcopy(model).to(BF16)
    moved.load_state_dict(model.state_dict())
    slk.remove_lora(moved, merge=False)
    assert type(moved[0]) is type(base) and torch.equal(moved[0].weight, base.weight.to(BF16))
    merged = copy.deepcopy(model)
    slk.remove_lora(merged)
    assert type(merged[0]) is type(base)
    torch.testing.assert_close(merged(x), expected)
    slk.remove_lora(model, merge=False)
    assert model[0] is base and torch.equal(model(x), plain)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_by_all_linear(backend):
    model = gpt2()
    plain = output(model)
    report = slk.apply_lora(model, lora_config(target_modules="all-linear"))
    # attn.c_proj is square.
    assert [m.name.removeprefix("transformer.h.1.") for m in report.replaced][4:] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ]  # fmt: skip
    assert {m.name: (m.in_features, m.out_features) for m in report.replaced}["transformer.h.0.attn.c_attn"] == (16, 48)
    assert reasons(report) == {"lm_head": "its weight is tied to 'transformer.wte', so \"all-linear\" leaves it out"}
    torch.testing.assert_close(output(model), plain)
    optimizer = slk.StableLoRAAdamW.from_model(model.train(), lr=0.1)
    assert len(slk.lora_pairs(model)) == 8
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.allclose(output(model.eval()), plain, atol=1e-3)


def test_fan_in_fan_out_is_the_layers_and_reported():
    model = nn.ModuleDict({"conv": conv1d(), "linear": nn.Linear(4, 4)})
    given = lora_config(target_modules=["conv", "linear"])
    report = slk.apply_lora(copy.deepcopy(model), given)
    assert report.notes == ("fan_in_fan_out is False, but conv hold [in, out], and are taken so",)
    given = lora_config(target_modules=["conv", "linear"], fan_in_fan_out=True)
    report = slk.apply_lora(copy.deepcopy(model), given)
    assert report.notes == ("fan_in_fan_out is True, but linear hold [out, in], and are taken so",)
    with pytest.raises(ValueError, match=r"Its linear layers: 'conv', 'linear'$"):
        slk.apply_lora(model, lora_config(target_modules=["other"]))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_conv1d_adapters_are_pefts(bias, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    names = ["c_attn", "c_proj"]
    ours = gpt2()
    slk.apply_lora(ours, lora_config(target_modules=names, bias=bias))
    fill_b(ours)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.normal_()
    slk.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert theirs.peft_config["default"].fan_in_fan_out
    torch.testing.assert_close(output(theirs), output(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    again = gpt2()
    report = slk.load_adapter(again, tmp_path / "theirs")
    assert len(report.replaced) == 6 and all(type(m) is LoRAConv1D for m in lora_layers(again).values())
    assert torch.equal(output(again), output(ours))
    slk.load_adapter(again, tmp_path / "ours")


# Layers that compute their own product


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
    layer = over(base)
    assert type(layer) is LoRABranchLinear and layer.base_layer is base
    assert layer.weight is base.weight and layer.bias is base.bias
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(70, K, requires_grad=True)
    wanted = (x, layer.lora_A, layer.lora_B)
    y, expected = layer(x), lora_branch(base(x), x, layer.lora_A, layer.lora_B, layer.scaling)
    assert torch.equal(y, expected) and not torch.equal(y, base(x))
    grad = torch.randn_like(y)
    found, right = (torch.autograd.grad(out, wanted, grad) for out in (y, expected))
    assert all(torch.equal(one, other) and bool(one.any()) for one, other in zip(found, right, strict=True))
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
    ours, pair = over(base), (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    with torch.no_grad():
        ours.lora_A.copy_(pair[0])
        ours.lora_B.copy_(pair[1])
    x = torch.randn(70, K, requires_grad=True)
    y, expected = ours(x), theirs(x)
    grad = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, (x, ours.lora_A, ours.lora_B), grad))
    for one, other in zip(found, (expected, *torch.autograd.grad(expected, (x, *pair), grad)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * EPS[FP32] * other.abs().max().item())


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
        "1 hook(s) of 'q_proj' were moved to the new layer",
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
    layer, x = over(linear), torch.randn(5, K)
    assert layer(x).requires_grad
    with pytest.raises(RuntimeError, match=r"base_layer must give its input a gradient, .* Linear with a Deaf"):
        layer(x.requires_grad_())
    with torch.no_grad():
        layer(x)


def test_lora_dtypes_and_hooks_of_weights():
    assert over(scaled(nn.Linear(K, N)).to(BF16), lora_dtype=BF16).lora_A.dtype == BF16
    with pytest.raises(
        TypeError, match=r"lora_dtype must be torch.float32 or the weight's torch.float32, got torch.bfloat16"
    ):
        over(bnb_8bit(nn.Linear(K, N)), lora_dtype=BF16)
    # Computed at each access, by code of the layer's own.
    layer = over(nn.utils.parametrizations.weight_norm(nn.Linear(K, N)))
    assert type(layer) is LoRABranchLinear
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_float8_with_other_scales_without_torchao():
    linear = fp8_linear(fp8_weight(20, 64), BF16)
    assert type(over(linear)).__name__ == "LoRAQuantizedLinear"
    linear.weight.scale = torch.ones(())
    assert type(over(linear)) is LoRABranchLinear


# A tied head


def test_a_tied_head(backend, tmp_path):
    """The embedding is the head's frozen weight, and neither trains."""
    torch.manual_seed(0)
    model = Model(tied=True)
    plain = output(model)
    slk.apply_lora(model, lora_config(target_modules=["lm_head"]))
    assert model.lm_head.weight is model.embed.weight and not model.embed.weight.requires_grad
    torch.testing.assert_close(output(model), plain)
    fill_b(model)
    expected = output(model)
    frozen = model.embed.weight.detach().clone()
    slk.save_adapter(model, tmp_path)
    other = Model(tied=True)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    slk.load_adapter(other, tmp_path)
    assert torch.equal(output(other), expected) and other.lm_head.weight is other.embed.weight
    # A move keeps the two tied.
    assert (moved := copy.deepcopy(model).to(BF16)).lm_head.weight is moved.embed.weight
    report = slk.merge_lora(model)
    assert report.untied == {"lm_head": ("embed.weight",)} and torch.equal(model.embed.weight, frozen)
    torch.testing.assert_close(output(model), expected)
    slk.unmerge_lora(model)
    assert model.lm_head.weight is model.embed.weight
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=0.1)
    nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    optimizer.step()
    assert torch.equal(model.embed.weight, frozen) and not torch.equal(output(model), expected)
