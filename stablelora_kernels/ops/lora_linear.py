"""``lora_linear`` with its gradients: on the Triton kernels, as torch.library ops, or on PyTorch's own operators.

Both paths follow the formulas in ``kernels/lora_linear.py``; PyTorch's operators are in ``lora_linear_torch.py``. Backward needs
X, which the graph around mostly holds anyway, S, and, on the PyTorch path, dropout's mask as bool; the kernels draw theirs again
from a seed. Of a quantized weight it holds what is stored, never W in full, which the PyTorch path dequantizes once more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelora_kernels.dispatch import autotune, problem
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.ops import lora_linear_quantized  # noqa: F401 - registers the ops that are called below
from stablelora_kernels.ops.library import NAMESPACE
from stablelora_kernels.ops.torch_path import (
    as_float,
    as_matrix,
    draw_keep,
    expanded,
    few_rows,
    is_few,
    torch_bwd,
    torch_fwd,
)
from stablelora_kernels.quantized import Layout, Stored

# The Triton kernels as ops. Their scaling is s' = scaling / (1 - p).

torch.library.define(
    f"{NAMESPACE}::lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p, "
    "bool save_s) -> (Tensor, Tensor)",
)
torch.library.define(
    f"{NAMESPACE}::lora_linear_bwd",
    "(Tensor? x, Tensor grad, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? s, Tensor? seed, float scaling, "
    "float dropout_p, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_fwd")
def _fwd_fake(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0] if save_s else 0, lora_A.shape[0])


@torch.library.impl(f"{NAMESPACE}::lora_linear_fwd", ("cpu", "cuda"))
def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, save_s: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from stablelora_kernels.launch.lora_linear import forward_launches

    y, s = _fwd_fake(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
    device = problem.device_of(x.device)
    kept = s if save_s else None
    build = partial(forward_launches, device, x, weight, bias, lora_A, lora_B, kept, y, seed, scaling, dropout_p)
    choice = None
    if autotune.get_autotune():
        (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
        call = Call("forward", m, n, k, r, x.dtype, lora_A.dtype, dropout_p > 0)
        choice = autotune.choose(device, call, build, y, x, weight, bias)
    for launch in build(choice=choice):
        launch.run(x.device)
    return y, s


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_bwd")
def _bwd_fake(x, grad, weight, lora_A, lora_B, s, seed, scaling, dropout_p, need_x, need_a, need_b):  # type: ignore[no-untyped-def]
    return (
        grad.new_empty((grad.shape[0] if need_x else 0, lora_A.shape[1])),
        lora_A.new_empty((lora_A.shape[0] if need_a else 0, lora_A.shape[1])),
        lora_B.new_empty((lora_B.shape[0] if need_b else 0, lora_B.shape[1])),
    )


@torch.library.impl(f"{NAMESPACE}::lora_linear_bwd", ("cpu", "cuda"))
def _bwd(
    x: Tensor | None, grad: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: Tensor | None,
    seed: Tensor | None, scaling: float, dropout_p: float, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from stablelora_kernels.launch.lora_linear import backward_launches

    outputs = _bwd_fake(x, grad, weight, lora_A, lora_B, s, seed, scaling, dropout_p, need_x, need_a, need_b)
    wanted = [out if need else None for out, need in zip(outputs, (need_x, need_a, need_b), strict=True)]
    device = problem.device_of(grad.device)
    given = (x, grad, weight, lora_A, lora_B, s, seed)
    build = partial(backward_launches, device, *given, *wanted, scaling=scaling, dropout_p=dropout_p)  # type: ignore[arg-type]
    choice = None
    if autotune.get_autotune() and need_x and weight is not None:
        (m, n), (r, k), dx = grad.shape, lora_A.shape, outputs[0]
        call = Call("backward", m, k, n, r, grad.dtype, lora_A.dtype, dropout_p > 0)
        # With dA and dB, which some kernels compute beside dX.
        choice = autotune.choose(device, call, build, dx, grad, weight, None)
    for launch in build(choice=choice):
        launch.run(grad.device)
    return outputs


# Both, under autograd.


def draw_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    # It stays on the device: no wait for it, and a CUDA graph draws a new one at each replay.
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None


def _forward(
    x: Tensor, weight: Tensor | Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float, backend: str, save_s: bool,
) -> tuple[Tensor, Tensor, Tensor | None, float]:  # fmt: skip
    """Y, S, dropout's seed or mask, and s'; x [M, K]."""
    if backend == "triton":
        seed = draw_seed(x, dropout_p)
        scaling /= 1 - dropout_p
        rest = (bias, lora_A, lora_B, seed, scaling, dropout_p, save_s)
        if isinstance(weight, Stored):
            y, s = torch.ops.stablelora_kernels.lora_linear_quantized_fwd(x, *weight, *rest)
        else:
            y, s = torch.ops.stablelora_kernels.lora_linear_fwd(x, weight, *rest)
        return y, s, seed, scaling
    keep = None
    if dropout_p:
        keep, dropout_p = draw_keep(x, dropout_p)
        scaling /= 1 - dropout_p
    y, s = torch_fwd(x, _in_full(weight, x.dtype), bias, lora_A, lora_B, scaling, keep)
    return y, s, keep, scaling


def _in_full(weight: Tensor | Stored, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype) if isinstance(weight, Stored) else weight


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, A and B by the formulas above; those of weight and bias, where wanted, by plain products.

    A quantized weight comes as the three parts of :class:`Stored`: ``weight`` is its data, and ``layout`` is None of a plain one.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
        dropout_p: float, backend: str, layout: Layout | None = None, *scales: Tensor,
    ) -> Tensor:  # fmt: skip
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        ctx.lora_dtype = lora_A.dtype
        if backend == "torch":
            # The kernels cast in registers; here backward uses the casts that forward made.
            lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        given = weight if layout is None else Stored(weight, scales, layout)
        y, s, random, scaling = _forward(rows, given, bias, lora_A, lora_B, scaling, dropout_p, backend, need_b)
        # Of the activations only what will be read; x as it came, since the graph around holds that very tensor.
        ctx.save_for_backward(
            x if need_w or need_a else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            s if need_b else None,
            random if need_x or need_a else None,
            *(scales if need_x else ()),
        )
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.x_shape = scaling, dropout_p, backend, x.shape
        ctx.layout, ctx.optional = layout, 0 if layout is None else 1 + len(scales)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_A, lora_B, s, random, *scales = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        # Without dX the weight is not read, and any is as good as another.
        stored = Stored(weight, tuple(scales), ctx.layout) if ctx.layout is not None and need_x else None
        dx = da = db = None
        if ctx.backend == "triton":
            rest = (lora_A, lora_B, s, random, ctx.scaling, ctx.dropout_p)
            if stored is None:
                dx, da, db = torch.ops.stablelora_kernels.lora_linear_bwd(
                    rows, grad, weight, *rest, need_x, need_a, need_b
                )
            else:
                dx, da, db = torch.ops.stablelora_kernels.lora_linear_quantized_bwd(
                    rows, grad, *stored, *rest, need_a, need_b
                )
        else:
            grad = expanded(grad)
            weight = _in_full(stored or weight, grad.dtype)
            dx, da, db = torch_bwd(
                grad, rows, weight, lora_A, lora_B, s, random, ctx.scaling, ctx.lora_dtype, need_x, need_a, need_b
            )
        dw = grad.t() @ rows if need_w else None
        dbias = grad.sum(0) if need_bias else None
        return (
            dx.view(ctx.x_shape) if need_x and dx is not None else None,
            dw,
            dbias,
            da if need_a else None,
            db if need_b else None,
            *[None] * (3 + ctx.optional),
        )


def lora_linear_op(
    x: Tensor, weight: Tensor | Stored, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    dropout_p: float, backend: str,
) -> Tensor:  # fmt: skip
    """``functional.lora_linear`` with arguments that were checked and a backend that was chosen."""
    quantized = isinstance(weight, Stored)
    tensors = (x, weight if isinstance(weight, Tensor) else None, bias, lora_A, lora_B)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    plain = weight if isinstance(weight, Tensor) else None
    # Autograd would hold a dequantized weight.
    if backend == "torch" and not (quantized and wanted) and is_few(x, plain, limit=few_rows(x, dropout_p)):
        flat = dropped = as_matrix(x)
        if dropout_p:
            keep, dropout_p = draw_keep(flat, dropout_p)
            dropped, scaling = flat * as_float(keep, x.dtype), scaling / (1 - dropout_p)
        s = torch.nn.functional.linear(dropped, lora_A.to(x.dtype))
        y = torch.nn.functional.linear(flat, _in_full(weight, x.dtype), bias)
        y = torch.addmm(y, s, lora_B.to(x.dtype).t(), alpha=scaling)
        return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])
    if wanted:
        rest = (bias, lora_A, lora_B, scaling, dropout_p, backend)
        if isinstance(weight, Stored):
            return _LoRALinear.apply(x, weight.data, *rest, weight.layout, *weight.scales)
        return _LoRALinear.apply(x, weight, *rest)
    if backend == "torch":
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    y = _forward(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling, dropout_p, backend, False)[0]
    return y.view(*x.shape[:-1], y.shape[-1])
