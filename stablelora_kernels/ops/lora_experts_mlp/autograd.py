"""A module of experts in one autograd node: the stacks up and down, the gate between them, and the
routing weights.

    G_e = up(X_e)    H_e = gate(G_e)    Z_e = w ∘ H_e    Y[tokens of e] += down(Z_e) + w bias
    dZ_e = dX of down, for dY_e = dY[tokens of e]        dw = Σ dZ_e ∘ H_e + Σ dY_e ∘ bias
    dG_e = the gate's gradient, for w ∘ dZ_e             dX[tokens of e] += dX of up, for dG_e

A slot is a token's choice of an expert, a row of X_e, G_e, H_e and Z_e. The gate is any function
of rows; backward runs it again, under autograd.

Autograd saves x [T, H] by tokens, G [slots, 2 I], up's S [slots, r], the routing and dropout's
recipes (``ops/dropout.py``). Backward gathers X_e and computes H_e, Z_e and down's S again. The
routing weight multiplies H, not down's output, so that its gradient needs no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.cpu_products import without_autocast
from stablelora_kernels.ops.dropout import draw_for_backward, drawn_again
from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.ops.lora_experts.call import ExpertStack, StackSettings
from stablelora_kernels.ops.lora_experts_mlp.blocks import blocks_backward, blocks_forward
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertsMLPBackwardCall,
    ExpertsMLPForwardCall,
    ExpertsMLPForwardResults,
    ExpertsMLPWanted,
    Gate,
    Routing,
)
from stablelora_kernels.ops.lora_experts_mlp.together import together_backward, together_forward


def _is_by_blocks(x: Tensor) -> bool:
    """Whether a block of experts is computed at a time, which needs the offsets on the host."""
    return x.device.type == "cpu"


def _drawn(x: Tensor, routing: Routing, stack: ExpertStack) -> tuple[ExpertStack, Tensor | None]:
    """A stack with s' and dropout's mask of all slots, and what draws the mask again."""
    if stack.dropout_p == 0.0 or stack.rank == 0:
        return stack, None
    # Only the shape and the device are read.
    rows = x.new_empty(1, 1).expand(routing.slots, stack.in_features)
    drawn = draw_for_backward(rows, stack.dropout_p)
    stack = stack._replace(scaling=stack.scaling * drawn.scale, keep=drawn.mask)
    return stack, drawn.recipe


def _drawn_again(routing: Routing, stack: ExpertStack) -> ExpertStack:
    """A saved stack, with dropout's mask of all slots."""
    shape = (routing.slots, stack.in_features)
    return stack._replace(keep=drawn_again(stack.keep, shape, stack.dropout_p))


class _MLPContext(Context, Protocol):
    gate: Gate
    up: StackSettings
    down: StackSettings
    # How many tensors up's stack has.
    up_count: int


class _LoRAExpertsMLP(torch.autograd.Function):
    """Gradients of x, the routing weights, and the A and B of both stacks, which are ``call``'s.

    ``up_recipe`` and ``down_recipe`` draw the stacks' masks again.
    """

    @staticmethod
    def forward(
        ctx: _MLPContext,
        x: Tensor,
        weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        call: ExpertsMLPForwardCall,
        up_recipe: Tensor | None,
        down_recipe: Tensor | None,
    ) -> Tensor:
        wanted = _wanted(ctx)
        results = _forward(call)
        up = _read_by_backward(call.up, up_recipe, wanted.up)
        down = _read_by_backward(call.down, down_recipe, wanted.down)
        # Save only what backward reads, as ExpertsMLPBackwardCall's tensors.
        ctx.save_for_backward(
            x if wanted.up.a else None,
            results.gate_up,
            results.s if wanted.up.b else None,
            *call.routing,
            call.down.bias if wanted.weights else None,
            *up,
            *down,
        )
        ctx.gate = call.gate
        ctx.up = call.up.settings
        ctx.down = call.down.settings
        ctx.up_count = len(up)
        return results.y

    @staticmethod
    @first_derivative
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: Sequence[Any] = ctx.saved_tensors
        x, gate_up, s, order, offsets, weights, bias, *stacks = saved
        routing = Routing(order, offsets, weights)
        up = ExpertStack.of(stacks[: ctx.up_count], ctx.up)
        down = ExpertStack.of(stacks[ctx.up_count :], ctx.down, bias)
        call = ExpertsMLPBackwardCall(
            x,
            grad,
            gate_up,
            s,
            routing,
            ctx.gate,
            _drawn_again(routing, up),
            _drawn_again(routing, down),
            _wanted(ctx),
        )
        gradients = (blocks_backward if _is_by_blocks(grad) else together_backward)(call)
        dx = gradients.up.dx
        dweights = gradients.weights
        if dweights is not None:
            # From the slots' order to that of tokens.
            dweights = dweights[routing.place()].view_as(weights).to(weights.dtype)
        return (
            None if dx is None else dx.to(grad.dtype),
            dweights,
            gradients.up.da,
            gradients.up.db,
            gradients.down.da,
            gradients.down.db,
            None,
            None,
            None,
        )


def _wanted(ctx: _MLPContext) -> ExpertsMLPWanted:
    """By the places of the arguments of :class:`_LoRAExpertsMLP`."""
    x, weights, up_a, up_b, down_a, down_b = ctx.needs_input_grad[:6]
    up = Wanted(x, up_a, up_b)
    return ExpertsMLPWanted(weights, up, Wanted(True in up or weights, down_a, down_b))


def _read_by_backward(
    stack: ExpertStack, recipe: Tensor | None, wanted: Wanted
) -> list[Tensor | None]:
    """The stack's tensors that backward reads."""
    weight = stack.weight if wanted.x else None
    return stack._replace(weight=weight, keep=recipe).tensors()


def _forward(call: ExpertsMLPForwardCall) -> ExpertsMLPForwardResults:
    return (blocks_forward if _is_by_blocks(call.x) else together_forward)(call)


def lora_experts_mlp_op(
    x: Tensor, routing: Routing, gate: Gate, up: ExpertStack, down: ExpertStack
) -> Tensor:
    """Y [T, N] of x [T, H], for checked arguments: ``down(w ∘ gate(up(x)))``, summed over each
    token's slots, in x's dtype.

    A slot of no expert here adds nothing, and its routing weight's gradient is zero.
    """
    up, up_recipe = _drawn(x, routing, up)
    down, down_recipe = _drawn(x, routing, down)
    call = ExpertsMLPForwardCall(x, routing, gate, up, down, save=False)
    inputs = (x, routing.weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B)
    # Autocast would cast what the gate computes, which backward repeats outside of it.
    with without_autocast(x):
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            call = call._replace(save=True)
            y: Tensor = _LoRAExpertsMLP.apply(*inputs, call, up_recipe, down_recipe)  # type: ignore[no-untyped-call]
            return y
        return _forward(call).y
