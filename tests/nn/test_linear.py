"""LoRALinear: what it shares, how it starts, what merging does, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.reference import lora_linear_ref


def layer(dtype: torch.dtype = torch.float32, **kwargs) -> slk.LoRALinear:
    torch.manual_seed(0)
    made = slk.LoRALinear(24, 20, r=4, dtype=dtype, **kwargs)
    with torch.no_grad():
        made.lora_B.normal_(std=0.1)
    return made


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(24, 20)
    linear.eval()
    made = slk.LoRALinear.from_linear(linear, r=4)
    assert made.weight is linear.weight and made.bias is linear.bias and not made.training
    assert not made.weight.requires_grad and not made.bias.requires_grad
    assert made.lora_A.shape == (4, 24) and made.lora_B.shape == (20, 4)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    x = torch.randn(70, 24)
    torch.testing.assert_close(made(x), linear(x))


def test_no_bias_and_low_precision():
    made = slk.LoRALinear(24, 20, bias=False, dtype=torch.bfloat16)
    assert made.bias is None and made.lora_A.dtype == torch.float32
    assert made(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert slk.LoRALinear(24, 20, dtype=torch.bfloat16, lora_dtype=torch.bfloat16).lora_B.dtype == torch.bfloat16
    assert slk.LoRALinear(24, 20, dtype=torch.float64).lora_A.dtype == torch.float64


def test_initialization():
    torch.manual_seed(1)
    default = slk.LoRALinear(1000, 50, r=8)
    bound = 1 / math.sqrt(1000)
    assert not default.lora_B.any()
    assert bound * 0.95 < default.lora_A.abs().max() <= bound
    gaussian = slk.LoRALinear(1000, 50, r=8, init_lora_weights="gaussian")
    assert not gaussian.lora_B.any() and abs(gaussian.lora_A.std() * 8 - 1) < 0.05
    both = slk.LoRALinear(1000, 50, r=8, init_lora_weights=False)
    assert 0.9 / math.sqrt(8) < both.lora_B.abs().max() <= 1 / math.sqrt(8)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_and_value(rslora, scaling):
    made = layer(use_rslora=rslora)
    assert made.scaling == scaling
    x = torch.randn(70, 24)
    ref = lora_linear_ref(*(t.double() for t in (x, made.weight, made.bias, made.lora_A, made.lora_B)), scaling)
    torch.testing.assert_close(made(x).double(), ref, rtol=1e-5, atol=1e-5)


def test_merged_layer_computes_the_same():
    made = layer(lora_dropout=0.5).eval()
    x = torch.randn(9, 24)
    before = made(x)
    made.merge()
    torch.testing.assert_close(made(x), before, rtol=1e-5, atol=1e-5)


def test_merge_twice_unmerge_twice_and_training_while_merged():
    made = layer()
    with pytest.raises(RuntimeError, match="is not merged"):
        made.unmerge()
    made.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        made.merge()
    with pytest.raises(RuntimeError, match=r"merged, so lora_A and lora_B would get no gradient"):
        made(torch.ones(1, 24))
    with torch.no_grad():
        assert made(torch.ones(1, 24)).isfinite().all()
    assert made.eval()(torch.ones(1, 24)).isfinite().all()


def test_repr_says_what_matters():
    assert "in_features=24, out_features=20, bias=True, r=4, scaling=4, lora_dropout=0.1" in repr(
        layer(lora_dropout=0.1)
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got 2.0 of type float"),
        ({"lora_alpha": float("nan")}, ValueError, r"lora_alpha must be a finite number .* got nan"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be a finite number in \[0, 1\), got 1.0"),
        (
            {"init_lora_weights": "pissa"},
            ValueError,
            "init_lora_weights must be True, False or 'gaussian', got 'pissa'",
        ),
        ({"init_lora_weights": 0}, ValueError, "init_lora_weights must be True, False or 'gaussian', got 0"),
        (
            {"lora_dtype": torch.float16},
            TypeError,
            "lora_dtype must be torch.float32 or the weight's torch.float32, got torch.float16",
        ),
    ],
)
def test_bad_arguments_freeze_nothing(kwargs, error, message):
    linear = nn.Linear(24, 20)
    with pytest.raises(error, match=message):
        slk.LoRALinear.from_linear(linear, **kwargs)
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_bad_sizes_and_kinds():
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        slk.LoRALinear(0, 4)
    with pytest.raises(ValueError, match="out_features must be at least 1, got -1"):
        slk.LoRALinear(4, -1)
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear or transformers' Conv1D, got Conv1d"):
        slk.LoRALinear.from_linear(nn.Conv1d(1, 1, 1))
