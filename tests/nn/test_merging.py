"""Merging states its error, unties what was tied, and is undone bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.quantized_weights import conv1d
from tests.helpers.small_models import Model, fill_b, lora_config, through_a_file

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(
    dtype: torch.dtype, std: float = 0.1, transposed: bool = False, k: int = 24, n: int = 20
) -> slk.LoRALinear:
    torch.manual_seed(0)
    base = conv1d(n, k, dtype) if transposed else nn.Linear(k, n, dtype=dtype)
    made = slk.LoRALinear.from_linear(base, r=4)
    nn.init.normal_(made.lora_B, std=std)
    return made


def lora_model(tied: bool = False, **kwargs) -> Model:
    torch.manual_seed(0)
    model = Model(tied=tied)
    slk.apply_lora(model, lora_config(**kwargs))
    fill_b(model)
    return model


@pytest.mark.covering(1)
# The larger one is merged in several parts.
@pytest.mark.parametrize(
    ("dtype", "k", "n"), [*((dtype, 24, 20) for dtype in DTYPES), (torch.bfloat16, 2100, 2050)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_error_is_the_distance_to_the_exact_sum(transposed, dtype, k, n):
    made = layer(dtype, transposed=transposed, k=k, n=n)
    frozen, delta = made.weight.detach().double(), made.delta_weight().double()
    torch.testing.assert_close(
        delta, made.scaling * (made.lora_B.double() @ made.lora_A.double()), rtol=1e-6, atol=1e-7
    )
    error = made.merge()
    assert made.merged and made.weight.dtype == dtype and not made.weight.requires_grad
    exact = (
        (made.weight.double() - (frozen + (delta.t() if transposed else delta))).abs().max().item()
    )
    # In float32 and bfloat16 the difference itself is exact or off by a float32 rounding of so
    # small a number.
    assert error.largest_error == pytest.approx(exact, rel=1e-6) and exact > 0
    assert error.largest_delta == delta.abs().max().item()
    assert error.relative == error.largest_error / error.largest_delta
    assert made.merge_error() == error
    # Rounded to nearest, so by at most half a unit of the largest weight.
    assert error.largest_error <= torch.finfo(dtype).eps / 2 * made.weight.abs().max().item() * 1.01
    made.unmerge()
    assert torch.equal(made.weight.double(), frozen)


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_does_not_round_the_change(transposed):
    made = layer(torch.float32, transposed=transposed)
    twin = copy.deepcopy(made)
    error = twin.merge()
    with torch.autocast("cpu", torch.bfloat16):
        assert made.merge() == error
    assert torch.equal(made.weight, twin.weight)


VANISHING = [
    (torch.bfloat16, 1e-6),
    (torch.float16, 1e-7),
    (torch.float32, 1e-11),
    (torch.bfloat16, 0.0),
]


@pytest.mark.parametrize(("dtype", "std"), VANISHING)
def test_a_change_that_vanishes_is_an_error_of_all_of_it(dtype, std):
    """And no change is none."""
    made = layer(dtype, std)
    # Weights near one, so that no change of this size moves any of them.
    made.weight.data = 1 + made.weight.data.abs()
    frozen = made.weight.detach().clone()
    error = made.merge()
    assert torch.equal(made.weight, frozen)
    assert error.largest_error == error.largest_delta and (error.largest_delta > 0) == (std > 0)
    assert error.relative == (1.0 if std else 0.0)


def test_merged_twice_unmerged_twice_and_trained_while_merged():
    made = layer(torch.float32)
    for call in (made.unmerge, made.merge_error):
        with pytest.raises(RuntimeError, match="this LoRALinear is not merged"):
            call()
    before = made.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        made.merge()
    with pytest.raises(RuntimeError, match=r"merged, so lora_A and lora_B would get no gradient"):
        made(torch.ones(1, 24))
    with torch.no_grad():
        assert made(torch.ones(1, 24)).isfinite().all()
    assert made.eval()(torch.ones(1, 24)).isfinite().all()
    # After .to(), and after A or B changed beneath a merged weight, the error is another one.
    made.to(torch.bfloat16)
    assert made.merge_error().largest_error > 1000 * before.largest_error
    made.lora_B.data.zero_()
    assert made.merge_error().relative == math.inf


def test_merge_lora_returns_every_layers_error():
    model = lora_model().to(torch.bfloat16)
    alone = copy.deepcopy(model)
    expected = {name: made.merge() for name, made in lora_layers(alone).items()}
    model.layers[0].q_proj.merge()
    report = slk.merge_lora(model)
    assert report.errors == expected and list(report.errors) == list(lora_layers(model))
    assert report.untied == {}
    assert (
        report.errors[report.worst].relative
        == max(error.relative for error in expected.values())
        > 0
    )
    assert str(report).splitlines() == [
        "4 modules merged",
        f"  worst {report.worst}: {expected[report.worst]}",
    ]
    assert slk.remove_lora(copy.deepcopy(model)).errors == expected
    removed = slk.remove_lora(model, merge=False)
    assert removed.worst is None and str(removed) == "0 modules merged"


def test_a_tied_weight_is_untied_reported_and_tied_again():
    model = lora_model(tied=True, target_modules=["lm_head"])
    # The embedding is the head's frozen weight, and neither trains.
    assert model.lm_head.weight is model.embed.weight and not model.embed.weight.requires_grad
    embedding = model.embed.weight.detach().clone()
    report = slk.merge_lora(model)
    assert report.untied == {"lm_head": ("embed.weight",)}
    assert "lm_head.weight is no longer tied to embed.weight" in str(report)
    assert model.lm_head.weight is not model.embed.weight and torch.equal(
        model.embed.weight, embedding
    )
    # Merged before counts as well, and the frozen weight moves with the model once.
    model.to(torch.float64)
    assert slk.merge_lora(model).untied == {"lm_head": ("embed.weight",)}
    slk.unmerge_lora(model)
    assert model.lm_head.weight is model.embed.weight and torch.equal(
        model.embed.weight, embedding.double()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_is_exact_after_whatever_happened_while_merged(dtype):
    made = layer(dtype)
    parameter, frozen = made.weight, made.weight.detach().clone()
    made.merge()
    for keep_vars in (False, True):
        assert torch.equal(made.state_dict(keep_vars=keep_vars)["weight"], frozen)
    saved = through_a_file(made)
    loaded = layer(dtype)
    loaded.load_state_dict(made.state_dict())
    moved = copy.deepcopy(made).to(torch.float64)
    # float32 and float64 hold every value of the others.
    for other in (copy.deepcopy(made), saved, moved, copy.deepcopy(moved).to(dtype)):
        assert other.merged and torch.equal(other.weight, made.weight.to(other.weight.dtype))
        other.unmerge()
        assert (
            torch.equal(other.weight, frozen.to(other.weight.dtype))
            and not other.weight.requires_grad
        )
    assert moved.weight.dtype == torch.float64
    assert not loaded.merged and torch.equal(loaded.weight, frozen)
    loaded.merge()
    with pytest.raises(RuntimeError, match=r"is merged; unmerge\(\) before loading"):
        loaded.load_state_dict(made.state_dict())
    assert not torch.equal(made.weight, frozen) and torch.equal(parameter, frozen)
    made.unmerge()
    assert made.weight is parameter and torch.equal(made.weight, frozen) and not made.merged
