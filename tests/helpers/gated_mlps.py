"""Gated MLPs: by hand and in tiny models, and how often lora_mlp computed one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.nn import fused_mlp
from tests.helpers.architectures import architectures, build
from tests.helpers.small_models import fill_b

WIDTH, INNER = 16, 24
BY_TYPE = dict(architectures())
TARGETS = r"(.*\.)?(gate_proj|up_proj|down_proj|gate_up_proj|q_proj|qkv_proj)"
# A model type of transformers, and the number of its gated MLPs.
FAMILIES = {
    "llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma": 2, "gemma2": 2, "gemma3_text": 2, "phi3": 2, "glm": 2,
    "qwen2_moe": 2, "granite": 2, "olmo": 2, "olmo2": 2, "smollm3": 2, "stablelm": 2,
}  # fmt: skip
# 80 rows: with fewer than 64, lora_mlp on PyTorch's operators computes projections one by one.
IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))


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
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 2 * INNER, bias), nn.Linear(INNER, WIDTH, bias)
        self.activation_fn, self.up_first = nn.GELU("tanh"), up_first

    def forward(self, hidden_states):
        parts = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        gate, up = reversed(parts) if self.up_first else parts
        return self.down_proj(up * self.activation_fn(gate))


def family(model_type, dtype=torch.float64):
    """A tiny model in float64, where rounding hides no mistake."""
    return build(model_type, BY_TYPE[model_type]).to(dtype)


class Wrapper(nn.ModuleDict):
    """The smallest model with an MLP: PEFT wraps a module with a forward."""

    def forward(self, x):
        return self["mlp"](x)


def model_of(module):
    """``module``, or an MLP as model["mlp"]."""
    is_model = hasattr(module, "config") and hasattr(module, "generate")
    return module if is_model or isinstance(module, Wrapper) else Wrapper({"mlp": module})


def with_lora(module, fuse=True, dropout=0.0, seed=1, targets=TARGETS, **more):
    """Our layers in ``module`` itself, and the report. No branch is zero."""
    model = model_of(module)
    torch.manual_seed(seed)
    config = slk.LoRAConfig(r=3, target_modules=targets, lora_dropout=dropout)
    report = slk.apply_lora(model, config, fuse_mlp=fuse, **more)
    fill_b(model)
    return model.train(), report


def with_peft(
    module, fuse=True, dropout=0.0, seed=1, targets=TARGETS, dtype=torch.float64, fuse_projections=False, **config
):
    """As with_lora, PEFT's layers, accelerated. PEFT leaves the adapters of float64 models in float32."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    torch.manual_seed(seed)
    settings = {"r": 3, "target_modules": targets, "lora_dropout": dropout, "init_lora_weights": False}
    model = peft.get_peft_model(model_of(module), peft.LoraConfig(**settings | config))
    into_dtype(model, dtype)
    return model.train(), slk.accelerate_peft(model, fuse_mlp=fuse, fuse_projections=fuse_projections)


def into_dtype(model, dtype):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


LIBRARIES = {"ours": with_lora, "PEFT": with_peft}


def pair(make, library="ours", **kwargs):
    """The same MLP fused and not."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        models.append(LIBRARIES[library](make().double(), fuse, **kwargs)[0])
    return models


def mlp_of(model):
    return base_of(model)["mlp"]


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def step(model, x=None, call=None):
    """The output and all gradients of one step: of a model of tokens, or of ``call``, at first its MLP, for ``x``."""
    model.zero_grad()
    torch.manual_seed(5)
    is_mlp = isinstance(base_of(model), Wrapper)
    x = rows() if x is None else x
    y = (call or model)(x) if is_mlp else model(IDS, labels=IDS).loss
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if is_mlp and x.grad is not None:
        found["x"] = x.grad
    return {"y": y.detach()} | found


def rows(dtype=torch.float64, count=70):
    return torch.randn(2, count // 2, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        error, largest = (value - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= tolerance * largest, f"{name}: {error} of {largest}"


def replica(module):
    """What DataParallel makes on each device: copies of the dicts, with plain tensors for parameters."""
    new = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        new._modules[name] = replica(child)
        setattr(new, name, new._modules[name])
    for name, parameter in module._parameters.items():
        setattr(
            new,
            name,
            None if parameter is None else parameter * 1 if parameter.requires_grad else parameter.detach().clone(),
        )
    return new


def count_calls(monkeypatch):
    """A list that grows with the activation of each call of lora_mlp by a fused MLP."""
    counts: list[str] = []
    original = fused_mlp.lora_mlp

    def counting(x, gate, up, down, activation, *rest):
        counts.append(activation)
        return original(x, gate, up, down, activation, *rest)

    monkeypatch.setattr(fused_mlp, "lora_mlp", counting)
    return counts
