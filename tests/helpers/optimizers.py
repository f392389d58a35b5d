"""Small pairs with gradients, and everything that a step may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 24, 40), (1, 7, 13), (3, 31, 5), (20, 16, 16)]
# Writes to a B by someone else, large enough for its pair to latch. They run under no_grad.
WRITES: dict[str, Callable[[StableLoRAAdamW, torch.Tensor], Any]] = {
    "in place": lambda optimizer, p: p.fill_(100),
    "by copy_": lambda optimizer, p: p.copy_(torch.full_like(p, 100)),
    "through detach": lambda optimizer, p: p.detach().fill_(100),
    "value in other memory": lambda optimizer, p: setattr(p, "data", torch.full_like(p, 100)),
    "through data, and refresh()": lambda optimizer, p: (p.data.fill_(100), optimizer.refresh()),
}


def make_pairs(
    shapes: list[tuple[int, int, int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[LoRAPair]:
    """Pairs of (r, m, n), A of variance 1/n and B zero, as LoRA starts."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.to(DEVICE, dtype).requires_grad_()

    return [
        LoRAPair(
            f"layer{i}",
            leaf(torch.randn(r, n, generator=generator) / n**0.5),
            leaf(torch.zeros(m, r)),
        )
        for i, (r, m, n) in enumerate(shapes)
    ]


def halves(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [p for pair in pairs for p in (pair.A, pair.B)]


def in_float64(pairs: list[LoRAPair]) -> list[LoRAPair]:
    """Copies, of float64 pairs too."""
    return [
        LoRAPair(pair.name, *(p.detach().to(torch.float64, copy=True) for p in (pair.A, pair.B)))
        for pair in pairs
    ]


def set_grads(params: list[torch.Tensor], seed: int, scale: float = 1e-2) -> None:
    """Gradients with a drift, so that B grows, of every element its own size."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * (torch.randn(p.shape, generator=generator) + 0.5)).to(p.device, p.dtype)


def params_of(optimizer: StableLoRAAdamW) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: StableLoRAAdamW) -> list[torch.Tensor]:
    """Copies of everything that a step may change."""
    params = params_of(optimizer)
    state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*params, *state]]


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
