"""A module of experts with all experts computed together, without autograd: everywhere but on a
CPU.

The products are those of ``lora_experts``, which read the offsets where they are. A token's sums
are over its slots, which a gather brings side by side: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Gradients
from stablelora_kernels.ops.lora_experts.autograd import (
    experts_backward,
    experts_forward,
    experts_thin_product,
)
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackwardCall,
    ExpertsForwardCall,
    ExpertStack,
)
from stablelora_kernels.ops.lora_experts.grouped import rows_of_experts, unused_rows
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertsMLPBackwardCall,
    ExpertsMLPForwardCall,
    ExpertsMLPForwardResults,
    ExpertsMLPGradients,
    Routing,
    hidden,
    hidden_again,
    sum_dtype,
    weight_gradients,
    weighted,
)
from stablelora_kernels.utils.tensors import cast


def together_forward(call: ExpertsMLPForwardCall) -> ExpertsMLPForwardResults:
    """Y and what backward needs."""
    routing = call.routing
    dtype = call.x.dtype
    up = _in_dtype(call.up, dtype)
    down = _in_dtype(call.down, dtype)
    weights = routing.weights_in_order()
    x = call.x[routing.tokens()]
    gate_up, s = experts_forward(ExpertsForwardCall(x, up, routing.offsets, call.save))
    z = weighted(hidden(call.gate, gate_up), weights)
    # Its bias is added with the routing weights.
    of_down = ExpertsForwardCall(z, down._replace(bias=None), routing.offsets, save_s=False)
    outputs, _ = experts_forward(of_down)
    bias = _bias_of_slots(down, routing)
    if bias is not None:
        outputs = outputs.addcmul(bias, weights[:, None].to(dtype))
    return ExpertsMLPForwardResults(_sum_of_slots(routing, outputs).to(dtype), gate_up, s)


def together_backward(call: ExpertsMLPBackwardCall) -> ExpertsMLPGradients:
    """The wanted gradients; zeros of slots of no expert and of experts without rows."""
    routing = call.routing
    wanted = call.wanted
    up = _in_dtype(call.up, call.grad.dtype)
    down = _in_dtype(call.down, call.grad.dtype)
    tokens = routing.tokens()
    weights = routing.weights_in_order()
    dy = call.grad[tokens]
    g = call.gate_up
    s_up = call.s
    if g is None:
        assert call.x is not None
        rows = call.x[tokens]
        g, s_up = experts_forward(ExpertsForwardCall(rows, up, routing.offsets, wanted.up.b))
    gate_up, h = hidden_again(call.gate, g)
    z = weighted(h.detach(), weights) if wanted.down.a or wanted.down.b else None
    s = None
    if wanted.down.b:
        assert z is not None
        s = experts_thin_product(ExpertsForwardCall(z, down, routing.offsets, save_s=True))
    of_down = experts_backward(ExpertsBackwardCall(z, dy, down, routing.offsets, s, wanted.down))
    of_weights = None
    of_up = Gradients(None, None, None)
    if wanted.weights:
        assert of_down.dx is not None
        bias = _bias_of_slots(down, routing)
        of_weights = weight_gradients(of_down.dx, h.detach(), dy, bias)
    if True in wanted.up:
        assert of_down.dx is not None
        (dgate_up,) = torch.autograd.grad(h, gate_up, weighted(of_down.dx, weights))
        # Not before, since it is as large as all slots.
        rows_of_up = None if call.x is None else call.x[tokens]
        of_up = experts_backward(
            ExpertsBackwardCall(rows_of_up, dgate_up, up, routing.offsets, s_up, wanted.up)
        )
        if of_up.dx is not None:
            of_up = of_up._replace(dx=_sum_of_slots(routing, of_up.dx))
    return ExpertsMLPGradients(of_weights, of_up, of_down)


def _in_dtype(stack: ExpertStack, dtype: torch.dtype) -> ExpertStack:
    """``stack`` with weights, unless they are packed, and biases in ``dtype``."""
    return stack._replace(weight=cast(stack.weight, dtype), bias=cast(stack.bias, dtype))


def _bias_of_slots(stack: ExpertStack, routing: Routing) -> Tensor | None:
    """The bias for each slot; zeros for slots of no expert here."""
    if stack.bias is None:
        return None
    bias = rows_of_experts(stack.bias, routing.offsets, routing.slots)
    return bias.masked_fill_(unused_rows(routing.offsets, routing.slots), 0)


def _sum_of_slots(routing: Routing, rows: Tensor) -> Tensor:
    """The sum of each token's rows, [T, N], in the dtype of sums."""
    tokens, top_k = routing.weights.shape
    by_token = rows[routing.place()].view(tokens, top_k, rows.shape[1])
    return by_token.sum(1, dtype=sum_dtype(rows.dtype))
