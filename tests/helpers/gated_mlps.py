"""Gated MLPs by hand, with LoRA of ours or PEFT's, fused and not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers

WIDTH, INNER = 16, 24
TARGETS = r"(.*\.)?(gate_proj|up_proj|down_proj|gate_up_proj|q_proj|qkv_proj)"
LIBRARIES = ("ours", "PEFT")


class MLP(nn.Module):
    """As in Llama."""

    def __init__(self, act=None, bias=False, width=WIDTH, inner=INNER) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stacked(nn.Module):
    """As in Phi-3; ``up_first`` as in no model that we know."""

    def __init__(self, up_first=False, bias=True) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * INNER, bias)
        self.down_proj = nn.Linear(INNER, WIDTH, bias)
        self.activation_fn, self.up_first = nn.GELU("tanh"), up_first

    def forward(self, hidden_states):
        parts = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        gate, up = reversed(parts) if self.up_first else parts
        return self.down_proj(up * self.activation_fn(gate))


class Wrapper(nn.ModuleDict):
    """The smallest model with a module: PEFT wraps what has a forward."""

    def forward(self, *args):
        return next(iter(self.values()))(*args)


def adapted(
    module,
    library="ours",
    fuse=True,
    dropout=0.0,
    targets=TARGETS,
    fuse_projections=False,
    tile=False,
    **config,
):
    """A model, or a module as model["mlp"], with adapters that are not zero; and the report."""
    model = (
        module
        if hasattr(module, "generate") or isinstance(module, Wrapper)
        else Wrapper({"mlp": module})
    )
    torch.manual_seed(1)
    config = {
        "r": 3,
        "target_modules": targets,
        "lora_dropout": dropout,
        "init_lora_weights": False,
    } | config
    asked = {"fuse_mlp": fuse, "tile_mlp": tile, "fuse_projections": fuse_projections}
    fusions = {name: value for name, value in asked.items() if value}
    if library == "ours":
        is_zero = config.pop("init_lora_weights")
        report = slk.apply_lora(model, **config, **fusions)
        for layer in lora_layers(model).values():
            layer.reset_lora_parameters(is_zero)
        return model.train(), report
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).train()
    match_dtype(model)
    return model, slk.accelerate_peft(model, **fusions)


def match_dtype(model):
    """PEFT leaves the adapters of float64 models in float32."""
    if next(model.parameters()).dtype == torch.float64:
        model.double()


def reported_pair(make, library="ours", **options):
    """The same model fused and not, each with its report."""
    made = []
    for fuse in (True, False):
        torch.manual_seed(0)
        made.append(adapted(make(), library, fuse, **options))
    return made


def pair(make, library="ours", **options):
    """The same model fused and not, in float64."""
    return [model for model, _ in reported_pair(lambda: make().double(), library, **options)]


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def mlp_of(model):
    return base_of(model)["mlp"]


def rows(dtype=torch.float64):
    """70: with fewer than 64, lora_mlp on PyTorch's operators computes projections one by one."""
    return (
        torch.randn(2, 35, WIDTH, generator=torch.Generator().manual_seed(3))
        .to(dtype)
        .requires_grad_()
    )


def step(model, x=None, call=None):
    """The output and all gradients of ``model``, or of ``call``, for ``x``."""
    model.zero_grad()
    torch.manual_seed(5)
    x = rows() if x is None else x
    y = (model if call is None else call)(x)
    y = getattr(y, "logits", y)
    (
        y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    ).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | found | ({} if x.grad is None else {"x": x.grad})


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        error, largest = (value - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= tolerance * largest, f"{name}: {error} of {largest}"
