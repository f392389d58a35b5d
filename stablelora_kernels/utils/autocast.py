"""What ``torch.autocast`` means for code that autocast does not know: the dtype that it asks for, and a backward outside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the surrounding ``torch.autocast`` for devices of this type, or None without one."""
    # PyTorch raises for the meta device, on which there is no autocast.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run an autograd function's ``backward`` in the dtypes of its forward, even if it is called inside ``torch.autocast``."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        # A compiled backward is traced outside autocast.
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        device_type = next((grad.device.type for grad in grads if grad is not None), "meta")
        if autocast_dtype(device_type) is None:
            return backward(ctx, *grads)
        with torch.autocast(device_type, enabled=False):
            return backward(ctx, *grads)

    return run
