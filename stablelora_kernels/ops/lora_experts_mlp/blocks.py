"""A module of experts computed a block of experts at a time, without autograd: on a CPU.

A block is one expert, or several with few rows. Only G and up's S have the size of all slots. A
token's sums are in the order of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Gradients, Wanted
from stablelora_kernels.ops.lora_experts.loop import (
    ExpertByExpert,
    ExpertRows,
    experts_with_rows,
    store_pair,
    zero_gradients,
)
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertsMLPBackwardCall,
    ExpertsMLPForwardCall,
    ExpertsMLPForwardResults,
    ExpertsMLPGradients,
    hidden,
    hidden_again,
    sum_dtype,
    weight_gradients,
    weighted,
)
from stablelora_kernels.utils.tensors import cast

# Most rows of a block of several experts: their products take longer than the Python around them.
_ROWS_OF_BLOCK = 64


class _Block(NamedTuple):
    """Experts whose rows are next to each other."""

    experts: list[ExpertRows]

    @property
    def rows(self) -> slice:
        """Those of all."""
        return slice(self.experts[0].start, self.experts[-1].end)

    def rows_of(self, expert: ExpertRows) -> slice:
        """Those of one of its experts, among the block's."""
        first = self.experts[0].start
        return slice(expert.start - first, expert.end - first)


def _blocks(offsets: Tensor) -> Iterator[_Block]:
    """Blocks of all experts with rows, in their order."""
    experts: list[ExpertRows] = []
    for expert in experts_with_rows(offsets):
        if experts and expert.end - experts[0].start > _ROWS_OF_BLOCK:
            yield _Block(experts)
            experts = []
        experts.append(expert)
    if experts:
        yield _Block(experts)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _outputs(stack: ExpertByExpert, block: _Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Y and S of a block's rows ``x``."""
    ys: list[Tensor] = []
    every_s: list[Tensor] = []
    for expert in block.experts:
        y, s = stack.project(expert, x[block.rows_of(expert)])
        ys.append(y)
        every_s.append(s)
    return _joined(ys), _joined(every_s)


def _gradients(
    stack: ExpertByExpert,
    block: _Block,
    x: Tensor | None,
    grad: Tensor,
    s: Tensor | None,
    wanted: Wanted,
    results: Gradients,
) -> Tensor | None:
    """dX of a block's rows for dY, None if it is not wanted. dA and dB are stored in ``results``."""
    dxs: list[Tensor] = []
    for expert in block.experts:
        rows = block.rows_of(expert)
        of_rows = (None if x is None else x[rows], grad[rows], None if s is None else s[rows])
        gradients = stack.gradients(expert, *of_rows, wanted)
        store_pair(results, expert, gradients)
        if gradients.dx is not None:
            dxs.append(gradients.dx)
    return _joined(dxs) if dxs else None


def blocks_forward(call: ExpertsMLPForwardCall) -> ExpertsMLPForwardResults:
    """Y and what backward needs."""
    x = call.x
    up = ExpertByExpert(call.up, x.dtype)
    # Its bias is added with the routing weights.
    down = ExpertByExpert(call.down._replace(bias=None), x.dtype)
    y = x.new_zeros(x.shape[0], call.down.out_features, dtype=sum_dtype(x.dtype))
    slots = call.routing.slots if call.save else 0
    every_gate_up = x.new_empty(slots, call.up.out_features)
    every_s = x.new_empty(slots, call.up.rank)
    tokens_of_slots = call.routing.tokens()
    weights_of_slots = call.routing.weights_in_order()
    for block in _blocks(call.routing.offsets):
        tokens = tokens_of_slots[block.rows]
        weights = weights_of_slots[block.rows]
        gate_up, s = _outputs(up, block, x[tokens])
        if call.save:
            every_gate_up[block.rows] = gate_up
            every_s[block.rows] = s
        z = weighted(hidden(call.gate, gate_up), weights)
        outputs = _outputs(down, block, z)[0].to(y.dtype)
        if call.down.bias is not None:
            for expert in block.experts:
                rows = block.rows_of(expert)
                bias = cast(call.down.bias[expert.place], y.dtype)
                outputs[rows].addr_(weights[rows].to(y.dtype), bias)
        y.index_add_(0, tokens, outputs)
    return ExpertsMLPForwardResults(y.to(x.dtype), every_gate_up, every_s)


def blocks_backward(call: ExpertsMLPBackwardCall) -> ExpertsMLPGradients:
    """The wanted gradients; zeros of slots of no expert and of experts without rows."""
    grad = call.grad
    wanted = call.wanted
    up = ExpertByExpert(call.up, grad.dtype)
    down = ExpertByExpert(call.down, grad.dtype)
    of_up = zero_gradients(call.up, wanted.up)
    of_down = zero_gradients(call.down, wanted.down)
    of_weights = None
    if wanted.weights:
        of_weights = grad.new_zeros(call.routing.slots, dtype=sum_dtype(grad.dtype))
    if wanted.up.x:
        sums = grad.new_zeros(grad.shape[0], call.up.in_features, dtype=sum_dtype(grad.dtype))
        of_up = of_up._replace(dx=sums)
    tokens_of_slots = call.routing.tokens()
    weights_of_slots = call.routing.weights_in_order()
    for block in _blocks(call.routing.offsets):
        rows = block.rows
        tokens = tokens_of_slots[rows]
        weights = weights_of_slots[rows]
        dy = grad[tokens]
        x = None if call.x is None else call.x[tokens]
        g = None if call.gate_up is None else call.gate_up[rows]
        s_up = None if call.s is None else call.s[rows]
        if g is None:
            assert x is not None
            g, s_up = _outputs(up, block, x)
        gate_up, h = hidden_again(call.gate, g)
        z = weighted(h.detach(), weights) if wanted.down.a or wanted.down.b else None
        s = None
        if wanted.down.b:
            assert z is not None
            s = _thin_products(down, block, z)
        dz = _gradients(down, block, z, dy, s, wanted.down, of_down)
        if dz is None:
            continue
        if of_weights is not None:
            bias = _bias_of_rows(call.down.bias, block, dy.dtype)
            of_weights[rows] = weight_gradients(dz, h.detach(), dy, bias)
        if True not in wanted.up:
            continue
        (dgate_up,) = torch.autograd.grad(h, gate_up, weighted(dz, weights))
        dx = _gradients(up, block, x, dgate_up, s_up, wanted.up, of_up)
        if dx is not None:
            assert of_up.dx is not None
            of_up.dx.index_add_(0, tokens, dx.to(of_up.dx.dtype))
    return ExpertsMLPGradients(of_weights, of_up, of_down)


def _thin_products(stack: ExpertByExpert, block: _Block, x: Tensor) -> Tensor:
    """S of a block's rows ``x``."""
    return _joined(
        [stack.thin_product(expert, x[block.rows_of(expert)]) for expert in block.experts]
    )


def _bias_of_rows(bias: Tensor | None, block: _Block, dtype: torch.dtype) -> Tensor | None:
    """The bias for each row of a block."""
    if bias is None:
        return None
    return _joined(
        [
            cast(bias[expert.place], dtype).expand(expert.end - expert.start, -1)
            for expert in block.experts
        ]
    )
