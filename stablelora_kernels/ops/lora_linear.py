"""``lora_linear`` with its gradients: the Triton kernels as torch.library ops, the PyTorch path, and autograd around both.

The formulas are in ``kernels/lora/linear.py``; ``torch_path.py`` has them on PyTorch's operators. Autograd saves X, which the
surrounding graph usually holds anyway, and S. For dropout it saves a seed on Triton, whose backward draws the mask again, and
the bool mask on the PyTorch path. For a quantized weight it saves the stored form, never the whole W; the PyTorch path
dequantizes it again in backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.dispatch import autotune, problem
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.ops.library import apply, empty_gradients, first_derivative
from stablelora_kernels.ops.lora_linear_quantized import lora_linear_quantized_bwd, lora_linear_quantized_fwd
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
    torch_fwd,
)
from stablelora_kernels.quantized import Layout, Stored, as_plain


def _fwd_fake(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(row_count(x) if save_s else 0, lora_A.shape[0])


@define_launches(
    "lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p, "
    "bool save_s) -> (Tensor, Tensor)",
    _fwd_fake,
)
def lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, save_s: bool,
) -> tuple[tuple[Tensor, Tensor], list[Any]]:  # fmt: skip
    """Y [..., N] and S [M, r] for x [..., K]; ``scaling`` is s' = scaling / (1 - p)."""
    from stablelora_kernels.launch.lora_linear import forward_launches

    results = y, s = _fwd_fake(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
    x, y = as_matrix(x), as_matrix(y)
    device = problem.device_of(x.device)
    kept = s if save_s else None
    build = partial(forward_launches, device, x, weight, bias, lora_A, lora_B, kept, y, seed, scaling, dropout_p)
    choice = None
    if autotune.get_autotune():
        (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
        call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
        choice = autotune.choose(device, call, build, y, x, weight, bias)
    return results, build(choice=choice)


def _bwd_fake(x, grad, weight, lora_A, lora_B, s, seed, scaling, dropout_p, need_x, need_a, need_b):  # type: ignore[no-untyped-def]
    return empty_gradients(grad, lora_A, lora_B, need_x, need_a, need_b)


@define_launches(
    "lora_linear_bwd",
    "(Tensor? x, Tensor grad, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? seed, float scaling, "
    "float dropout_p, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
def lora_linear_bwd(
    x: Tensor | None, grad: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Any]]:  # fmt: skip
    """dX [..., K], dA and dB for x [..., K] and dY [..., N]; those that are not needed are empty."""
    from stablelora_kernels.launch.lora_linear import backward_launches

    results = dx, da, db = empty_gradients(grad, lora_A, lora_B, need_x, need_a, need_b)
    x, grad, dx = None if x is None else as_matrix(x), as_matrix(grad), as_matrix(dx)
    wanted = (dx if need_x else None, da if need_a else None, db if need_b else None)
    device = problem.device_of(grad.device)
    given = (x, grad, weight, lora_A, lora_B, s, seed)
    build = partial(backward_launches, device, *given, *wanted, scaling=scaling, dropout_p=dropout_p)  # type: ignore[arg-type]
    choice = None
    if autotune.get_autotune() and need_x and weight is not None:
        (m, n), (r, k) = grad.shape, lora_A.shape
        call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
        # Time it with dA and dB: some kernels compute them in the same launch as dX.
        choice = autotune.choose(device, call, build, dx, grad, weight, None)
    return results, build(choice=choice)


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """The seed of dropout's mask, None without dropout."""
    # It stays on the device: there is no synchronization, and a CUDA graph draws a new one at each replay.
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None


def _forward(
    x: Tensor, weight: Tensor | Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float, backend: str, save_s: bool, entry: Entry | None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:  # fmt: skip
    """Y [..., N], S [M, r], dropout's seed or mask, and s' for x [..., K]."""
    if backend == "triton":
        seed = draw_seed(x, dropout_p)
        scaling /= 1 - dropout_p
        rest = (bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
        if isinstance(weight, Stored):
            y, s = lora_linear_quantized_fwd((x, *weight, *rest), entry)
        else:
            y, s = lora_linear_fwd((x, weight, *rest), entry)
        return y, s, seed, scaling
    rows = as_matrix(x)
    keep, scaling = draw_dropout(rows, dropout_p, scaling)
    y, s = torch_fwd(rows, as_plain(weight, x.dtype), bias, lora_A, lora_B, scaling, keep)
    return like_rows_of(y, x), s, keep, scaling


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, A and B by the formulas; gradients of weight and bias, if required, by plain products.

    A quantized weight comes as the three parts of :class:`Stored`, with its data as ``weight``. For a plain weight, ``layout``
    is None.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
        dropout_p: float, backend: str, entry: Entry | None, layout: Layout | None = None, *scales: Tensor,
    ) -> Tensor:  # fmt: skip
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        lora_dtype = lora_A.dtype
        if backend == "torch":
            # Cast once for forward and backward. The kernels cast in registers.
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        given = weight if layout is None else Stored(weight, scales, layout)
        y, s, random, scaling = _forward(x, given, bias, lora_A, lora_B, scaling, dropout_p, backend, need_b, entry)
        # Save only what backward reads. Save x itself, not its rows: the surrounding graph already holds it.
        ctx.save_for_backward(
            x if need_w or need_a else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            s if need_b else None,
            random if need_x or need_a else None,
            *(scales if need_x else ()),
        )
        ctx.call = (scaling, dropout_p, backend, lora_dtype, layout)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_A, lora_B, s, random, *scales = ctx.saved_tensors
        scaling, dropout_p, backend, lora_dtype, layout = ctx.call
        need_x, need_w, need_bias, need_a, need_b, *others = ctx.needs_input_grad
        # Only dX reads the weight, so without it the plain op serves a quantized weight too.
        stored = Stored(weight, tuple(scales), layout) if layout is not None and need_x else None
        dx = da = db = None
        if backend == "triton":
            rest = (lora_A, lora_B, s, random, scaling, dropout_p)
            if stored is None:
                dx, da, db = lora_linear_bwd((x, grad, weight, *rest, need_x, need_a, need_b))
            else:
                dx, da, db = lora_linear_quantized_bwd((x, grad, *stored, *rest, need_a, need_b))
        else:
            leading, grad = grad.shape[:-1], expanded(as_matrix(grad))
            rows, weight = None if x is None else as_matrix(x), as_plain(stored or weight, grad.dtype)
            dx, da, db = torch_bwd(
                grad, rows, weight, lora_A, lora_B, s, random, scaling, lora_dtype, need_x, need_a, need_b
            )
            dx = None if dx is None else dx.view(*leading, dx.shape[1])
        dw = as_matrix(grad).t() @ as_matrix(x) if need_w else None
        dbias = as_matrix(grad).sum(0) if need_bias else None
        return (
            dx if need_x else None,
            dw,
            dbias,
            da if need_a else None,
            db if need_b else None,
            *[None] * len(others),
        )


def lora_linear_op(
    x: Tensor, weight: Tensor | Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float, backend: str, entry: Entry | None = None,
) -> Tensor:  # fmt: skip
    """``functional.lora_linear`` with checked arguments and a chosen backend. ``entry``: that of the call's key."""
    plain_weight = None if isinstance(weight, Stored) else weight
    needs_grad = torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or (plain_weight is not None and plain_weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    # Ordinary autograd would save a dequantized weight.
    saves_weight = plain_weight is None and needs_grad
    if backend == "torch" and not saves_weight and is_few(x, plain_weight, limit=few_rows(x, dropout_p)):
        rows = as_matrix(x)
        y = torch.nn.functional.linear(rows, as_plain(weight, x.dtype), bias)
        y = plain_branch(y, rows, lora_A, lora_B, scaling, dropout_p)
        return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
    if needs_grad:
        rest = (bias, lora_A, lora_B, scaling, dropout_p, backend, entry)
        if isinstance(weight, Stored):
            return apply(_LoRALinear, x, weight.data, *rest, weight.layout, *weight.scales)
        return apply(_LoRALinear, x, weight, *rest)
    if backend == "torch":
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return _forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, False, entry)[0]
