"""Defines the torch.library ops of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "stablelora_kernels"


def define_op(
    name: str, schema: str, fake: Callable[..., Any], device_types: Sequence[str] = ("cpu", "cuda")
) -> Callable[[Callable[..., Any]], Any]:
    """Turn the decorated function into the op ``name``. ``fake`` takes its arguments and returns outputs without values."""

    def decorate(function: Callable[..., Any]) -> Any:
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, device_types, function)  # type: ignore[call-overload]
        torch.library.register_fake(qualified, fake)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return decorate


def empty_gradients(
    grad: Tensor, lora_A: Tensor, lora_B: Tensor, need_x: bool, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs for dX, dA and dB. A gradient that is not needed has no rows."""
    return (
        grad.new_empty((grad.shape[0] if need_x else 0, lora_A.shape[1])),
        lora_A.new_empty((lora_A.shape[0] if need_a else 0, lora_A.shape[1])),
        lora_B.new_empty((lora_B.shape[0] if need_b else 0, lora_B.shape[1])),
    )
