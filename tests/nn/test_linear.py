"""Making a LoRA layer: how it starts, which class a base gets, and what is refused before anything
is frozen.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.nn.linear import LoRABranchLinear
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.quantized_weights import (
    K,
    Linear4bit,
    N,
    Scaled,
    conv1d,
    failing,
    fp8_linear,
    scaled,
    torchao,
)
from tests.helpers.small_models import lora_config, lora_over, reasons

BF16, FP32 = torch.bfloat16, torch.float32


def four_bits(compute_dtype: torch.dtype | None = BF16) -> nn.Linear:
    return Linear4bit(nf4_weight(N, K, 64, nested=True), True, compute_dtype)


def test_initialization_and_scaling():
    torch.manual_seed(1)
    default = slk.LoRALinear(1000, 50, r=8)
    bound = 1 / math.sqrt(1000)
    assert not default.lora_B.any() and bound * 0.95 < default.lora_A.abs().max() <= bound
    gaussian = slk.LoRALinear(1000, 50, r=8, init_lora_weights="gaussian")
    assert not gaussian.lora_B.any() and abs(gaussian.lora_A.std() * 8 - 1) < 0.05
    assert [slk.LoRALinear(24, 20, r=4, use_rslora=on).scaling for on in (False, True)] == [
        16 / 4,
        16 / 2,
    ]
    both = slk.LoRALinear(1000, 50, r=8, init_lora_weights=False)
    assert 0.9 / math.sqrt(8) < both.lora_B.abs().max() <= 1 / math.sqrt(8)


def test_fan_in_fan_out_is_the_layers_and_reported():
    for said, note in (
        (False, "fan_in_fan_out is False, but conv hold [in, out], and are taken so"),
        (True, "fan_in_fan_out is True, but linear hold [out, in], and are taken so"),
    ):
        model = nn.ModuleDict({"conv": conv1d(), "linear": nn.Linear(4, 4)})
        given = lora_config(target_modules=["conv", "linear"], fan_in_fan_out=said)
        assert slk.apply_lora(model, given).notes == (note,)


def test_dtypes():
    made = slk.LoRALinear(24, 20, bias=False, dtype=BF16)
    assert (
        made.bias is None
        and made.lora_A.dtype == FP32
        and made(torch.randn(3, 24, dtype=BF16)).dtype == BF16
    )
    assert slk.LoRALinear(24, 20, dtype=BF16, lora_dtype=BF16).lora_B.dtype == BF16
    assert slk.LoRALinear(24, 20, dtype=torch.float64).lora_A.dtype == torch.float64
    assert lora_over(scaled(nn.Linear(K, N)).to(BF16), lora_dtype=BF16).lora_A.dtype == BF16
    layer = lora_over(four_bits(), lora_dtype=BF16)
    assert layer.lora_A.dtype == BF16 and layer(torch.randn(3, K)).dtype == FP32


def fp8(**changes):
    linear = fp8_linear(fp8_weight(20, 64), BF16)
    vars(linear.weight).update(changes)
    return linear


NO_GRADIENT = "linear must give its input a gradient, but its {}'s product has no gradient"
FLOAT16 = {"lora_dtype": torch.float16}
# A base, more arguments, and the class that it gets, or the error. LoRAConfig's checks are in
# tests/model/test_apply.py.
BASES = {
    # A weight_norm is computed at each access, by code of the layer's own.
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), {}, LoRABranchLinear),
    "float8 of one scale": (lambda: fp8(scale=torch.ones(())), {}, LoRABranchLinear),
    # Others are in tests/integrations/test_peft_quantized.py.
    "float8 that quantizes its input, and gives it a gradient": (
        lambda: fp8(act_quant_kwargs="rows"), {}, LoRABranchLinear,
    ),
    "torchao int8": (
        lambda: torchao(nn.Linear(K, N, dtype=BF16), "Int8DynamicActivationInt8WeightConfig"), {},
        NO_GRADIENT.format("Int8Tensor"),
    ),
    "one that cannot be called here": (lambda: failing(nn.Linear(K, N)), {}, NO_GRADIENT.format("Failing")),
    "a convolution": (
        lambda: nn.Conv1d(1, 1, 1), {}, r"linear must be an nn.Linear or transformers' Conv1D, got Conv1d",
    ),
    "no rank": (lambda: nn.Linear(K, N), {"r": 0}, "r must be at least 1, got 0"),
    "all dropped": (
        lambda: nn.Linear(K, N), {"lora_dropout": 1.0}, r"lora_dropout must be a finite number in \[0, 1\), got 1.0",
    ),
    "another dtype": (
        lambda: nn.Linear(K, N), FLOAT16, "must be torch.float32 or the weight's torch.float32, got torch.float16",
    ),
    "one that 4 bits do not compute in": (
        four_bits, FLOAT16, f"must be torch.float32 or the weight's {BF16}, got torch.float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "expected"), BASES.values(), ids=BASES)
def test_which_class_a_base_gets_or_why_none(make, options, expected):
    if not isinstance(expected, str):
        assert type(lora_over(make())) is expected
        return
    model = nn.ModuleDict({"q_proj": make(), "v_proj": nn.Linear(K, N)})
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=expected):
        slk.LoRALinear.from_linear(model["q_proj"], **options)
    assert [p.requires_grad for p in model.parameters()] == trains
    if isinstance(model["q_proj"], nn.Linear) and not options:
        report = slk.apply_lora(model, lora_config(target_modules="all-linear"))
        assert [m.name for m in report.replaced] == ["v_proj"] and reasons(report)[
            "q_proj"
        ].startswith(expected)


def test_a_layer_that_gives_its_input_no_gradient():
    """Its input would be trained on the branch's gradient alone."""

    class Deaf(Scaled):
        is_deaf = False

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out.detach() if func is nn.functional.linear and cls.is_deaf else out

    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Deaf))
    layer, x = lora_over(linear), torch.randn(5, K)
    # Otherwise lora_over would refuse it.
    Deaf.is_deaf = True
    assert layer(x).requires_grad
    with pytest.raises(
        RuntimeError, match=r"base_layer must give its input a gradient, .* Linear with a Deaf"
    ):
        layer(x.requires_grad_())
    with torch.no_grad():
        layer(x)
