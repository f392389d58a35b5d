"""From a call of ``lora_branch`` to its launches: ``lora_linear``'s kernels without the wide product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Device
from stablelora_kernels.launch.lora_common import backward_product, expand, forward_product
from stablelora_kernels.launch.lora_linear import product_backward_launches
from stablelora_kernels.launch.workspace import scratch


def forward_launches(
    device: Device, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, y: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> list[Any]:  # fmt: skip
    """The launches of a forward on ``device``: ``y`` = ``base`` + branch."""
    product = forward_product(x, None, None, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    # The kernel reads base with y's strides.
    return expand(device, product, base.contiguous()) if product.call.m and product.call.n else []


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
) -> list[Any]:  # fmt: skip
    """The launches of a backward on ``device``, for those of dX, dA and dB that are not None."""
    ds = scratch(grad, grad.shape[0], lora_A.shape[0]) if da is not None else None
    p, g = backward_product(x, grad, None, lora_A, lora_B, s, ds, seed, dx, da, db, scaling, dropout_p)
    return product_backward_launches(device, p, g, rules.choose_branch_backward(p.call))
