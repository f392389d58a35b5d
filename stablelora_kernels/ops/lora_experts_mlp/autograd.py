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

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stablelora_kernels.ops.autograd import Context, first_derivative
from stablelora_kernels.ops.cpu_products import without_autocast
from stablelora_kernels.ops.dropout import NOT_DROPPED, Drawn, draw_for_backward, drawn_again
from stablelora_kernels.ops.lora_experts_mlp.blocks import backward_by_blocks, forward_by_blocks
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertStack,
    FrozenStack,
    Gate,
    Kept,
    MLPCall,
    MLPGradients,
    Needs,
    Routing,
    sum_dtype,
)
from stablelora_kernels.ops.lora_experts_mlp.together import backward_together, forward_together


def _is_by_blocks(x: Tensor) -> bool:
    """Whether a block of experts is computed at a time, which needs the offsets on the host."""
    return x.device.type == "cpu"


def _drawn(x: Tensor, routing: Routing, stack: ExpertStack) -> tuple[ExpertStack, Drawn]:
    """The mask of a stack's input, of all slots, and the stack with s'."""
    frozen = stack.frozen
    if frozen.dropout_p == 0.0 or stack.rank == 0:
        return stack, NOT_DROPPED
    # Only the shape and the device are read.
    rows = x.new_empty(1, 1).expand(routing.slots, stack.in_features)
    drawn = draw_for_backward(rows, frozen.dropout_p)
    return stack._replace(frozen=frozen._replace(scaling=frozen.scaling * drawn.scale)), drawn


class _Recipes(NamedTuple):
    """Of dropout's masks."""

    up: Tensor | None
    down: Tensor | None


class _MLPContext(Context, Protocol):
    gate: Gate
    up: FrozenStack
    down: FrozenStack


class _LoRAExpertsMLP(torch.autograd.Function):
    """Gradients of x, the routing weights, and the A and B of both stacks, which are ``call``'s."""

    @staticmethod
    def forward(
        ctx: _MLPContext,
        x: Tensor,
        weights: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        call: MLPCall,
        recipes: _Recipes,
    ) -> Tensor:
        needs = _needs(ctx)
        y, kept = _forward(call, x, saves=True)
        ctx.save_for_backward(
            x if needs.up_a else None,
            kept.gate_up,
            kept.s if needs.up_b else None,
            weights,
            call.routing.order,
            call.routing.offsets,
            up_a,
            up_b,
            down_a,
            down_b,
            *recipes,
            # Backward reads them by ctx.up and ctx.down. Saved, a change meanwhile is noticed.
            _bytes_of(call.up.frozen) if needs.x else None,
            _bytes_of(call.down.frozen) if needs.gate_up or needs.weights else None,
        )
        ctx.gate = call.gate
        ctx.up = call.up.frozen
        ctx.down = call.down.frozen
        return y

    @staticmethod
    @first_derivative
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)  # type: ignore[arg-type]
        needs = _needs(ctx)
        routing = Routing(saved.order, saved.offsets, saved.weights)
        up = ExpertStack(ctx.up, saved.up_a, saved.up_b)
        down = ExpertStack(ctx.down, saved.down_a, saved.down_b)
        masks = _Recipes(
            _mask_again(saved.up_recipe, routing, up), _mask_again(saved.down_recipe, routing, down)
        )
        call = _call_of(ctx.gate, up, down, masks, routing, grad.dtype)
        kept = Kept(saved.x, saved.gate_up, saved.s)
        results = _allocate_gradients(call, grad, needs)
        backward = backward_by_blocks if _is_by_blocks(grad) else backward_together
        gradients = backward(call, kept, grad, needs, results)
        dweights = None
        if needs.weights:
            # From the slots' order to that of tokens.
            dweights = gradients.weights[routing.place()].view_as(saved.weights)
            dweights = dweights.to(saved.weights.dtype)
        return (
            gradients.x.to(grad.dtype) if needs.x else None,
            dweights,
            gradients.up_a if needs.up_a else None,
            gradients.up_b if needs.up_b else None,
            gradients.down_a if needs.down_a else None,
            gradients.down_b if needs.down_b else None,
            None,
            None,
        )


class _Saved(NamedTuple):
    """The tensors that autograd saves, in their order."""

    x: Tensor | None
    gate_up: Tensor
    s: Tensor | None
    weights: Tensor
    order: Tensor
    offsets: Tensor
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    up_recipe: Tensor | None
    down_recipe: Tensor | None
    up_weight: Tensor | None
    down_weight: Tensor | None


def _bytes_of(stack: FrozenStack) -> Tensor:
    """A stack's weight, or a packed one's data."""
    return stack.weight if isinstance(stack.weight, Tensor) else stack.weight.data


def _needs(ctx: _MLPContext) -> Needs:
    return Needs(*ctx.needs_input_grad[: len(Needs._fields)])


def _call_of(
    gate: Gate,
    up: ExpertStack,
    down: ExpertStack,
    masks: _Recipes,
    routing: Routing,
    dtype: torch.dtype,
) -> MLPCall:
    return MLPCall(
        gate,
        up,
        down,
        masks.up,
        masks.down,
        routing,
        routing.tokens(),
        routing.weights_in_order(),
        dtype,
    )


def _mask_again(recipe: Tensor | None, routing: Routing, stack: ExpertStack) -> Tensor | None:
    shape = (routing.slots, stack.in_features)
    return drawn_again(recipe, shape, stack.frozen.dropout_p)


def _forward(call: MLPCall, x: Tensor, saves: bool) -> tuple[Tensor, Kept]:
    forward = forward_by_blocks if _is_by_blocks(x) else forward_together
    return forward(call, x, saves)


def _allocate_gradients(call: MLPCall, grad: Tensor, needs: Needs) -> MLPGradients:
    """Zeros, which are the gradients of tokens, slots and experts without rows here."""
    dtype = sum_dtype(grad.dtype)
    up = call.up
    down = call.down
    return MLPGradients(
        grad.new_zeros(grad.shape[0] if needs.x else 0, up.in_features, dtype=dtype),
        grad.new_zeros(call.routing.slots if needs.weights else 0, dtype=dtype),
        up.lora_A.new_zeros(up.lora_A.shape if needs.up_a else 0),
        up.lora_B.new_zeros(up.lora_B.shape if needs.up_b else 0),
        down.lora_A.new_zeros(down.lora_A.shape if needs.down_a else 0),
        down.lora_B.new_zeros(down.lora_B.shape if needs.down_b else 0),
    )


def lora_experts_mlp_op(
    x: Tensor, routing: Routing, gate: Gate, up: ExpertStack, down: ExpertStack
) -> Tensor:
    """Y [T, N] of x [T, H], for checked arguments: ``down(w ∘ gate(up(x)))``, summed over each
    token's slots, in x's dtype.

    A slot of no expert here adds nothing, and its routing weight's gradient is zero.
    """
    up, of_up = _drawn(x, routing, up)
    down, of_down = _drawn(x, routing, down)
    masks = _Recipes(of_up.mask, of_down.mask)
    inputs = (x, routing.weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B)
    # Autocast would cast what the gate computes, which backward repeats outside of it.
    with without_autocast(x):
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            with torch.no_grad():
                call = _call_of(gate, up, down, masks, routing, x.dtype)
            recipes = _Recipes(of_up.recipe, of_down.recipe)
            y: Tensor = _LoRAExpertsMLP.apply(*inputs, call, recipes)  # type: ignore[no-untyped-call]
            return y
        return _forward(_call_of(gate, up, down, masks, routing, x.dtype), x, saves=False)[0]
