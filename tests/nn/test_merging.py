"""Merging states its error, unties what was tied, and is undone bit for bit."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.nn import merging
from tests.helpers.small_models import Model, fill_b, lora_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype: torch.dtype, std: float = 0.1) -> slk.LoRALinear:
    torch.manual_seed(0)
    made = slk.LoRALinear(24, 20, r=4, dtype=dtype)
    nn.init.normal_(made.lora_B, std=std)
    return made


def lora_model(tied: bool = False, **kwargs) -> Model:
    torch.manual_seed(0)
    model = Model(tied=tied)
    slk.apply_lora(model, lora_config(**kwargs))
    fill_b(model)
    return model


@pytest.mark.parametrize("elements", [1 << 22, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_the_distance_to_the_exact_sum(dtype, elements, monkeypatch):
    monkeypatch.setattr(merging, "_MERGE_ELEMENTS", elements)
    made = layer(dtype)
    frozen, delta = made.weight.detach().double(), made.delta_weight().double()
    torch.testing.assert_close(
        delta, made.scaling * (made.lora_B.double() @ made.lora_A.double()), rtol=1e-6, atol=1e-7
    )
    error = made.merge()
    assert made.merged and made.weight.dtype == dtype and not made.weight.requires_grad
    exact = (made.weight.double() - (frozen + delta)).abs().max().item()
    # In float32 and bfloat16 the difference itself is exact or off by a float32 rounding of so small a number.
    assert error.largest_error == pytest.approx(exact, rel=1e-6) and exact > 0
    assert error.largest_delta == delta.abs().max().item()
    assert error.relative == error.largest_error / error.largest_delta
    assert made.merge_error() == error
    # Rounded to nearest, so by at most half a unit of the largest weight.
    assert error.largest_error <= torch.finfo(dtype).eps / 2 * made.weight.abs().max().item() * 1.01


@pytest.mark.parametrize(("dtype", "std"), [(torch.bfloat16, 1e-6), (torch.float16, 1e-7), (torch.float32, 1e-11)])
def test_a_change_that_vanishes_is_an_error_of_all_of_it(dtype, std):
    made = layer(dtype, std)
    # Weights near one, so that no change of this size moves any of them.
    made.weight.data = 1 + made.weight.data.abs()
    frozen = made.weight.detach().clone()
    error = made.merge()
    assert torch.equal(made.weight, frozen)
    assert error.largest_error == error.largest_delta > 0
    assert error.relative == 1.0


def test_no_change_is_no_error():
    made = layer(torch.bfloat16, std=0.0)
    error = made.merge()
    assert (error.largest_error, error.largest_delta, error.relative) == (0.0, 0.0, 0.0)


def test_the_error_is_of_the_weights_as_they_are():
    """After .to() and after A or B changed beneath a merged weight it is another one; of nothing merged there is none."""
    made = layer(torch.float32)
    with pytest.raises(RuntimeError, match="this LoRALinear is not merged"):
        made.merge_error()
    before = made.merge()
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
    assert report.errors[report.worst].relative == max(error.relative for error in expected.values()) > 0
    assert str(report).splitlines() == ["4 modules merged", f"  worst {report.worst}: {expected[report.worst]}"]
    removed = slk.remove_lora(model)
    assert removed.errors == expected


def test_remove_without_merge_reports_nothing():
    report = slk.remove_lora(lora_model(), merge=False)
    assert (report.errors, report.untied, report.worst, str(report)) == ({}, {}, None, "0 modules merged")


def test_a_tied_weight_is_untied_reported_and_tied_again():
    model = lora_model(tied=True, target_modules=["lm_head"])
    embedding = model.embed.weight.detach().clone()
    report = slk.merge_lora(model)
    assert report.untied == {"lm_head": ("embed.weight",)}
    assert "lm_head.weight is no longer tied to embed.weight" in str(report)
    assert model.lm_head.weight is not model.embed.weight and torch.equal(model.embed.weight, embedding)
    # Merged before counts as well, and the frozen weight moves with the model once.
    model.to(torch.float64)
    assert slk.merge_lora(model).untied == {"lm_head": ("embed.weight",)}
    slk.unmerge_lora(model)
    assert model.lm_head.weight is model.embed.weight and torch.equal(model.embed.weight, embedding.double())
    slk.remove_lora(model)
    assert torch.equal(model.embed.weight, embedding.double())
    assert not torch.equal(model.lm_head.weight, model.embed.weight)


def test_two_layers_with_one_weight_are_merged_each_with_its_own_branch():
    model = Model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    slk.apply_lora(model, lora_config(target_modules=["q_proj"]))
    fill_b(model)
    frozen = model.layers[0].q_proj.weight
    deltas = [model.layers[i].q_proj.delta_weight() for i in (0, 1)]
    report = slk.merge_lora(model)
    assert report.untied == {
        "layers.0.q_proj": ("layers.1.q_proj.weight",),
        "layers.1.q_proj": ("layers.0.q_proj.weight",),
    }
    for i in (0, 1):
        assert torch.equal(model.layers[i].q_proj.weight, frozen + deltas[i])
    slk.unmerge_lora(model)
    assert all(model.layers[i].q_proj.weight is frozen for i in (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_is_exact_after_whatever_happened_while_merged(dtype):
    made = layer(dtype)
    parameter, frozen = made.weight, made.weight.detach().clone()
    made.merge()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    loaded = layer(dtype)
    loaded.load_state_dict(made.state_dict())
    moved = copy.deepcopy(made).to(torch.float64)
    # float32 and float64 hold every value of the others.
    for other in (copy.deepcopy(made), saved, moved, copy.deepcopy(moved).to(dtype)):
        assert other.merged and torch.equal(other.weight, made.weight.to(other.weight.dtype))
        other.unmerge()
        assert torch.equal(other.weight, frozen.to(other.weight.dtype)) and not other.weight.requires_grad
    assert moved.weight.dtype == torch.float64
    assert not loaded.merged and torch.equal(loaded.weight, frozen)
    loaded.merge()
    with pytest.raises(RuntimeError, match=r"is merged; unmerge\(\) before loading"):
        loaded.load_state_dict(made.state_dict())
    assert not torch.equal(made.weight, frozen) and torch.equal(parameter, frozen)
    made.unmerge()
    assert made.weight is parameter and torch.equal(made.weight, frozen) and not made.merged


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_merged_layers_state_has_the_frozen_weight(keep_vars):
    layer = slk.LoRALinear(8, 6, r=2)
    nn.init.normal_(layer.lora_B)
    frozen = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.state_dict(keep_vars=keep_vars)["weight"], frozen)
