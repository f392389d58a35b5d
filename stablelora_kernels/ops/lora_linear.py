"""``lora_linear`` with its gradients: on the Triton kernels, as torch.library ops, or on PyTorch's own operators.

Both paths follow the formulas in ``kernels/lora_linear.py``: with s' = scaling / (1 - p) and a keep-mask of zeros and ones,
S = (X ∘ keep) A^T and Y = X W^T + bias + s' S B^T. Backward needs X, which the surrounding graph mostly holds anyway, S, and
on the PyTorch path the mask as bool; the kernels draw theirs again from a seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "stablelora_kernels"

# Above this rank, or with dropout, S gets a launch of its own: fused, its share of every column tile would cost more than
# reading X once more, and dropout's random numbers would be drawn again in each.
FUSED_MAX_R = 64


def _split(r: int, dropout_p: float) -> bool:
    return dropout_p > 0 or r > FUSED_MAX_R


# the Triton kernels as ops.

torch.library.define(
    f"{NAMESPACE}::lora_linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p, "
    "bool save_s) -> (Tensor, Tensor)",
)
torch.library.define(
    f"{NAMESPACE}::lora_linear_dx",
    "(Tensor grad, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, float dropout_p) "
    "-> (Tensor, Tensor)",
)
torch.library.define(f"{NAMESPACE}::lora_linear_g", "(Tensor grad, Tensor lora_B) -> Tensor")
torch.library.define(
    f"{NAMESPACE}::lora_linear_dab",
    "(Tensor x, Tensor grad, Tensor? g, Tensor? s, Tensor? seed, float scaling, float dropout_p, ScalarType dtype) "
    "-> (Tensor, Tensor)",
)


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_fwd")
def _fwd_fake(x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s):  # type: ignore[no-untyped-def]
    rows = x.shape[0] if save_s or _split(lora_A.shape[0], dropout_p) else 0
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(rows, lora_A.shape[0])


@torch.library.impl(f"{NAMESPACE}::lora_linear_fwd", ("cpu", "cuda"))
def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None,
    scaling: float, dropout_p: float, save_s: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from stablelora_kernels.kernels.lora_linear_launch import launch_linear, launch_shrink

    r = lora_A.shape[0]
    split = _split(r, dropout_p)
    y = x.new_empty(x.shape[0], weight.shape[0])
    s = x.new_empty(x.shape[0] if save_s or split else 0, r)
    if split:
        launch_shrink(x, lora_A, s, seed, dropout_p)
    stored = s if save_s or split else None
    launch_linear(x, weight, bias, lora_A, lora_B, stored, y, scaling / (1 - dropout_p), load_s=split)
    return y, s


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_dx")
def _dx_fake(grad, weight, lora_A, lora_B, seed, scaling, dropout_p):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape[0], weight.shape[1]), grad.new_empty(grad.shape[0], lora_A.shape[0])


@torch.library.impl(f"{NAMESPACE}::lora_linear_dx", ("cpu", "cuda"))
def _dx(
    grad: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scaling: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    from stablelora_kernels.kernels.lora_linear_launch import launch_linear

    dx = grad.new_empty(grad.shape[0], weight.shape[1])
    g = grad.new_empty(grad.shape[0], lora_A.shape[0])
    # The forward's formula with every matrix transposed. One launch at any rank, so that backward takes two in all.
    launch_linear(
        grad, weight.t(), None, lora_B.t(), lora_A.t(), g, dx, scaling / (1 - dropout_p),
        load_s=False, seed=seed, dropout_p=dropout_p,
    )  # fmt: skip
    return dx, g


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_g")
def _g_fake(grad, lora_B):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape[0], lora_B.shape[1])


@torch.library.impl(f"{NAMESPACE}::lora_linear_g", ("cpu", "cuda"))
def _g(grad: Tensor, lora_B: Tensor) -> Tensor:
    from stablelora_kernels.kernels.lora_linear_launch import launch_shrink

    g = grad.new_empty(grad.shape[0], lora_B.shape[1])
    launch_shrink(grad, lora_B.t(), g, None, 0.0)
    return g


@torch.library.register_fake(f"{NAMESPACE}::lora_linear_dab")
def _dab_fake(x, grad, g, s, seed, scaling, dropout_p, dtype):  # type: ignore[no-untyped-def]
    return (
        x.new_empty((0, 0) if g is None else (g.shape[1], x.shape[1]), dtype=dtype),
        x.new_empty((0, 0) if s is None else (grad.shape[1], s.shape[1]), dtype=dtype),
    )


@torch.library.impl(f"{NAMESPACE}::lora_linear_dab", ("cpu", "cuda"))
def _dab(
    x: Tensor, grad: Tensor, g: Tensor | None, s: Tensor | None, seed: Tensor | None, scaling: float, dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from stablelora_kernels.kernels.lora_linear_launch import launch_dab

    da, db = _dab_fake(x, grad, g, s, seed, scaling, dropout_p, dtype)
    launch_dab(
        x, g, grad, s, None if g is None else da, None if s is None else db, seed, scaling / (1 - dropout_p), dropout_p
    )
    return da, db


# PyTorch's own operators.


def _draw_keep(x: Tensor, dropout_p: float) -> tuple[Tensor, float]:
    """A keep-mask of x's shape, bool, from torch's generator, and the probability of dropping that it really has."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p), dropout_p
    # bernoulli_ draws a double an element, one after another. Sixteen bits an element, four elements a word, are seven
    # times as fast; the probability is rounded to 1/65536, and the scale follows the rounded one, so no bias is left.
    dropped = round(dropout_p * 65536)
    count = -(-x.numel() // 4)
    if torch.compiler.is_compiling():
        # torch.compile takes no random_(). The same bits: what randint adds to a word turns its highest bit around.
        words = torch.randint(-(2**63), 2**63 - 1, (count,)) ^ -(2**63)
    else:
        words = torch.empty(count, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return keep, dropped / 65536


def _as_float(keep: Tensor, dtype: torch.dtype) -> Tensor:
    # From uint8, the conversion is vectorised; from bool, it is not.
    return keep.view(torch.uint8).to(dtype)


# Below this many rows a copy that gives BLAS the layout it is fast on costs more than it saves (AVX-512, two cores).
_MANY_ROWS = 64


def _thin(x: Tensor, a: Tensor) -> Tensor:
    """``x a^T`` [M, r] of x [M, K] and a thin a [r, K], by the product that is fastest on x's dtype."""
    if x.dtype in (torch.bfloat16, torch.float16):
        # oneDNN's bfloat16 product is up to twice as fast with the small side first. The result is a transposed view.
        return torch.mm(a, x.t()).t()
    if x.shape[0] >= _MANY_ROWS:
        a = a.contiguous()
    return torch.mm(x, a.t())


def _torch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = _thin(x if keep is None else x * _as_float(keep, x.dtype), lora_A.to(x.dtype))
    y = torch.nn.functional.linear(x, weight, bias)
    # In place, so that the branch costs no second activation. Scaling the small B is cheaper than the product's alpha.
    y.addmm_(s, (lora_B * scaling).to(x.dtype).t())
    return y, s


def _torch_bwd(
    grad: Tensor, x: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: Tensor | None, keep: Tensor | None,
    scaling: float, need_x: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dx = da = db = None
    mask = None if keep is None else _as_float(keep, grad.dtype)
    if need_x or need_a:
        ds = _thin(grad, (lora_B * scaling).to(grad.dtype).t())
        if need_x:
            dx = torch.mm(grad, weight)
            a = lora_A.to(grad.dtype)
            if mask is None:
                dx.addmm_(ds, a)
            else:
                dx.addcmul_(torch.mm(ds, a), mask)
        if need_a:
            da = torch.mm(ds.t().contiguous(), x if mask is None else x * mask).to(lora_A.dtype)
    if need_b:
        assert s is not None
        if grad.shape[0] < _MANY_ROWS:
            db = torch.mm(grad.t(), s)
        else:
            db = torch.mm(s.t().contiguous(), grad).t().contiguous()
        db = db.mul_(scaling).to(lora_B.dtype)
    return dx, da, db


# both, under autograd.


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float,
    backend: str, save_s: bool,
) -> tuple[Tensor, Tensor, Tensor | None, float]:  # fmt: skip
    """Y, S, the seed or mask of dropout, and the probability that the mask has; x [M, K]."""
    if backend == "triton":
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p else None
        y, s = torch.ops.stablelora_kernels.lora_linear_fwd(
            x, weight, bias, lora_A, lora_B, seed, scaling, dropout_p, save_s
        )
        return y, s, seed, dropout_p
    keep = None
    if dropout_p:
        keep, dropout_p = _draw_keep(x, dropout_p)
    y, s = _torch_fwd(x, weight, bias, lora_A, lora_B, scaling / (1 - dropout_p), keep)
    return y, s, keep, dropout_p


class _LoRALinear(torch.autograd.Function):
    """Gradients of x, A and B by the formulas above; those of weight and bias, where someone wants them, by plain products."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
        dropout_p: float, backend: str,
    ) -> Tensor:  # fmt: skip
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        rows = x.reshape(-1, x.shape[-1])
        y, s, random, dropout_p = _forward(rows, weight, bias, lora_A, lora_B, scaling, dropout_p, backend, need_b)
        # Only what the gradients asked for will read. x as it came: the graph around holds that very tensor.
        ctx.save_for_backward(
            x if need_w or need_a or (need_b and backend == "triton") else None,
            weight if need_x else None,
            lora_A if need_x or need_a else None,
            lora_B,
            s if need_b else None,
            random if need_x or need_a else None,
        )
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.x_shape = scaling, dropout_p, backend, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_A, lora_B, s, random = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        dx = da = db = None
        if ctx.backend == "triton":
            ops, args = torch.ops.stablelora_kernels, (random, ctx.scaling, ctx.dropout_p)
            g = None
            if need_x:
                dx, g = ops.lora_linear_dx(grad, weight, lora_A, lora_B, *args)
            elif need_a:
                g = ops.lora_linear_g(grad, lora_B)
            if need_a or need_b:
                da, db = ops.lora_linear_dab(rows, grad, g if need_a else None, s, *args, lora_B.dtype)
                da, db = da if need_a else None, db if need_b else None
        else:
            scaling = ctx.scaling / (1 - ctx.dropout_p)
            # A broadcast gradient, as of sum(), would be expanded anew by each product.
            grad = grad.contiguous() if 0 in grad.stride() else grad
            dx, da, db = _torch_bwd(
                grad, rows, weight, lora_A, lora_B, s, random, scaling, need_x, need_a, need_b
            )  # fmt: skip
        dw = grad.t() @ rows if need_w else None
        dbias = grad.sum(0) if need_bias else None
        return None if dx is None else dx.view(ctx.x_shape), dw, dbias, da, db, None, None, None


def lora_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float,
    backend: str,
) -> Tensor:  # fmt: skip
    """``functional.lora_linear`` with arguments that were checked and a backend that was chosen."""
    rows = x.numel() // x.shape[-1]
    if backend == "torch" and rows < _MANY_ROWS and dropout_p == 0:
        # So few rows are a matter of microseconds, of which a Python autograd function would be the most.
        s = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), lora_A.to(x.dtype))
        y = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        y = torch.addmm(y, s, lora_B.to(x.dtype).t(), alpha=scaling)
        return y.view(*x.shape[:-1], y.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, lora_A, lora_B)):
        return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout_p, backend)
    y = _forward(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling, dropout_p, backend, False)[0]
    return y.view(*x.shape[:-1], y.shape[-1])
