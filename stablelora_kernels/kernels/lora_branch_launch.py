"""From a call of ``lora_branch`` to its launches: ``lora_linear``'s kernels without the wide product."""

from __future__ import annotations

from torch import Tensor

from stablelora_kernels import dispatch
from stablelora_kernels.dispatch import Device
from stablelora_kernels.kernels._common import Launch
from stablelora_kernels.kernels.lora_linear_launch import Gradients, Product, branch, gradient_launches, shrink


def branch_launches(device: Device, p: Product, base: Tensor) -> list[Launch]:
    """``p.y`` = ``base`` + branch; of ``p`` w and bias are not read, nor anything where there are no rows."""
    return branch(device, p, base) if p.call.m and p.call.n else []


def branch_backward_launches(device: Device, p: Product, g: Gradients, need_dx: bool) -> list[Launch]:
    """The branch's dX, ``p.y``, which is not read unless ``need_dx``, and what ``g`` wants; ``p.s`` is dS's memory."""
    need_dx = need_dx and p.call.m > 0
    if need_dx and dispatch.branch_fuses(p.call):
        return [*branch(device, p, None), *gradient_launches(device, g)]
    if p.call.m == 0 or (g.da is None and not need_dx):
        return gradient_launches(device, g)
    # dB goes with dS, both from dY.
    dx = branch(device, p, None, s_is_there=True) if need_dx else []
    return [shrink(device, p, g), *dx, *gradient_launches(device, g._replace(db=None))]
