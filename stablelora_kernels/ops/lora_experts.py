"""``lora_experts``: a stack of experts with LoRA, for rows that are sorted by expert. Nothing has
the stack's size but the stack.

    S_e = (X_e ∘ keep_e) A_e^T          Y_e = X_e W_e^T + bias_e + s' S_e B_e^T
    dS_e = s' dY_e B_e                  dX_e = dY_e W_e + (dS_e A_e) ∘ keep_e
    dA_e = dS_e^T (X_e ∘ keep_e)        dB_e = s' dY_e^T S_e

X_e are the rows of expert e. Each expert is a ``lora_linear`` of its rows, on PyTorch's operators.
On a GPU in bfloat16, PyTorch's grouped product computes all experts at once and reads the offsets
on the device; otherwise a loop reads them on the host.

Autograd saves X, S, the offsets and dropout's mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.lora_linear import first_derivative
from stablelora_kernels.ops.plans import define_op
from stablelora_kernels.ops.torch_path import draw_dropout, expanded, masked, torch_bwd, torch_fwd
from stablelora_kernels.projection import Projection

# A grouped product takes rows that begin at multiples of so many bytes.
ALIGNMENT = 16


def _forward_fake(x, weight, bias, lora_A, lora_B, offsets, keep, scaling, transposed, save_s):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], lora_B.shape[1]), x.new_empty(
        x.shape[0] if save_s else 0, lora_A.shape[1]
    )


@define_op(
    "lora_experts_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor offsets, Tensor? keep, float scaling, "
    "bool transposed, bool save_s) -> (Tensor, Tensor)",
    _forward_fake,
)
def lora_experts_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, keep: Tensor | None,
    scaling: float, transposed: bool, save_s: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y [T, N] and with ``save_s`` S [T, r], for x [T, K]; the scaling is s'."""
    w, (lora_A, lora_B) = _each_kn(weight, transposed), _cast(x.dtype, lora_A, lora_B)
    if can_group(x, weight):
        return _grouped_forward(x, w, bias, lora_A, lora_B, offsets, keep, scaling, save_s)
    y, s = _forward_fake(
        x, weight, bias, lora_A, lora_B, offsets, keep, scaling, transposed, save_s
    )
    end = 0
    for e, start, end in _parts(offsets):
        expert = Projection(
            w[e].t(), None if bias is None else bias[e], lora_A[e], lora_B[e], scaling
        )
        (y[start:end],), (s_e,) = torch_fwd(
            x[start:end], [expert], [None if keep is None else keep[start:end]]
        )
        if save_s:
            s[start:end] = s_e
    y[end:] = 0
    s[end:] = 0
    return y, s


class _Backward(NamedTuple):
    """The arguments of ``lora_experts_bwd``."""

    x: Tensor | None
    grad: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    s: Tensor
    offsets: Tensor
    keep: Tensor | None
    scaling: float
    transposed: bool
    need_x: bool
    need_a: bool
    need_b: bool


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Backward(*args)
    dx = call.grad.new_empty(
        call.grad.shape[0] if call.need_x else 0, call.weight.shape[1 if call.transposed else 2]
    )
    wanted = ((call.lora_A, call.need_a), (call.lora_B, call.need_b))
    da, db = (t.new_empty(t.shape if needed else 0) for t, needed in wanted)
    return dx, da, db


