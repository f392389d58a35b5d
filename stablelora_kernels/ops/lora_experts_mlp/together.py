"""A module of experts with all experts computed together, without autograd: everywhere but on a
CPU.

The products are the ops of ``lora_experts``, which read the offsets where they are. A token's sums
are over its slots, which a gather brings side by side: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.ops.lora_experts.autograd import (
    experts_thin_product,
    lora_experts_bwd,
    lora_experts_fwd,
)
from stablelora_kernels.ops.lora_experts.call import ExpertsBackward, ExpertsForward
from stablelora_kernels.ops.lora_experts.grouped import unused_rows
from stablelora_kernels.ops.lora_experts_mlp.blocks import weight_gradients
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertStack,
    Kept,
    MLPCall,
    MLPGradients,
    Needs,
    Routing,
    sum_dtype,
)
from stablelora_kernels.utils.tensors import cast

_ALL = slice(None)


def forward_together(call: MLPCall, x: Tensor, saves: bool) -> tuple[Tensor, Kept]:
    """Y [T, N] of x [T, H], and what backward reads; with ``saves``, not empty."""
    offsets = call.routing.offsets
    bias = cast(call.up.frozen.bias, x.dtype)
    of_up = _forward_of(call.up, x[call.tokens], bias, offsets, call.up_mask, saves)
    gate_up, s = lora_experts_fwd(*of_up)
    z = call.weighted(call.hidden(gate_up), _ALL)
    of_down = _forward_of(call.down, z, None, offsets, call.down_mask, False)
    outputs, _ = lora_experts_fwd(*of_down)
    bias_of_slots = _bias_of_slots(call)
    if bias_of_slots is not None:
        outputs = outputs.addcmul(bias_of_slots, call.weights[:, None].to(outputs.dtype))
    return _sum_of_slots(call.routing, outputs).to(x.dtype), Kept(x, gate_up, s)


def backward_together(
    call: MLPCall, kept: Kept, grad: Tensor, needs: Needs, results: MLPGradients
) -> MLPGradients:
    """The wanted gradients for dY [T, N]; ``results`` stand for those that are not wanted."""
    offsets = call.routing.offsets
    dy = grad[call.tokens]
    gate_up, h = call.hidden_again(kept.gate_up)
    z = call.weighted(h.detach(), _ALL) if needs.z else None
    s = dy.new_empty(0, call.down.rank)
    if needs.down_b:
        assert z is not None
        s = experts_thin_product(_forward_of(call.down, z, None, offsets, call.down_mask, True))
    of_down = _backward_of(call.down, z, dy, s, offsets, call.down_mask, needs.of_down)
    dz, da, db = lora_experts_bwd(*of_down)
    results = results._replace(down_a=da, down_b=db)
    if needs.weights:
        weights = weight_gradients(dz, h.detach(), dy, _bias_of_slots(call))
        results = results._replace(weights=weights)
    if not needs.gate_up:
        return results
    (dgate_up,) = torch.autograd.grad(h, gate_up, call.weighted(dz, _ALL))
    x = None if kept.x is None else kept.x[call.tokens]
    s = dy.new_empty(0, call.up.rank) if kept.s is None else kept.s
    of_up = _backward_of(call.up, x, dgate_up, s, offsets, call.up_mask, needs.of_up)
    dx, da, db = lora_experts_bwd(*of_up)
    results = results._replace(up_a=da, up_b=db)
    return results._replace(x=_sum_of_slots(call.routing, dx)) if needs.x else results


def _forward_of(
    stack: ExpertStack,
    x: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    mask: Tensor | None,
    save_s: bool,
) -> ExpertsForward:
    stored = stack.frozen.stored(x.dtype)
    return ExpertsForward(
        x,
        stored.data,
        bias,
        stack.lora_A,
        stack.lora_B,
        offsets,
        mask,
        stored.scales,
        stored.layout,
        stack.frozen.scaling,
        stack.frozen.transposed,
        save_s,
    )


def _backward_of(
    stack: ExpertStack,
    x: Tensor | None,
    grad: Tensor,
    s: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    wanted: Wanted,
) -> ExpertsBackward:
    stored = stack.frozen.stored(grad.dtype)
    return ExpertsBackward(
        x,
        grad,
        stored.data,
        stack.lora_A,
        stack.lora_B,
        s,
        offsets,
        mask,
        stored.scales,
        stored.layout,
        stack.frozen.scaling,
        stack.frozen.transposed,
        *wanted,
    )


def _bias_of_slots(call: MLPCall) -> Tensor | None:
    """Down's bias for each slot; zeros for slots of no expert here."""
    bias = cast(call.down.frozen.bias, call.dtype)
    if bias is None:
        return None
    offsets = call.routing.offsets
    slots = call.routing.slots
    numbers = torch.arange(slots, device=offsets.device, dtype=offsets.dtype)
    expert_of_slot = torch.searchsorted(offsets, numbers, right=True).clamp_(max=len(bias) - 1)
    return bias[expert_of_slot].masked_fill_(unused_rows(offsets, slots), 0)


def _sum_of_slots(routing: Routing, rows: Tensor) -> Tensor:
    """The sum of each token's rows, [T, N], in the dtype of sums."""
    tokens, top_k = routing.weights.shape
    by_token = rows[routing.place()].view(tokens, top_k, rows.shape[1])
    return by_token.sum(1, dtype=sum_dtype(rows.dtype))
