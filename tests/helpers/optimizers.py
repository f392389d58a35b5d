"""Small pairs with gradients, optimizers stepped side by side, and everything that a step may change."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.torch_engine import TorchStep
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(8, 24, 40), (1, 7, 13), (3, 31, 5), (20, 16, 16)]


def make_pairs(
    shapes: list[tuple[int, int, int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[LoRAPair]:
    """Pairs of (r, m, n), A of variance 1/n and B zero, as LoRA starts."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.to(DEVICE, dtype).requires_grad_()

    return [
        LoRAPair(f"layer{i}", leaf(torch.randn(r, n, generator=generator) / n**0.5), leaf(torch.zeros(m, r)))
        for i, (r, m, n) in enumerate(shapes)
    ]


def halves(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [p for pair in pairs for p in (pair.A, pair.B)]


def in_float64(pairs: list[LoRAPair]) -> list[LoRAPair]:
    return [LoRAPair(pair.name, pair.A.detach().double(), pair.B.detach().double()) for pair in pairs]


def set_grads(params: list[torch.Tensor], seed: int, scale: float = 1e-2) -> None:
    """Gradients with a drift, so that B grows, of every element its own size."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * (torch.randn(p.shape, generator=generator) + 0.5)).to(p.device, p.dtype)


def params_of(optimizer: StableLoRAAdamW) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_step(seed: int, *optimizers: StableLoRAAdamW, scale: float = 1e-2) -> None:
    """A step of each, on the same new gradients."""
    for optimizer in optimizers:
        set_grads(params_of(optimizer), seed, scale)
        optimizer.step()


def take_step_with(oracle: StableAdamWRef, optimizer: StableLoRAAdamW, seed: int, scale: float = 1e-2) -> None:
    """A step of both, on the same new gradients."""
    params = params_of(optimizer)
    set_grads(params, seed, scale)
    oracle.step({q: p.grad.double() for p, q in zip(params, oracle.params, strict=True)})
    optimizer.step()


def assert_close_to(oracle: StableAdamWRef, optimizer: StableLoRAAdamW, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """The same latches, and parameters that are float32's roundings apart."""
    assert latches(optimizer) == oracle.latched_at
    assert_all_close((p.detach().double() for p in params_of(optimizer)), oracle.params, rtol=rtol, atol=atol)


def latches(optimizer: StableLoRAAdamW) -> dict[str, int | None]:
    return {pair.name: pair.latched_at for pair in optimizer.stability()}


def assert_all_close(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], **tolerance: Any) -> None:
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def saved_and_loaded(state: Any) -> Any:
    """``state`` after a way through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def decide_on_device(patch: pytest.MonkeyPatch | None = None) -> None:
    """Let the PyTorch path make its decisions on the device, as on a GPU; for good in a process that ends with a test."""
    original = TorchStep.__init__

    def never_on_host(self: TorchStep, *args: Any) -> None:
        original(self, *args)
        self.on_host = False

    (patch or pytest.MonkeyPatch()).setattr(TorchStep, "__init__", never_on_host)


def snapshot(optimizer: StableLoRAAdamW) -> list[torch.Tensor]:
    """Copies of everything that a step may change."""
    params = params_of(optimizer)
    state = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*params, *state]]


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
