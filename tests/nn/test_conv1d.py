"""LoRA on transformers' Conv1D, whose weight is [in, out], and on a tied head."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, FP16, FP32
from tests.helpers.layer_calls import check_value
from tests.helpers.oracle import check_all, layer_oracle, run_layer
from tests.helpers.quantized_weights import K, N
from tests.helpers.small_models import IDS, Model, fill_b, lora_config, lora_over, output, reasons


def conv1d(n: int = N, k: int = K, dtype: torch.dtype = FP32) -> nn.Module:
    utils = pytest.importorskip(
        "transformers.pytorch_utils", reason="transformers is not installed (pip install .[test])"
    )
    layer = utils.Conv1D(n, k)
    nn.init.normal_(layer.weight, std=k**-0.5)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("shape", "n", "k", "r"),
    [((70,), N, K, 3), ((1,), 64, 64, 1), ((2, 19), 64, 64, 20), ((0,), N, K, 3), ((5,), 31, 17, 3)],
)
def test_conv1d_against_float64(shape, n, k, r, dtype, backend, poisoned_outputs):
    """Square weights too, of which nobody can tell by their sizes in which order they lie."""
    torch.manual_seed(0)
    base = conv1d(n, k, dtype)
    layer = lora_over(base, r=r)
    assert type(layer) is LoRAConv1D and layer.weight is base.weight and layer.weight.shape == (k, n)
    assert (layer.in_features, layer.out_features) == (k, n)
    x, grad = torch.randn(*shape, k).to(dtype).requires_grad_(), torch.randn(*shape, n).to(dtype)
    pair = (layer.lora_A, layer.lora_B)

    def eager(x):
        return base(x) + layer.scaling * (x @ layer.lora_A.to(dtype).t() @ layer.lora_B.to(dtype).t())

    given = (x, layer.weight.t(), layer.bias, *pair, grad)
    ref, absolute = (
        layer_oracle(x, w, bias, pair, grad, layer.scaling)
        for x, w, bias, *pair, grad in (given, map(torch.abs, given))
    )
    found, base_results = run_layer(layer, x, pair, grad), run_layer(eager, x, pair, grad)
    if x.shape[:-1].numel() != 1 or dtype != FP32:
        check_all(found, ref, base_results, dtype)
    else:
        # Eager's own error of one row may be next to nothing by chance, so a rounding of its terms is allowed too.
        for name, value in found.items():
            check_value(name, value, ref[name], base_results[name], absolute[name], EPS[dtype], broken=False)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("n", [N, K])
def test_conv1d_merges_transposed_and_back(dtype, n):
    base = conv1d(n, K, dtype)
    layer = lora_over(base)
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
