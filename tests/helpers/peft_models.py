"""Small PEFT models, and accelerate_peft's layers against PEFT's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS
from tests.helpers.small_models import IDS, Model

peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
QV = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def config(**kwargs):
    return peft.LoraConfig(**QV | kwargs)


def make(*adapters, model=None, **kwargs):
    """The small model with one adapter of ``kwargs``, and more by name; no branch is zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model or Model(), config(**kwargs))
    for name, more in adapters:
        model.add_adapter(name, config(**more))
    return model.eval()


def results(model, out=None):
    """The output, and the gradient of all that trains of a loss that weighs every output
    differently.
    """
    model.zero_grad()
    out = model(IDS) if out is None else out
    (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    return {"Y": out.detach()} | grads


def assert_equal_to_pefts(model):
    """The accelerated model's output and gradients against PEFT's own, of the same model.

    From PEFT's in float64 they may be as far as PEFT's own are in the model's dtype, which differs
    from CPU to CPU, and 16 units in the last place of the largest element more.
    """
    slk.restore_peft(model)
    expected, exact = results(model), results(copy.deepcopy(model).double())
    slk.accelerate_peft(model)
    found = results(model)
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.any(), name
        own = (expected[name].double() - exact[name]).abs().max().item()
        error = (value.double() - exact[name]).abs().max().item()
        allowed = own + 16 * EPS[value.dtype] * exact[name].abs().max().item()
        assert error <= allowed, f"{name} is off by {error:.3e}, allowed {allowed:.3e}"


def one_layer(dtype, lora_dtype=torch.float32):
    """A layer, with adapters as PEFT leaves them beside a base in another dtype, and its input."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(80, 80)), config(target_modules=["0"], r=8)
    ).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(lora_dtype)
    return model, torch.randn(96, 80).to(dtype).requires_grad_()


@contextmanager
def own_forwards() -> Iterator[list[Any]]:
    """The layers whose own forward of PEFT runs in the block."""
    layers: list[Any] = []

    def recording(forward):
        def recorded(self, *args, **kwargs):
            layers.append(self)
            return forward(self, *args, **kwargs)

        return recorded

    kinds = [
        getattr(peft.tuners.lora, name, None)
        for name in ("Linear", "Linear4bit", "Linear8bitLt", "ParamWrapper")
    ]
    with ExitStack() as stack:
        for kind in kinds:
            if kind is not None:
                stack.enter_context(mock.patch.object(kind, "forward", recording(kind.forward)))
        yield layers
