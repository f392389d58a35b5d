"""``lora_experts``: a stack of experts with LoRA, for rows that are sorted by expert. Nothing has
the stack's size but the stack.

    S_e = (X_e ∘ keep_e) A_e^T          Y_e = X_e W_e^T + bias_e + s' S_e B_e^T
    dS_e = s' dY_e B_e                  dX_e = dY_e W_e + (dS_e A_e) ∘ keep_e
    dA_e = dS_e^T (X_e ∘ keep_e)        dB_e = s' dY_e^T S_e

X_e are the rows of expert e. Each expert is a ``lora_linear`` of its rows, on PyTorch's operators.
On a GPU in bfloat16, PyTorch's grouped product computes all experts at once and reads the offsets
on the device; otherwise a loop reads them on the host.

A packed stack (``packed_experts.py``) is dequantized one expert at a time, and again in backward.
The grouped product takes as many experts as fit into ``CHUNK_BYTES``. If these are not all, their
rows are looked up on the host.

Autograd saves X, S, the offsets and dropout's mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.cpu_products import by_float32, product
from stablelora_kernels.ops.dropout import draw_dropout, mask_of_rows, masked
from stablelora_kernels.ops.formulas import Wanted, gradients_of, project
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackward,
    ExpertsForward,
    ExpertsGradients,
)
from stablelora_kernels.ops.lora_experts.grouped import (
    can_group,
    grouped_backward,
    grouped_forward,
    grouped_product,
    padded,
    unused_rows,
)
from stablelora_kernels.ops.matrices import with_own_memory
from stablelora_kernels.ops.plans import define_op
from stablelora_kernels.packed_experts import PackedExperts, packed_experts
from stablelora_kernels.projection import Projection


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = ExpertsForward(*args)
    rows = call.x.shape[0]
    y = call.x.new_empty(rows, call.lora_B.shape[1])
    return y, call.x.new_empty(rows if call.save_s else 0, call.lora_A.shape[1])


@define_op(
    "lora_experts_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor offsets, Tensor? keep, Tensor[] scales, "
    "int[] layout, float scaling, bool transposed, bool save_s) -> (Tensor, Tensor)",
    _forward_fake,
)
def lora_experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Y [T, N] and with ``save_s`` S [T, r], for x [T, K]. The arguments are :class:`ExpertsForward`'s."""
    stored = ExpertsForward(*args)
    call = _to_multiply(stored, stored.x.dtype)
    if can_group(call.x, call.weight):
        return grouped_forward(call)
    y, s = _forward_fake(*stored)
    end = 0
    for expert in experts_with_rows(call.offsets):
        rows = slice(expert.start, expert.end)
        keep = mask_of_rows(call.keep, rows, call.x.shape[1])
        y[rows], expert_s = project(call.x[rows], _projection_of(call, expert.place), keep)
        if call.save_s:
            s[rows] = expert_s
        end = expert.end
    y[end:] = 0
    s[end:] = 0
    return y, s


