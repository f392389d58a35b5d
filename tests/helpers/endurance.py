"""Layers and optimizers that work on and on, digests of all that they compute, and how much a
process holds.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.interpreter import speed_up_interpreter
from tests.helpers.optimizers import DEVICE, make_pairs, params_of, set_grads, snapshot
from tests.helpers.small_models import fill_b
from tests.optim.options import OPTIONS

#: One step of something; what it computed, by the step's number.
Work = Callable[[int], list[Tensor]]
LAYERS, GROUP = "layers", "group"


class Setting(NamedTuple):
    """What works: layers one by one, a group of them, or an optimizer with a row of
    tests/optim/options.py.
    """

    kind: str
    backend: str
    dtype: torch.dtype = torch.float32
    r: int = 3
    p: float = 0.0


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, out in (("q_proj", 24), ("k_proj", 16), ("v_proj", 16)):
            setattr(self, name, nn.Linear(520, out, dtype=dtype, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def make_layers(s: Setting) -> nn.Module:
    torch.manual_seed(0)
    model = Attention(s.dtype)
    slk.apply_lora(
        model,
        ["q_proj", "k_proj", "v_proj"],
        r=s.r,
        lora_alpha=2 * s.r,
        lora_dropout=s.p,
        fuse_projections=s.kind == GROUP,
    )
    fill_b(model)
    return model.train()


def make_input(s: Setting, seed: int, rows: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 520, generator=generator).to(DEVICE, s.dtype).requires_grad_()


def train(s: Setting, model: nn.Module, step: int) -> list[Tensor]:
    """Outputs and gradients of a call with many rows and, of layers one by one, of one with few;
    now and then inference, too.
    """
    if step % 4 == 3:
        with torch.no_grad():
            model(make_input(s, step))
    model.zero_grad()
    found = []
    for rows in (70, 5) if s.kind == LAYERS else (70,):
        x = make_input(s, step, rows)
        torch.manual_seed(step)
        y = model(x)
        (
            y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        ).sum().backward()
        found += [y.detach(), x.grad]
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def take_step(optimizer: StableLoRAAdamW, step: int) -> list[Tensor]:
    """With another learning rate, and now and then a missing gradient or a look at the state."""
    params = params_of(optimizer)
    set_grads(params, step)
    if step % 5 == 1:
        params[step % len(params)].grad = None
    optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step % 100)
    optimizer.step()
    optimizer.zero_grad()
    if step % 8 == 0:
        optimizer.stability()
        optimizer.state_dict()
    return snapshot(optimizer)


def make(s: Setting) -> Work:
    if s.kind in (LAYERS, GROUP):
        return partial(train, s, make_layers(s))
    row = OPTIONS[s.kind]
    pairs = make_pairs([(4, 24, 40), (1, 7, 13)], row.dtypes[0])
    return partial(take_step, row.optimizer(pairs, shrink_ratio=0.1))


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def go_on(work: Work, backend: str, first: int = 0, count: int = 4) -> str:
    """The digest of some steps."""
    with slk.settings(backend=backend):
        return digest(t for step in range(first, first + count) for t in work(step))


def digests(settings: Iterable[Setting]) -> list[str]:
    """Of the first call of layers, or the first steps of an optimizer."""
    return [go_on(make(s), s.backend, count=4 if s.kind in OPTIONS else 1) for s in settings]


def infer(s: Setting, count: int) -> list[str]:
    """A worker's part of a data loader: outputs without gradients."""
    with slk.settings(backend=s.backend), torch.no_grad():
        model = make_layers(s)
        return [digest([model(make_input(s, seed))]) for seed in range(count)]


def results(calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Of each function with its arguments."""
    speed_up_interpreter()
    return [function(*args) for function, args in calls]


def holdings() -> dict[str, int]:
    """How many tensors live, and the sizes of all containers and caches of the package's modules."""
    gc.collect()
    sizes = {"tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())}
    for name, module in list(sys.modules.items()):
        for attribute, value in (
            vars(module).items() if name.startswith("stablelora_kernels") else ()
        ):
            if isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                sizes[f"{name}.{attribute}"] = len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{name}.{attribute}"] = value.cache_info().currsize
    return sizes
