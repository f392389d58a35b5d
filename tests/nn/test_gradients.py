"""Layers that give their input no gradient: a call is tried for each kind of layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stablelora_kernels.nn import gradients


class Quantized(nn.Parameter):
    """A library's weight, as far as its kind shows."""


def layer(
    rows: int = 4, kind: type = nn.Parameter, scheme: Any = None, **settings: Any
) -> nn.Linear:
    linear = nn.Linear(4, rows)
    linear.weight = kind(linear.weight.data, requires_grad=False)
    linear.weight.__dict__.update(settings)
    if scheme is not None:
        linear.quantization_scheme = SimpleNamespace(input_activations=scheme)
    return linear


KINDS = {
    "plain": layer(),
    "a type": layer(kind=Quantized),
    "a setting": layer(kind=Quantized, bits=4),
    "another setting": layer(kind=Quantized, bits=8),
    "a scheme": layer(scheme="int8"),
    "another scheme": layer(scheme="int4"),
    "a shape": layer(rows=3),
    "a dtype": layer().double(),
    "a device": layer().to("meta"),
}


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(gradients, "_tried", {})


def test_each_kind_of_layer_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(
        gradients, "_call_gives_gradient", lambda linear: tried.append(linear) or True
    )
    for _ in range(2):
        for linear in KINDS.values():
            assert gradients._gives_gradient(linear)
    assert tried == [*KINDS.values()]


def test_where_no_call_is_possible_what_the_library_has_stored_decides(monkeypatch):
    def fails(linear):
        raise NotImplementedError

    monkeypatch.setattr(gradients, "_call_gives_gradient", fails)
    assert "compressed-tensors" in gradients.reason_input_gets_no_gradient(KINDS["a scheme"])
    for kind, known in (("a type", True), ("a scheme", False)):
        assert gradients._gives_gradient(KINDS[kind]) == known
    assert not gradients._gives_gradient(layer(kind=Quantized, act_quant_kwargs={}))
    assert not gradients._tried


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trial_takes_none_of_the_users_modes(mode):
    with mode():
        assert gradients._gives_gradient(KINDS["plain"])