@define_op(
    "lora_experts_bwd",
    "(Tensor? x, Tensor grad, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, Tensor offsets, Tensor? keep, "
    "float scaling, bool transposed, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def lora_experts_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dX [T, K], dA [E, r, K] and dB [E, N, r], for dY [T, N]; those that are not needed are empty."""
    call, (dx, da, db) = _Backward(*args), _backward_fake(*args)
    x, keep, w = call.x, call.keep, _each_kn(call.weight, call.transposed)
    lora_A, lora_B = _cast(call.grad.dtype, call.lora_A, call.lora_B)
    if can_group(call.grad, call.weight):
        return _grouped_backward(call, w, lora_A, lora_B, (dx, da, db))
    # An expert without rows has no part in the result.
    da, db = da.zero_(), db.zero_()
    end = 0
    for e, start, end in _parts(call.offsets):
        expert = Projection(w[e].t(), None, lora_A[e], lora_B[e], call.scaling)
        dx_e, da_e, db_e = torch_bwd(
            None if x is None else x[start:end], [call.grad[start:end]], [expert],
            [call.s[start:end] if call.need_b else None], [None if keep is None else keep[start:end]],
            call.lora_A.dtype, call.need_x, call.need_a, call.need_b,
        )  # fmt: skip
        if dx_e is not None:
            dx[start:end] = dx_e
        for stack, part in ((da, da_e), (db, db_e)):
            if part:
                stack[e] = part[0]
    dx[end:] = 0
    return dx, da, db


def _each_kn(weight: Tensor, transposed: bool) -> Tensor:
    """The weights as [E, K, N]."""
    return weight if transposed else weight.transpose(1, 2)


def _cast(dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in ``dtype``; B, which PEFT packs with the expert fastest, in an order that a product
    can read.
    """
    return lora_A.to(dtype), lora_B.to(dtype).contiguous()


def _parts(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that has rows, with its first row and the one behind its last."""
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            yield e, start, end
            start = end


# GPUs


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product takes x [T, K], or dY, and the weights without a host's
    read of the offsets.
    """
    if (
        not x.is_cuda
        or x.dtype != torch.bfloat16
        or torch.version.hip
        or not hasattr(torch, "_grouped_mm")
    ):
        return False
    aligned = all(t.data_ptr() % ALIGNMENT == 0 for t in (x, weight)) and x.stride(1) == 1
    even = all(n * x.element_size() % ALIGNMENT == 0 for n in (x.stride(0), *weight.shape[1:]))
    return (
        aligned
        and even
        and weight.is_contiguous()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _grouped_forward(
    x: Tensor, w: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, offsets: Tensor, keep: Tensor | None,
    scaling: float, save_s: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`lora_experts_fwd`, for weights [E, K, N]."""
    product, r = _products(offsets), lora_A.shape[1]
    y = product(x, w)
    s = product(masked(x, keep), _padded(lora_A, 1).transpose(1, 2))
    if r:
        y.add_(product(s, _padded(lora_B, 2).transpose(1, 2)), alpha=scaling)
    if bias is not None:
        expert = torch.searchsorted(
            offsets, torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype), right=True
        )
        y.add_(bias[expert.clamp_(max=bias.shape[0] - 1)])
    unused = _unused(offsets, x.shape[0])
    return y.masked_fill_(unused, 0), s[:, :r].masked_fill(unused, 0) if save_s else s.new_empty(
        0, r
    )


def _grouped_backward(
    call: _Backward,
    w: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lora_experts_bwd`, for weights [E, K, N] and A and B in x's dtype."""
    grad, keep, r, (dx, da, db) = call.grad, call.keep, lora_A.shape[1], results
    product, empty = _products(call.offsets), _counts(call.offsets)[:, None, None] == 0
    if call.need_x or call.need_a:
        ds = product(grad, _padded(lora_B, 2)).mul_(call.scaling)
    if call.need_x:
        dx = product(grad, w.transpose(1, 2))
        if r:
            through = product(ds, _padded(lora_A, 1))
            dx.add_(through if keep is None else through * keep)
        dx.masked_fill_(_unused(call.offsets, grad.shape[0]), 0)
    if call.need_a:
        assert call.x is not None
        da = product(ds.t(), masked(call.x, keep))[:, :r].masked_fill(empty, 0).to(da.dtype)
    if call.need_b:
        db = (
            product(grad.t(), _padded(call.s, 1))[:, :, :r]
            .masked_fill(empty, 0)
            .to(db.dtype)
            .mul_(call.scaling)
        )
    return dx, da, db


def _products(offsets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The grouped product of rows [T, P] and [E, P, Q], or of columns [P, T] and rows [T, Q].
    Unused rows are not written.
    """
    ends = offsets.to(torch.int32)
    return lambda a, b: torch._grouped_mm(a, b, offs=ends)  # type: ignore[attr-defined]


def _padded(t: Tensor, dim: int) -> Tensor:
    """``t`` with zeros behind its ranks, up to a size that the grouped product takes."""
    step = ALIGNMENT // t.element_size()
    missing = -t.shape[dim] % step or (step if t.shape[dim] == 0 else 0)
    return torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1 - dim) + (0, missing)) if missing else t


def _counts(offsets: Tensor) -> Tensor:
    return torch.diff(offsets, prepend=offsets.new_zeros(1))


def _unused(offsets: Tensor, rows: int) -> Tensor:
    """Whether a row is behind the last expert's, [T, 1]."""
    return (torch.arange(rows, device=offsets.device) >= offsets[-1])[:, None]


# Autograd


class _LoRAExperts(torch.autograd.Function):
    """Gradients of x, A and B."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, offsets: Tensor,
        keep: Tensor | None, scaling: float, transposed: bool,
    ) -> Tensor:  # fmt: skip
        _, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        y, s = lora_experts_fwd(
            x, weight, bias, lora_A, lora_B, offsets, keep, scaling, transposed, need_b
        )
        ctx.save_for_backward(x if need_a else None, weight, lora_A, lora_B, s, offsets, keep)
        ctx.call = scaling, transposed
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        grads = lora_experts_bwd(x, expanded(grad), *saved, *ctx.call, need_x, need_a, need_b)
        dx, da, db = (
            each if needed else None
            for each, needed in zip(grads, (need_x, need_a, need_b), strict=True)
        )
        return dx, None, None, da, db, None, None, None, None


def lora_experts_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, offsets: Tensor,
    transposed: bool, dropout_p: float,
) -> Tensor:  # fmt: skip
    """:func:`~stablelora_kernels.functional.lora_experts` for checked arguments; A [E, 0, K] and B
    [E, N, 0] are no branch.
    """
    keep, scaling = draw_dropout(x, dropout_p if lora_A.shape[1] else 0.0, scaling)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_A, lora_B)):
        return _LoRAExperts.apply(
            x, weight, bias, lora_A, lora_B, offsets, keep, scaling, transposed
        )  # type: ignore[no-any-return]
    return lora_experts_fwd(
        x, weight, bias, lora_A, lora_B, offsets, keep, scaling, transposed, False
    )[0]  # type: ignore[no-any-return]
