"""``lora_branch`` with its gradients: ``lora_linear`` on a base product that another layer has computed.

    forward   Y = BASE + S B^T          S = s' (X ∘ keep) A^T
    backward  dBASE = dY                dX = (dS A) ∘ keep, dA and dB as in ``lora_linear``

The op does not write to BASE: another backward may need it, and the traffic is the same out of place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import problem
from stablelora_kernels.ops.library import apply, empty_gradients, first_derivative
from stablelora_kernels.ops.lora_linear import draw_seed
from stablelora_kernels.ops.matmul import row_count
from stablelora_kernels.ops.plans import Entry, define_launches
from stablelora_kernels.ops.torch_path import (
    as_matrix,
    draw_dropout,
    expanded,
    few_rows,
    is_few,
    like_rows_of,
    plain_branch,
    torch_bwd,
    torch_s,
    with_branch,
)


def _fwd_fake(base, x, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    return base.new_empty(base.shape), x.new_empty(row_count(x) if save_s else 0, lora_A.shape[0])


@define_launches(
    "lora_branch_fwd",
    "(Tensor base, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p, bool save_s) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
def lora_branch_fwd(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float,
    save_s: bool,
) -> tuple[tuple[Tensor, Tensor], list[Any]]:  # fmt: skip
    """Y [..., N] and S [M, r] for base [..., N] and x [..., K]; ``scaling`` is s' = scaling / (1 - p)."""
    from stablelora_kernels.launch.lora_branch import forward_launches

    results = y, s = _fwd_fake(base, x, lora_A, lora_B, seed, scaling, dropout_p, save_s)
    kept = s if save_s else None
    given = (as_matrix(base), as_matrix(x), lora_A, lora_B, kept, as_matrix(y), seed, scaling, dropout_p)
    return results, forward_launches(problem.device_of(x.device), *given)


def _bwd_fake(x, grad, lora_A, lora_B, s, seed, scaling, dropout_p, need_x, need_a, need_b):  # type: ignore[no-untyped-def]
    return empty_gradients(grad, lora_A, lora_B, need_x, need_a, need_b)


@define_launches(
    "lora_branch_bwd",
    "(Tensor? x, Tensor grad, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? seed, float scaling, float dropout_p, "
    "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def lora_branch_bwd(
    x: Tensor | None, grad: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, seed: Tensor | None,
    scaling: float, dropout_p: float, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Any]]:  # fmt: skip
    """dX [..., K], dA and dB for x [..., K] and dY [..., N]; those that are not needed are empty."""
    from stablelora_kernels.launch.lora_branch import backward_launches

    results = dx, da, db = empty_gradients(grad, lora_A, lora_B, need_x, need_a, need_b)
    wanted = (as_matrix(dx) if need_x else None, da if need_a else None, db if need_b else None)
    rows = None if x is None else as_matrix(x)
    given = (rows, as_matrix(grad), lora_A, lora_B, s, seed, *wanted, scaling, dropout_p)
    return results, backward_launches(problem.device_of(grad.device), *given)


def _forward(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str, save_s: bool,
    entry: Entry | None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:  # fmt: skip
    """Y [..., N], S [M, r], dropout's seed or mask, and s' for base [..., N] and x [..., K]."""
    if backend == "triton":
        seed = draw_seed(x, dropout_p)
        scaling /= 1 - dropout_p
        y, s = lora_branch_fwd((base, x, lora_A, lora_B, seed, scaling, dropout_p, save_s), entry)
        return y, s, seed, scaling
    whole, base, x = base, as_matrix(base), as_matrix(x)
    keep, scaling = draw_dropout(x, dropout_p, scaling)
    s = torch_s(x, lora_A, keep)
    if base.dtype == s.dtype:
        y = with_branch(base, s, lora_B, scaling)
    else:
        y = base.add(torch.mm(s, lora_B.t()), alpha=scaling).to(base.dtype)
    return like_rows_of(y, whole), s, keep, scaling


class _LoRABranch(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str,
        entry: Entry | None,
    ) -> Tensor:  # fmt: skip
        _, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        lora_dtype = lora_A.dtype
        if backend == "torch":
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y, s, random, scaling = _forward(base, x, lora_A, lora_B, scaling, dropout_p, backend, need_b, entry)
        # Save only what the required gradients read. None reads base.
        ctx.save_for_backward(
            x if need_a else None,
            lora_A,
            lora_B,
            s if need_b else None,
            random if need_x or need_a else None,
        )
        ctx.call = (scaling, dropout_p, backend, x.dtype, lora_dtype)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lora_A, lora_B, s, random = ctx.saved_tensors
        scaling, dropout_p, backend, x_dtype, lora_dtype = ctx.call
        need_base, *need = ctx.needs_input_grad[:4]
        need_x, need_a, need_b = need
        dx = da = db = None
        if any(need):
            dy = grad.to(x_dtype)
            if backend == "triton":
                dx, da, db = lora_branch_bwd((x, dy, lora_A, lora_B, s, random, scaling, dropout_p, *need))
            else:
                rows = None if x is None else as_matrix(x)
                dx, da, db = torch_bwd(
                    expanded(as_matrix(dy)), rows, None, lora_A, lora_B, s, random, scaling, lora_dtype, *need
                )
                dx = None if dx is None else dx.view(*grad.shape[:-1], dx.shape[1])
        return (
            grad if need_base else None,
            dx if need_x else None,
            da if need_a else None,
            db if need_b else None,
            None,
            None,
            None,
            None,
        )


def lora_branch_op(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, backend: str,
    entry: Entry | None = None,
) -> Tensor:  # fmt: skip
    """``functional.lora_branch`` with checked arguments and a chosen backend. ``entry``: as in ``lora_linear_op``."""
    if backend == "torch" and base.dtype == x.dtype and is_few(x, limit=few_rows(x, dropout_p)):
        y = plain_branch(as_matrix(base), as_matrix(x), lora_A, lora_B, scaling, dropout_p)
        return y if base.dim() == 2 else y.view(base.shape)
    if torch.is_grad_enabled() and (
        lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or base.requires_grad
    ):
        return apply(_LoRABranch, base, x, lora_A, lora_B, scaling, dropout_p, backend, entry)
    if backend == "torch":
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return _forward(base, x, lora_A, lora_B, scaling, dropout_p, backend, False, entry)[0]
