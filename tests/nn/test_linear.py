"""LoRALinear: how it starts, what it computes, what it can be put on, and merging, which is undone to
the bit.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.quantized import read
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.oracle import check_layer, run_layer
from tests.helpers.quantized_weights import (
    K,
    Linear4bit,
    N,
    bnb_4bit,
    bnb_8bit,
    conv1d,
    fp8_linear,
    scaled,
    torchao,
    torchao_int8,
)
from tests.helpers.small_models import lora_over, through_a_file

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*"
)


PLAIN: dict[str, Callable[[], Any]] = {
    "float32": lambda: nn.Linear(K, N),
    "bfloat16": lambda: nn.Linear(K, N, bias=False, dtype=BF16),
    "float16": lambda: nn.Linear(K, N, dtype=FP16),
    "float64": lambda: nn.Linear(K, N, dtype=FP64),
}
QUANTIZED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: Linear4bit(nf4_weight(N, K, 64, nested=True), True, BF16),
    "nf4 in x's dtype": lambda: Linear4bit(nf4_weight(N, K, 64, nested=False), False, None),
    "fp8": lambda: fp8_linear(fp8_weight(N, K), BF16),
    "bitsandbytes 4-bit": lambda: bnb_4bit(nn.Linear(K, N), BF16),
    "torchao float8": lambda: torchao(nn.Linear(K, N), "Float8WeightOnlyConfig"),
    "torchao NVFP4": lambda: torchao(nn.Linear(K, N), "NVFP4WeightOnlyConfig"),
}
KINDS = PLAIN | QUANTIZED
DTYPES = {"bfloat16": BF16, "float16": FP16, "float64": FP64, "fp8": BF16}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_plain = pytest.mark.parametrize("kind", PLAIN)


def layer_of(kind: str, **options: Any) -> slk.LoRALinear:
    torch.manual_seed(0)
    return lora_over(KINDS[kind](), **options)


def input_of(kind: str, rows: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, K, generator=generator).to(DTYPES.get(kind, FP32))


# How it starts


def test_initialization_and_scaling():
    torch.manual_seed(1)
    default = slk.LoRALinear(1000, 50, r=8)
    bound = 1 / math.sqrt(1000)
    assert not default.lora_B.any() and bound * 0.95 < default.lora_A.abs().max() <= bound
    gaussian = slk.LoRALinear(1000, 50, r=8, init_lora_weights="gaussian")
    assert not gaussian.lora_B.any() and abs(gaussian.lora_A.std() * 8 - 1) < 0.05
    both = slk.LoRALinear(1000, 50, r=8, init_lora_weights=False)
    assert 0.9 / math.sqrt(8) < both.lora_B.abs().max() <= 1 / math.sqrt(8)
    both.reset_lora_parameters()
    assert not both.lora_B.any() and both.lora_A.any()
    scalings = [slk.LoRALinear(24, 20, r=4, use_rslora=on).scaling for on in (False, True)]
    assert scalings == [16 / 4, 16 / 2]


@each_kind
def test_it_shares_a_frozen_layer_and_trains_the_pair_alone(kind):
    torch.manual_seed(0)
    linear = KINDS[kind]().eval()
    layer = slk.LoRALinear.from_linear(linear, r=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B"]
    dtypes = {layer.lora_A.dtype, layer.lora_B.dtype}
    assert dtypes == {FP64 if kind == "float64" else FP32}
    assert layer.lora_A.shape == (3, K) and layer.lora_B.shape == (N, 3)
    x = input_of(kind)
    if kind != "fp8":
        # With B = 0 it starts as its base. In evaluation bitsandbytes computes in bfloat16 on some CPUs.
        torch.testing.assert_close(layer(x), linear.train()(x))
    assert "r=3" in repr(layer) and "scaling=5.33333" in repr(layer)
    assert kind not in QUANTIZED or type(linear.weight).__name__ in repr(layer)
    state = linear.state_dict().keys() | {"lora_A", "lora_B"}
    if kind.startswith("nf4"):
        # As bitsandbytes' own layer does it; its stand-in does not.
        state |= {"weight.absmax", "weight.quant_map"}
    assert layer.state_dict().keys() == state


def test_dtypes():
    made = slk.LoRALinear(24, 20, bias=False, dtype=BF16)
    assert made.bias is None and made.lora_A.dtype == FP32
    assert made(torch.randn(3, 24, dtype=BF16)).dtype == BF16
    assert slk.LoRALinear(24, 20, dtype=BF16, lora_dtype=BF16).lora_B.dtype == BF16
    assert slk.LoRALinear(24, 20, dtype=FP64).lora_A.dtype == FP64
    layer = layer_of("nf4", lora_dtype=BF16)
    assert layer.lora_A.dtype == BF16 and layer(torch.randn(3, K)).dtype == FP32


def four_bits(compute_dtype: torch.dtype | None = BF16) -> nn.Linear:
    return Linear4bit(nf4_weight(N, K, 64, nested=True), True, compute_dtype)


def fp8(**changes: Any) -> nn.Linear:
    linear = fp8_linear(fp8_weight(20, 64), BF16)
    vars(linear.weight).update(changes)
    return linear


PEFTS = "; use PEFT and accelerate_peft"
# A base, more arguments, and the error.
REFUSED = {
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), {},
        f"is a ParametrizedLinear, which may compute more than a linear layer{PEFTS}",
    ),
    "float8 of one scale": (lambda: fp8(scale=torch.ones(())), {}, "has a weight that the kernels cannot read: "),
    "float8 that quantizes its input": (
        lambda: fp8(act_quant_kwargs="rows"), {}, "has a weight that the kernels cannot read: ",
    ),
    "4 bits of [K, N]": (
        lambda: swapped(four_bits()), {}, r"has a weight that is stored as \[96, 64\], not \[out_features, in",
    ),
    "8 bits": (lambda: bnb_8bit(nn.Linear(K, N)), {}, "is a Linear8bitLt, which may compute more"),
    "torchao int8": (lambda: torchao_int8(nn.Linear(K, N)), {}, f"has a weight that is a .*{PEFTS}"),
    "a tensor of its own": (lambda: scaled(nn.Linear(K, N)), {}, f"has a weight that is a \\w+{PEFTS}"),
    "a Conv1D": (conv1d, {}, f"is a Conv1D, not an nn.Linear{PEFTS}"),
    "a convolution": (lambda: nn.Conv1d(1, 1, 1), {}, "is a Conv1d, not an nn.Linear"),
    "no rank": (lambda: nn.Linear(K, N), {"r": 0}, "r must be at least 1, got 0"),
    "all dropped": (
        lambda: nn.Linear(K, N), {"lora_dropout": 1.0}, r"lora_dropout must be a finite number in \[0, 1\), got 1.0",
    ),
    "an endless alpha": (lambda: nn.Linear(K, N), {"lora_alpha": math.inf}, "lora_alpha must be a finite number"),
    "another initialization": (
        lambda: nn.Linear(K, N), {"init_lora_weights": "pissa"}, "must be True, False or 'gaussian', got 'pissa'",
    ),
    "another dtype": (
        lambda: nn.Linear(K, N), {"lora_dtype": FP16}, "must be torch.float32 or the weight's torch.float32, got torch.float16",
    ),
    "one that 4 bits do not compute in": (
        four_bits, {"lora_dtype": FP16}, f"must be torch.float32 or the weight's {BF16}, got torch.float16",
    ),
}  # fmt: skip


def swapped(linear: nn.Linear) -> nn.Linear:
    """As bitsandbytes leaves a weight that was quantized transposed."""
    linear.in_features, linear.out_features = linear.out_features, linear.in_features
    return linear


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_stays_as_it_was(make, options, message):
    linear = make()
    trains = [p.requires_grad for p in linear.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        slk.LoRALinear.from_linear(linear, **options)
    assert [p.requires_grad for p in linear.parameters()] == trains


# What it computes


@pytest.mark.covering(1)
@each_kind
def test_forward_and_gradients_are_the_functions(kind, backend):
    layer = layer_of(kind)
    pair, dtype = (layer.lora_A, layer.lora_B), DTYPES.get(kind, FP32)
    if backend == "triton" and kind == "float64":
        pytest.skip("the kernels compute in float32")
    compute = BF16 if kind in ("nf4", "bitsandbytes 4-bit") else dtype

    def function(x: Tensor) -> Tensor:
        weight = read(layer.weight) if kind in QUANTIZED else layer.weight
        bias = None if layer.bias is None else layer.bias.to(compute)
        return lora_linear(x.to(compute), weight, bias, *pair, layer.scaling).to(dtype)

    x = input_of(kind, 70).requires_grad_()
    grad = torch.randn(70, N, dtype=dtype)
    found, expected = run_layer(layer, x, pair, grad), run_layer(function, x, pair, grad)
    assert all(torch.equal(value, expected[name]) and value.any() for name, value in found.items())
    assert found["Y0"].dtype == dtype and layer(x[:0]).shape == (0, N)
    with torch.autocast("cpu", BF16):
        # autocast leaves float64 as it is.
        assert layer(x).dtype == (dtype if kind == "float64" else BF16)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
def test_forward_and_gradients_are_those_of_plain_pytorch(kind):
    """To float64, no worse than operators."""
    layer, x = layer_of(kind), input_of(kind, 70).requires_grad_()
    pair, dtype = (layer.lora_A, layer.lora_B), DTYPES.get(kind, FP32)
    grad = torch.randn(70, N, dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        base = nn.functional.linear(x, layer.weight, layer.bias)
        a, b = (p.to(dtype) for p in pair)
        return base + layer.scaling * (x @ a.T @ b.T)

    found, baseline = run_layer(layer, x, pair, grad), run_layer(plain, x, pair, grad)
    check_layer(found, baseline, x, layer.weight, layer.bias, pair, grad, layer.scaling, dtype)


@each_kind
def test_dropout_is_in_training_only(kind):
    layer, x = layer_of(kind, lora_dropout=0.3), input_of(kind, 70)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and "lora_dropout=0.3" in repr(layer)


# The stand-in for float8 has no product of its own.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8"])
def test_disabled_it_is_its_base_to_the_bit(kind):
    torch.manual_seed(0)
    linear = KINDS[kind]()
    layer = lora_over(linear, lora_dropout=0.3)
    x = input_of(kind).requires_grad_()
    active = layer.eval()(x)
    for autocasts in (False, kind != "float64"):
        with torch.autocast("cpu", BF16, enabled=autocasts):
            expected = linear(x)
            with slk.disable_lora(layer):
                y = layer(x)
        assert torch.equal(y, expected) and y.dtype == expected.dtype
    with slk.disable_lora(layer):
        layer(x).float().square().sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None
    found, x.grad = x.grad, None
    linear(x).float().square().sum().backward()
    assert torch.equal(found, x.grad)
    assert torch.equal(layer(x), active) and not torch.equal(active, linear(x))


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
# bitsandbytes' own forward finds the state that its pickled 4-bit weight has lost; ours does not.
COPIED = [*((kind, "deepcopy") for kind in KINDS), *((kind, "pickle") for kind in PLAIN)]


@pytest.mark.parametrize(("kind", "way"), COPIED)
def test_copies_stand_alone(kind, way):
    layer, x = layer_of(kind), input_of(kind)
    expected = layer(x)
    twin = WAYS[way](layer)
    assert torch.equal(twin(x), expected) and twin.weight is not layer.weight
    with torch.no_grad():
        twin.lora_B.zero_()
    assert torch.equal(layer(x), expected) and not torch.equal(twin(x), expected)


def test_the_state_of_a_4_bit_layer_is_loaded_as_bitsandbytes_does(backend):
    layer, x = layer_of("bitsandbytes 4-bit"), input_of("bitsandbytes 4-bit")
    twin = lora_over(bnb_4bit(nn.Linear(K, N), BF16))
    assert layer.state_dict().keys() == twin.state_dict().keys()
    twin.load_state_dict(layer.state_dict(), strict=False)
    twin.weight.quant_state = layer.weight.quant_state
    assert torch.equal(twin(x), layer(x))


# Merging


@each_plain
@pytest.mark.parametrize(("k", "n"), [(24, 20), (2100, 2050)])
def test_merged_it_is_the_sum_rounded_once(kind, k, n):
    torch.manual_seed(0)
    dtype = DTYPES.get(kind, FP32)
    layer = lora_over(nn.Linear(k, n, dtype=dtype), r=4)
    frozen = layer.weight
    exact = frozen.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    bits = frozen.detach().clone()
    with torch.autocast("cpu", BF16):
        # Autocast does not round the change.
        layer.merge()
    assert layer.merged and layer.weight.dtype == dtype and not layer.weight.requires_grad
    assert "merged" in repr(layer)
    # Half a unit for the rounding, and what float32 has lost before.
    unit = torch.finfo(dtype).eps * layer.weight.double().abs() + 1e-6 * exact.abs().max()
    if dtype == FP64:
        unit = 1e-14 * exact.abs().max()
    assert ((layer.weight.double() - exact).abs() <= unit / 2 + 1e-15).all()
    x = torch.randn(3, k, dtype=dtype)
    merged = layer.eval()(x)
    layer.unmerge()
    assert layer.weight is frozen and torch.equal(frozen, bits) and not layer.merged
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged, layer(x), rtol=tolerance, atol=tolerance * 10)


def test_merged_twice_unmerged_twice_and_trained_while_merged():
    layer = layer_of("float32")
    with pytest.raises(RuntimeError, match="this LoRALinear is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    x = torch.ones(1, K)
    with pytest.raises(RuntimeError, match=r"merged, so lora_A and lora_B would get no gradient"):
        layer(x)
    with torch.no_grad():
        assert layer(x).isfinite().all()
    assert layer.eval()(x).isfinite().all()
    with slk.disable_lora(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.frozen_weight, layer.bias))


@each_plain
def test_unmerge_is_exact_after_whatever_happened_while_merged(kind):
    layer, dtype = layer_of(kind), DTYPES.get(kind, FP32)
    parameter, frozen = layer.weight, layer.weight.detach().clone()
    layer.merge()
    for keep_vars in (False, True):
        assert torch.equal(layer.state_dict(keep_vars=keep_vars)["weight"], frozen)
    loaded = layer_of(kind)
    loaded.load_state_dict(layer.state_dict())
    moved = copy.deepcopy(layer).to(FP64)
    # float64 holds every value of the others.
    for other in (
        copy.deepcopy(layer),
        through_a_file(layer),
        moved,
        copy.deepcopy(moved).to(dtype),
    ):
        assert other.merged and torch.equal(other.weight, layer.weight.to(other.weight.dtype))
        other.unmerge()
        assert torch.equal(other.weight, frozen.to(other.weight.dtype))
        assert not other.weight.requires_grad
    assert moved.weight.dtype == FP64
    assert not loaded.merged and torch.equal(loaded.weight, frozen)
    loaded.merge()
    with pytest.raises(RuntimeError, match=r"is merged; unmerge\(\) before loading"):
        loaded.load_state_dict(layer.state_dict())
    for _ in range(3):
        layer.unmerge()
        assert layer.weight is parameter and torch.equal(parameter, frozen)
        layer.merge()


def test_a_tied_weight_is_untied_and_tied_again():
    embedding = nn.Embedding(N, K)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = embedding.weight
    layer = lora_over(linear)
    bits = embedding.weight.detach().clone()
    layer.merge()
    assert layer.weight is not embedding.weight and torch.equal(embedding.weight, bits)
    layer.unmerge()
    assert layer.weight is embedding.weight and torch.equal(embedding.weight, bits)


@pytest.mark.parametrize("kind", ["not finite", "too large", *QUANTIZED])
def test_what_cannot_be_merged_stays(kind):
    layer = layer_of(kind) if kind in QUANTIZED else layer_of("float16")
    message = "weight must be a plain one to be merged, got a "
    if kind not in QUANTIZED:
        message = "merging would give a weight that is not finite"
        with torch.no_grad():
            layer.lora_B[0, 0] = math.nan if kind == "not finite" else 1e9
    weight, x = layer.weight, input_of(kind if kind in QUANTIZED else "float16")
    expected = layer(x)
    with pytest.raises(ValueError, match=message):
        layer.merge()
    assert layer.weight is weight and not layer.merged
    assert torch.equal(layer(x).nan_to_num(), expected.nan_to_num())


@each_plain
def test_a_plain_layer_of_it(kind):
    layer, x = layer_of(kind), input_of(kind)
    layer.eval().merge()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and linear.weight is layer.weight and linear.bias is layer.bias
    assert not linear.training and torch.equal(linear(x), layer(x))
    assert linear.state_dict().keys() == KINDS[kind]().state_dict().keys()


def test_a_quantized_layer_has_no_plain_one():
    with pytest.raises(
        ValueError, match=r"weight must be a plain one for an nn.Linear, got a Params4bit"
    ):
        layer_of("nf4").to_linear()
