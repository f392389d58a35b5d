"""LoRA on transformers' Conv1D, whose weight is [in, out]: against float64, in GPT-2, and what the report says of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import BF16, FP16, FP32
from tests.helpers.layer_calls import check_value
from tests.helpers.oracle import check_all, layer_oracle, run_layer
from tests.helpers.quantized_weights import K, N, conv1d
from tests.helpers.small_models import IDS, gpt2, lora_config, lora_over, output, reasons


@pytest.mark.covering
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
    assert layer.weight.shape == (k, n) and (layer.in_features, layer.out_features) == (k, n)
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


def test_gpt2_by_all_linear(backend):
    torch.manual_seed(0)
    model = gpt2()
    plain = output(model)
    report = slk.apply_lora(model, lora_config(target_modules="all-linear"))
    # attn.c_proj is square.
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert [m.name.removeprefix("transformer.h.1.") for m in report.replaced][4:] == names
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
    for said, note in (
        (False, "fan_in_fan_out is False, but conv hold [in, out], and are taken so"),
        (True, "fan_in_fan_out is True, but linear hold [out, in], and are taken so"),
    ):
        given = lora_config(target_modules=["conv", "linear"], fan_in_fan_out=said)
        assert slk.apply_lora(copy.deepcopy(model), given).notes == (note,)
    with pytest.raises(ValueError, match=r"Its linear layers: 'conv', 'linear'$"):
        slk.apply_lora(model, lora_config(target_modules=["other"]))