def _allocate_gradients(call: ExpertsBackward) -> ExpertsGradients:
    rows = call.grad.shape[0] if call.need_x else 0
    return ExpertsGradients(
        call.grad.new_empty(rows, call.lora_A.shape[2]),
        call.lora_A.new_empty(call.lora_A.shape if call.need_a else 0),
        call.lora_B.new_empty(call.lora_B.shape if call.need_b else 0),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(ExpertsBackward(*args))


@define_op(
    "lora_experts_bwd",
    "(Tensor? x, Tensor grad, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor s, Tensor offsets, Tensor? keep, "
    "Tensor[] scales, int[] layout, float scaling, bool transposed, bool need_x, bool need_a, bool need_b) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def lora_experts_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA and dB for dY [T, N]; those that are not needed are empty. The arguments are
    :class:`ExpertsBackward`'s.
    """
    stored = ExpertsBackward(*args)
    results = _allocate_gradients(stored)
    call = _to_multiply(stored, stored.grad.dtype)
    if can_group(call.grad, call.weight):
        return grouped_backward(call, results)
    # An expert without rows has no part in the result.
    results.da.zero_()
    results.db.zero_()
    wanted = Wanted(call.need_x, call.need_a, call.need_b)
    end = 0
    for expert in experts_with_rows(call.offsets):
        rows = slice(expert.start, expert.end)
        gradients = gradients_of(
            None if call.x is None else call.x[rows],
            call.grad[rows],
            _projection_of(call, expert.place),
            call.s[rows] if call.need_b else None,
            mask_of_rows(call.keep, rows, call.lora_A.shape[2]),
            stored.lora_A.dtype,
            wanted,
        )
        if gradients.dx is not None:
            results.dx[rows] = gradients.dx
        if gradients.da is not None:
            results.da[expert.place] = gradients.da
        if gradients.db is not None:
            results.db[expert.place] = gradients.db
        end = expert.end
    results.dx[end:] = 0
    return results


def _projection_of(call: ExpertsForward | ExpertsBackward, place: int) -> Projection:
    """One expert of a call. Only here is an expert's matrix read, packed or not."""
    bias = call.bias[place] if isinstance(call, ExpertsForward) and call.bias is not None else None
    weight = _matrix_of(call, place) if _reads_weights(call) else None
    return Projection(weight, bias, call.lora_A[place], call.lora_B[place], call.scaling)


def _reads_weights(call: ExpertsForward | ExpertsBackward) -> bool:
    return isinstance(call, ExpertsForward) or call.need_x


def _matrix_of(call: ExpertsForward | ExpertsBackward, place: int) -> Tensor:
    """An expert's W [N, K]."""
    stack = call.weight
    dtype = call.lora_A.dtype
    matrix = stack[place] if isinstance(stack, Tensor) else stack.expert(place, dtype)
    return matrix.t() if call.transposed else matrix


CallT = TypeVar("CallT", ExpertsForward, ExpertsBackward)


def _to_multiply(call: CallT, dtype: torch.dtype) -> CallT:
    """``call`` with A and B in ``dtype``, and with a packed stack in one piece."""
    weight = call.weight
    if call.layout:
        assert isinstance(weight, Tensor)
        weight = packed_experts(weight, call.scales, call.layout)
    return call._replace(
        weight=weight,
        lora_A=call.lora_A.to(dtype),
        # PEFT packs B with the expert fastest; a product cannot read that order.
        lora_B=call.lora_B.to(dtype).contiguous(),
    )


class ExpertRows(NamedTuple):
    """The rows of the expert at a place of the stack: the first, and the one behind the last."""

    place: int
    start: int
    end: int


def experts_with_rows(offsets: Tensor) -> Iterator[ExpertRows]:
    start = 0
    for place, end in enumerate(offsets.tolist()):
        if end > start:
            yield ExpertRows(place, start, end)
            start = end


def experts_thin_product(stored: ExpertsForward) -> Tensor:
    """S [T, r] of :func:`lora_experts_fwd` alone; zeros in rows of no expert."""
    call = _to_multiply(stored, stored.x.dtype)
    x = masked(call.x, call.keep)
    rows = x.shape[0]
    rank = call.lora_A.shape[1]
    if can_group(call.x, call.weight):
        s = grouped_product(call.offsets)(x, padded(call.lora_A, 1).transpose(1, 2))
        return s[:, :rank].masked_fill(unused_rows(call.offsets, rows), 0)
    s = x.new_zeros(rows, rank)
    for expert in experts_with_rows(call.offsets):
        of_expert = slice(expert.start, expert.end)
        s[of_expert] = thin_product(x[of_expert], call.lora_A[expert.place])
    return s


def thin_product(x: Tensor, lora_A: Tensor) -> Tensor:
    """S = X A^T of one expert."""
    if by_float32(x):
        return product(x.float(), lora_A.float().t()).to(x.dtype)
    return product(x, lora_A.t())


# Autograd


class _ExpertsContext(Context, Protocol):
    layout: Sequence[int]
    scaling: float
    transposed: bool


# The tensors that backward reads, before the scales of a packed stack.
_SAVED = 7


class _LoRAExperts(torch.autograd.Function):
    """Gradients of x, A and B."""

    @staticmethod
    def forward(ctx: _ExpertsContext, *args: Any) -> Tensor:
        """The arguments are those of :class:`ExpertsForward`."""
        call = ExpertsForward(*args)
        assert isinstance(call.weight, Tensor)
        wanted = _wanted(ctx)
        y, s = lora_experts_fwd(*call._replace(save_s=wanted.b))
        ctx.save_for_backward(
            call.x if wanted.a else None,
            call.weight,
            call.lora_A,
            call.lora_B,
            s,
            call.offsets,
            call.keep,
            *call.scales,
        )
        ctx.layout = call.layout
        ctx.scaling = call.scaling
        ctx.transposed = call.transposed
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: _ExpertsContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Checkpointing lets backward ask for them once.
        saved = ctx.saved_tensors
        x = saved[0]
        operands = saved[1:_SAVED]
        scales = saved[_SAVED:]
        wanted = _wanted(ctx)
        facts = (scales, ctx.layout, ctx.scaling, ctx.transposed)
        dx, da, db = lora_experts_bwd(x, with_own_memory(grad), *operands, *facts, *wanted)
        return (
            dx if wanted.x else None,
            None,
            None,
            da if wanted.a else None,
            db if wanted.b else None,
            *[None] * 7,
        )


def _wanted(ctx: _ExpertsContext) -> Wanted:
    """By the places of x, A and B among the fields of :class:`ExpertsForward`."""
    return Wanted(ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])


def lora_experts_op(
    x: Tensor,
    weight: Tensor | PackedExperts,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    offsets: Tensor,
    transposed: bool,
    dropout_p: float,
) -> Tensor:
    """:func:`~stablelora_kernels.functional.lora_experts` for checked arguments; A [E, 0, K] and B
    [E, N, 0] are no branch.
    """
    has_branch = lora_A.shape[1] > 0
    keep, scaling = draw_dropout(x, dropout_p if has_branch else 0.0, scaling)
    data = weight
    scales: Sequence[Tensor] = ()
    layout: Sequence[int] = ()
    if isinstance(weight, PackedExperts):
        data = weight.data
        scales = weight.scales
        layout = weight.layout
    call = ExpertsForward(
        x,
        data,
        bias,
        lora_A,
        lora_B,
        offsets,
        keep,
        scales,
        layout,
        scaling,
        transposed,
        save_s=False,
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_A, lora_B)):
        y: Tensor = _LoRAExperts.apply(*call)  # type: ignore[no-untyped-call]
        return y
    return lora_experts_fwd(*call)[0]
