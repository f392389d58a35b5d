"""Layers and optimizers by settings that can be pickled, digests of all that they compute, and how much a process holds."""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.interpreter import speed_up_interpreter
from tests.helpers.optimizers import DEVICE, make_pairs, params_of, set_grads, snapshot
from tests.helpers.small_models import fill_b


class LayerSetting(NamedTuple):
    backend: str
    dtype: torch.dtype
    r: int
    p: float
    rows: int
    fused: bool = False


class StepSetting(NamedTuple):
    backend: str
    dtype: torch.dtype
    max_grad_norm: float | None
    moments_dtype: torch.dtype
    master_weights: bool = False


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, out in (("q_proj", 24), ("k_proj", 16), ("v_proj", 16)):
            setattr(self, name, nn.Linear(520, out, dtype=dtype, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def make_layers(s: LayerSetting) -> nn.Module:
    torch.manual_seed(0)
    model = Attention(s.dtype)
    config = slk.LoRAConfig(r=s.r, lora_alpha=2 * s.r, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=s.p)
    slk.apply_lora(model, config, fuse_projections=s.fused)
    fill_b(model)
    return model.train()


def make_input(s: LayerSetting, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(s.rows, 520, generator=generator).to(DEVICE, s.dtype).requires_grad_()


def train_layers(s: LayerSetting, model: nn.Module | None = None, seed: int = 1) -> list[Tensor]:
    """Outputs and gradients of one call."""
    model, x = model or make_layers(s), make_input(s, seed)
    torch.manual_seed(seed)
    y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def make_optimizer(s: StepSetting) -> StableLoRAAdamW:
    options = {"max_grad_norm": s.max_grad_norm, "moments_dtype": s.moments_dtype, "master_weights": s.master_weights}
    return StableLoRAAdamW(make_pairs([(4, 24, 40), (1, 7, 13)], s.dtype), lr=1e-2, shrink_ratio=0.1, seed=3, **options)


def take_steps(optimizer: StableLoRAAdamW, first: int, count: int) -> list[Tensor]:
    for step in range(first, first + count):
        set_grads(params_of(optimizer), step)
        optimizer.step()
    return snapshot(optimizer)


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(settings: Iterable[LayerSetting | StepSetting]) -> list[str]:
    """Of all that each setting computes from the start."""
    found = []
    for s in settings:
        with slk.use_backend(s.backend):
            found.append(
                digest(train_layers(s) if isinstance(s, LayerSetting) else take_steps(make_optimizer(s), 0, 4))
            )
    return found


def infer(s: LayerSetting, count: int) -> list[str]:
    """A worker's part of a data loader: outputs without gradients."""
    with slk.use_backend(s.backend), torch.no_grad():
        model = make_layers(s)
        return [digest([model(make_input(s, seed))]) for seed in range(count)]


def go_on(optimizer: StableLoRAAdamW, backend: str) -> str:
    with slk.use_backend(backend):
        return digest(take_steps(optimizer, 4, 4))


def results(calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Of each function with its arguments."""
    speed_up_interpreter()
    return [function(*args) for function, args in calls]


def holdings() -> dict[str, int]:
    """How many tensors live, and the sizes of all containers and caches of the package's modules."""
    gc.collect()
    sizes = {"tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())}
    for name, module in list(sys.modules.items()):
        for attribute, value in vars(module).items() if name.startswith("stablelora_kernels") else ():
            if isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                sizes[f"{name}.{attribute}"] = len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{name}.{attribute}"] = value.cache_info().currsize
    return sizes
