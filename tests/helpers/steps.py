"""Optimizers and the float64 reference, stepped side by side and compared."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import params_of, set_grads


def take_step(seed: int, *optimizers: StableLoRAAdamW, scale: float = 1e-2) -> None:
    """A step of each, on the same new gradients."""
    for optimizer in optimizers:
        set_grads(params_of(optimizer), seed, scale)
        optimizer.step()


def take_step_with(
    oracle: StableAdamWRef, optimizer: StableLoRAAdamW, seed: int, scale: float = 1e-2
) -> None:
    """A step of both, on the same new gradients."""
    params = params_of(optimizer)
    set_grads(params, seed, scale)
    oracle.step({q: p.grad.double() for p, q in zip(params, oracle.params, strict=True)})
    optimizer.step()


def assert_close_to(
    oracle: StableAdamWRef, optimizer: StableLoRAAdamW, rtol: float = 2e-5, atol: float = 2e-6
) -> None:
    """The same latches, and parameters that are float32's roundings apart."""
    assert latches(optimizer) == oracle.latched_at
    assert_all_close(
        (p.detach().double() for p in params_of(optimizer)), oracle.params, rtol=rtol, atol=atol
    )


def assert_no_worse_than_adamw(
    optimizer: StableLoRAAdamW, hyper: dict[str, Any], scales: Iterable[float]
) -> None:
    """Steps with gradients of these scales, against AdamW in float64: bounded by AdamW's own error
    in float32.
    """
    params = params_of(optimizer)
    exact, plain = (
        [p.detach().to(d).clone().requires_grad_() for p in params] for d in (torch.float64, None)
    )
    others = [torch.optim.AdamW(each, **hyper) for each in (exact, plain)]
    for step, scale in enumerate(scales):
        set_grads(params, step, scale)
        for p, q, s in zip(params, exact, plain, strict=True):
            q.grad, s.grad = p.grad.double(), p.grad.clone()
        for each in (optimizer, *others):
            each.step()
    for p, q, s in zip(params, exact, plain, strict=True):
        error, theirs = (p - q).abs().max().item(), (s - q).abs().max().item()
        assert error <= 2 * theirs + 2e-7, f"off by {error}, AdamW in float32 by {theirs}"


def latches(optimizer: StableLoRAAdamW) -> dict[str, int | None]:
    return {pair.name: pair.latched_at for pair in optimizer.stability()}


def assert_all_close(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], **tolerance: Any
) -> None:
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def saved_and_loaded(state: Any) -> Any:
    """``state`` after a way through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
