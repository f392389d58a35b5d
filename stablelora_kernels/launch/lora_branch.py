"""From a call of ``lora_branch`` to its launches: ``lora_linear``'s kernels without the wide product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.lora_common import Gradients, Product, branch, gradient_launches, shrink


def forward_launches(
    device: Device, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, y: Tensor,
    seed: Tensor | None, scaling: float, dropout_p: float,
) -> list[Any]:  # fmt: skip
    """What a forward launches on ``device``."""
    (m, k), (n, r) = x.shape, lora_B.shape
    call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
    product = Product(call, x, base, None, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    # The kernel reads base at the places of y.
    return branch_launches(device, product, base.contiguous())


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, dx: Tensor | None, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
) -> list[Any]:  # fmt: skip
    """What a backward launches on ``device`` for those of dX, dA and dB that are not None."""
    (m, n), (r, k) = grad.shape, lora_A.shape
    call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
    ds = grad.new_empty(m, r)
    y = grad if dx is None else dx
    product = Product(call, grad, grad, None, lora_B.t(), lora_A.t(), ds, y, seed, scaling, dropout_p)
    gradients = Gradients(call, x, s, ds, grad, da, db, seed, dropout_p)
    return branch_backward_launches(device, product, gradients, dx is not None)


def branch_launches(device: Device, p: Product, base: Tensor) -> list[Launch]:
    """``p.y`` = ``base`` + branch; of ``p`` w and bias are not read, nor anything where there are no rows."""
    return branch(device, p, base) if p.call.m and p.call.n else []


def branch_backward_launches(device: Device, p: Product, g: Gradients, need_dx: bool) -> list[Launch]:
    """The branch's dX, ``p.y``, which is not read unless ``need_dx``, and what ``g`` wants; ``p.s`` is dS's memory."""
    need_dx = need_dx and p.call.m > 0
    if need_dx and rules.branch_fuses(p.call):
        return [*branch(device, p, None), *gradient_launches(device, g)]
    if p.call.m == 0 or (g.da is None and not need_dx):
        return gradient_launches(device, g)
    # dB goes with dS, both from dY.
    dx = branch(device, p, None, s_is_there=True) if need_dx else []
    return [shrink(device, p, g), *dx, *gradient_launches(device, g._replace(db=None))]
