"""``lora_experts``: a stack of experts with LoRA, for rows that are sorted by expert. Nothing has
the stack's size but the stack.

    S_e = (X_e ∘ keep_e) A_e^T          Y_e = X_e W_e^T + bias_e + s' S_e B_e^T
    dS_e = s' dY_e B_e                  dX_e = dY_e W_e + (dS_e A_e) ∘ keep_e
    dA_e = dS_e^T (X_e ∘ keep_e)        dB_e = s' dY_e^T S_e

X_e are the rows of expert e. Each expert is a ``lora_linear`` of its rows, on PyTorch's operators.
On a GPU in bfloat16, PyTorch's grouped product (``grouped.py``) computes all experts at once and
reads the offsets on the device; otherwise a loop (``loop.py``) reads them on the host.

Autograd saves X, S, the offsets, dropout's mask, and W if dX is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.dropout import draw_dropout
from stablelora_kernels.ops.formulas import Gradients, Wanted
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackwardCall,
    ExpertsForwardCall,
    ExpertStack,
    StackSettings,
)
from stablelora_kernels.ops.lora_experts.grouped import (
    can_group,
    grouped_backward,
    grouped_forward,
    grouped_thin_product,
)
from stablelora_kernels.ops.lora_experts.loop import (
    loop_backward,
    loop_forward,
    loop_thin_product,
)
from stablelora_kernels.ops.matrices import with_own_memory
from stablelora_kernels.ops.plans import define_op


def experts_forward(call: ExpertsForwardCall) -> tuple[Tensor, Tensor]:
    """Y [T, N] and, if it is saved, S [T, r], by the call's backend."""
    return (grouped_forward if can_group(call.x, call.stack) else loop_forward)(call)


def experts_thin_product(call: ExpertsForwardCall) -> Tensor:
    """S [T, r] alone."""
    return (grouped_thin_product if can_group(call.x, call.stack) else loop_thin_product)(call)


def experts_backward(call: ExpertsBackwardCall) -> Gradients:
    """The wanted gradients."""
    return (grouped_backward if can_group(call.grad, call.stack) else loop_backward)(call)


# A stack's ``tensors`` and ``settings``.
_STACK = "Tensor lora_A, Tensor lora_B, Tensor? keep, Tensor? data, Tensor[] scales"
_SETTINGS = "int[] layout, float scaling, bool transposed, float dropout_p"


def _forward_fake(
    x: Tensor, offsets: Tensor, save_s: bool, bias: Tensor | None, *stack: Any
) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = stack[:2]
    rows = x.shape[0]
    return x.new_empty(rows, lora_B.shape[1]), x.new_empty(rows if save_s else 0, lora_A.shape[1])


@define_op(
    "lora_experts_fwd",
    f"(Tensor x, Tensor offsets, bool save_s, Tensor? bias, {_STACK}, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward_fake,
)
def lora_experts_fwd(
    x: Tensor, offsets: Tensor, save_s: bool, bias: Tensor | None, *stack: Any
) -> tuple[Tensor, Tensor]:
    """The results of :func:`experts_forward`."""
    return experts_forward(ExpertsForwardCall(x, _stack_of(stack, bias), offsets, save_s))


def _backward_fake(
    x: Tensor | None,
    grad: Tensor,
    offsets: Tensor,
    s: Tensor | None,
    wanted: Sequence[bool],
    *stack: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = stack[:2]
    dx, da, db = wanted
    return (
        grad.new_empty(grad.shape[0] if dx else 0, lora_A.shape[2]),
        lora_A.new_empty(lora_A.shape if da else 0),
        lora_B.new_empty(lora_B.shape if db else 0),
    )


@define_op(
    "lora_experts_bwd",
    f"(Tensor? x, Tensor grad, Tensor offsets, Tensor? s, bool[] wanted, {_STACK}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def lora_experts_bwd(
    x: Tensor | None,
    grad: Tensor,
    offsets: Tensor,
    s: Tensor | None,
    wanted: Sequence[bool],
    *stack: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of :func:`experts_backward`; those that are not wanted are empty."""
    call = ExpertsBackwardCall(x, grad, _stack_of(stack), offsets, s, Wanted(*wanted))
    gradients = experts_backward(call)
    lora_A = call.stack.lora_A
    return (
        grad.new_empty(0, lora_A.shape[2]) if gradients.dx is None else gradients.dx,
        lora_A.new_empty(0) if gradients.da is None else gradients.da,
        lora_A.new_empty(0) if gradients.db is None else gradients.db,
    )


def _stack_of(arguments: Sequence[Any], bias: Tensor | None = None) -> ExpertStack:
    """The stack of an op's last arguments."""
    *operands, scales = arguments[:5]
    return ExpertStack.of([*operands, *scales], StackSettings(*arguments[5:]), bias)


class _ExpertsContext(Context, Protocol):
    settings: StackSettings


class _LoRAExperts(torch.autograd.Function):
    """Gradients of x, A and B. ``stack``: its tensors."""

    @staticmethod
    def forward(
        ctx: _ExpertsContext,
        settings: StackSettings,
        x: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        *stack: Tensor | None,
    ) -> Tensor:
        wanted = _wanted(ctx)
        y, s = lora_experts_fwd(x, offsets, wanted.b, bias, *stack[:4], stack[4:], *settings)
        # Save only what backward reads, as ExpertsBackwardCall's tensors.
        read = stack if wanted.x else (*stack[:3], None)
        ctx.save_for_backward(x if wanted.a else None, offsets, s if wanted.b else None, *read)
        ctx.settings = settings
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: _ExpertsContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Checkpointing lets backward ask for them once.
        saved: Sequence[Any] = ctx.saved_tensors
        x, offsets, s, *stack = saved
        wanted = _wanted(ctx)
        call = (x, with_own_memory(grad), offsets, s, wanted)
        dx, da, db = lora_experts_bwd(*call, *stack[:4], stack[4:], *ctx.settings)
        return (
            None,
            dx if wanted.x else None,
            None,
            None,
            da if wanted.a else None,
            db if wanted.b else None,
            *[None] * (len(ctx.needs_input_grad) - 6),
        )


def _wanted(ctx: _ExpertsContext) -> Wanted:
    """By the places of x, A and B among the function's arguments."""
    return Wanted(ctx.needs_input_grad[1], ctx.needs_input_grad[4], ctx.needs_input_grad[5])


def lora_experts_op(x: Tensor, stack: ExpertStack, offsets: Tensor) -> Tensor:
    """:func:`~stablelora_kernels.functional.lora_experts` for checked arguments; A [E, 0, K] and B
    [E, N, 0] are no branch.
    """
    keep, scaling = draw_dropout(x, stack.dropout_p if stack.rank else 0.0, stack.scaling)
    stack = stack._replace(keep=keep, scaling=scaling)
    tensors = stack.tensors()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, stack.lora_A, stack.lora_B)):
        y: Tensor = _LoRAExperts.apply(stack.settings, x, offsets, stack.bias, *tensors)  # type: ignore[no-untyped-call]
        return y
    save_s = False
    call = (x, offsets, save_s, stack.bias)
    return lora_experts_fwd(*call, *tensors[:4], tensors[4:], *stack.settings)[0]
