"""The Triton kernels of ``lora_linear`` for a quantised weight, as torch.library ops; ``ops.lora_linear`` calls them.

Their scaling is s' = scaling / (1 - p). ``layout`` is a ``quantised.Layout``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels import dispatch
from stablelora_kernels.dispatch import Call, Choice, Device
from stablelora_kernels.quantised import Layout, Stored

NAMESPACE = "stablelora_kernels"

torch.library.define(
    f"{NAMESPACE}::lora_linear_quantised_fwd",
    "(Tensor x, Tensor data, Tensor[] scales, int[] layout, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "float scaling, float dropout_p, bool save_s) -> (Tensor, Tensor)",
)
torch.library.define(
    f"{NAMESPACE}::lora_linear_quantised_bwd",
    "(Tensor? x, Tensor grad, Tensor data, Tensor[] scales, int[] layout, Tensor lora_A, Tensor lora_B, Tensor? s, "
    "Tensor? seed, float scaling, float dropout_p, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_quantised_fwd")
def _fwd_fake(x, data, scales, layout, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], Layout(*layout).n), x.new_empty(x.shape[0] if save_s else 0, lora_A.shape[0])


@torch.library.impl(f"{NAMESPACE}::lora_linear_quantised_fwd", ("cpu", "cuda"))
def _fwd(
    x: Tensor, data: Tensor, scales: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None, lora_A: Tensor,
    lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, save_s: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, s = _fwd_fake(x, data, scales, layout, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
    weight = Stored(data, tuple(scales), Layout(*layout))
    kept = s if save_s else None
    device = dispatch.device_of(x.device)
    for launch in forward_launches(device, x, weight, bias, lora_A, lora_B, kept, y, seed, scaling, dropout_p):
        launch.run(x.device)
    return y, s


def forward_launches(
    device: Device, x: Tensor, weight: Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    y: Tensor, seed: Tensor | None, scaling: float, dropout_p: float, choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a forward launches on ``device``: by ``choice``, or by dispatch's."""
    from stablelora_kernels.kernels import lora_linear_quantised_launch as launch

    m, (n, k), r = x.shape[0], weight.layout[1:3], lora_A.shape[0]
    call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
    product = launch.Product(call, x, x, bias, lora_A, lora_B, s, y, seed, scaling, dropout_p)
    choice = choice or dispatch.choose_quantised(device, call, weight.layout.bits, weight.layout.aligned)
    return launch.product_launches(device, product, weight, choice)


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_quantised_bwd")
def _bwd_fake(x, grad, data, scales, layout, lora_A, lora_B, s, seed, scaling, dropout_p, need_a, need_b):  # type: ignore[no-untyped-def]
    return (
        grad.new_empty(grad.shape[0], lora_A.shape[1]),
        lora_A.new_empty(lora_A.shape[0] if need_a else 0, lora_A.shape[1]),
        lora_B.new_empty(lora_B.shape[0] if need_b else 0, lora_B.shape[1]),
    )


@torch.library.impl(f"{NAMESPACE}::lora_linear_quantised_bwd", ("cpu", "cuda"))
def _bwd(
    x: Tensor | None, grad: Tensor, data: Tensor, scales: Sequence[Tensor], layout: Sequence[int], lora_A: Tensor,
    lora_B: Tensor, s: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, da, db = _bwd_fake(x, grad, data, scales, layout, lora_A, lora_B, s, seed, scaling, dropout_p, need_a, need_b)
    weight = Stored(data, tuple(scales), Layout(*layout))
    wanted = (dx, da if need_a else None, db if need_b else None)
    device = dispatch.device_of(grad.device)
    for launch in backward_launches(device, x, grad, weight, lora_A, lora_B, s, seed, *wanted, scaling, dropout_p):
        launch.run(grad.device)
    return dx, da, db


def backward_launches(
    device: Device, x: Tensor | None, grad: Tensor, weight: Stored, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, dx: Tensor, da: Tensor | None, db: Tensor | None, scaling: float, dropout_p: float,
    choice: Choice | None = None,
) -> list[Any]:  # fmt: skip
    """What a backward launches on ``device`` for dX, and for those of dA and dB that are not None."""
    from stablelora_kernels.kernels import lora_linear_quantised_launch as launch

    (m, n), (r, k) = grad.shape, lora_A.shape
    # The forward's formula with every matrix transposed gives dX, and dS on the way.
    call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
    ds = grad.new_empty(m, r) if da is not None else None
    gradients = launch.Gradients(call, x, s, ds, grad, da, db, seed, dropout_p)
    product = launch.Product(call, grad, grad, None, lora_B.t(), lora_A.t(), ds, dx, seed, scaling, dropout_p)
    choice = choice or dispatch.choose_quantised(device, call, weight.layout.bits, weight.layout.aligned)
    return launch.backward_launches(device, product, gradients, weight, choice)
