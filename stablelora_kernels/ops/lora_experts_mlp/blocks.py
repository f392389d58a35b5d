"""A module of experts computed a block of experts at a time, without autograd: on a CPU.

A block is one expert, or several with few rows. Only G and up's S have the size of all slots. A
token's sums are in the order of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import mask_of_rows, masked
from stablelora_kernels.ops.formulas import Wanted, gradients_of, project
from stablelora_kernels.ops.lora_experts.autograd import ExpertRows, experts_with_rows, thin_product
from stablelora_kernels.ops.lora_experts_mlp.call import (
    ExpertStack,
    Kept,
    MLPCall,
    MLPGradients,
    Needs,
    sum_dtype,
)
from stablelora_kernels.projection import Projection

# In so many runs of experts is B copied, one after another.
_RUNS = 4
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


class _Pair(NamedTuple):
    """The gradients of A and B of all experts."""

    a: Tensor
    b: Tensor


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Stack:
    """A stack as its experts' products read it, in their dtype."""

    def __init__(self, stack: ExpertStack, mask: Tensor | None, dtype: torch.dtype) -> None:
        self._stack = stack
        self._mask = mask
        self._dtype = dtype
        # PEFT packs B with the expert fastest, and a product cannot read that order. A copy of all
        # is as large as the gradient; one expert's alone would read all of B.
        self._run_length = -(-stack.lora_B.shape[0] // _RUNS)
        self._run = -1
        self._copied = stack.lora_B

    def outputs(self, block: _Block, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Y and S of a block's rows ``x``."""
        ys: list[Tensor] = []
        every_s: list[Tensor] = []
        for expert in block.experts:
            p = self._projection(expert.place, has_bias=has_bias)
            y, s = project(x[block.rows_of(expert)], p, self._mask_of(expert))
            ys.append(y)
            every_s.append(s)
        return _joined(ys), _joined(every_s)

    def thin_products(self, block: _Block, x: Tensor) -> Tensor:
        """S of a block's rows ``x``."""
        every_s = []
        for expert in block.experts:
            rows = masked(x[block.rows_of(expert)], self._mask_of(expert))
            every_s.append(thin_product(rows, self._lora_A(expert.place)))
        return _joined(every_s)

    def gradients(
        self,
        block: _Block,
        x: Tensor | None,
        grad: Tensor,
        s: Tensor | None,
        wanted: Wanted,
        pair: _Pair,
    ) -> Tensor | None:
        """dX of a block's rows for dY, None if it is not wanted. dA and dB are stored in ``pair``."""
        dxs: list[Tensor] = []
        for expert in block.experts:
            rows = block.rows_of(expert)
            gradients = gradients_of(
                None if x is None else x[rows],
                grad[rows],
                self._projection(expert.place, has_weight=wanted.x),
                None if s is None else s[rows],
                self._mask_of(expert),
                pair.a.dtype,
                wanted,
            )
            if gradients.da is not None:
                pair.a[expert.place] = gradients.da
            if gradients.db is not None:
                pair.b[expert.place] = gradients.db
            if gradients.dx is not None:
                dxs.append(gradients.dx)
        return _joined(dxs) if dxs else None

    def _projection(
        self, place: int, has_bias: bool = False, has_weight: bool = True
    ) -> Projection:
        """The projection of the expert at a place of the stack, with what is read of it."""
        frozen = self._stack.frozen
        bias = frozen.expert_bias(place, self._dtype) if has_bias else None
        weight = frozen.expert(place, self._dtype) if has_weight else None
        lora_A = self._lora_A(place)
        return Projection(weight, bias, lora_A, self._lora_B(place), frozen.scaling)

    def _lora_A(self, place: int) -> Tensor:
        return self._stack.lora_A[place].to(self._dtype)

    def _lora_B(self, place: int) -> Tensor:
        run, place_in_run = divmod(place, self._run_length)
        if run != self._run:
            experts = slice(run * self._run_length, (run + 1) * self._run_length)
            self._copied = _by_expert(self._stack.lora_B[experts], self._dtype)
            self._run = run
        return self._copied[place_in_run]

    def _mask_of(self, expert: ExpertRows) -> Tensor | None:
        rows = slice(expert.start, expert.end)
        return mask_of_rows(self._mask, rows, self._stack.in_features)


def _by_expert(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """B [experts, N, r] in ``dtype``, expert by expert in memory."""
    if lora_B.stride(0) != 1:
        return lora_B.to(dtype).contiguous()
    # PyTorch copies rows, and transposes a matrix, several times as fast as it permutes.
    count, out_features, rank = lora_B.shape
    rows = lora_B.permute(1, 2, 0).to(dtype, memory_format=torch.contiguous_format)
    by_expert = rows.view(out_features * rank, count).t().contiguous()
    return by_expert.view(count, out_features, rank)


def forward_by_blocks(call: MLPCall, x: Tensor, saves: bool) -> tuple[Tensor, Kept]:
    """Y [T, N] of x [T, H], and what backward reads; with ``saves``, not empty."""
    up = _Stack(call.up, call.up_mask, call.dtype)
    down = _Stack(call.down, call.down_mask, call.dtype)
    y = x.new_zeros(x.shape[0], call.down.out_features, dtype=sum_dtype(x.dtype))
    slots = call.routing.slots if saves else 0
    every_gate_up = x.new_empty(slots, call.up.out_features)
    every_s = x.new_empty(slots, call.up.rank)
    for block in _blocks(call.routing.offsets):
        rows = block.rows
        tokens = call.tokens[rows]
        gate_up, s = up.outputs(block, x[tokens], has_bias=True)
        if saves:
            every_gate_up[rows] = gate_up
            every_s[rows] = s
        z = call.weighted(call.hidden(gate_up), rows)
        outputs, _ = down.outputs(block, z, has_bias=False)
        outputs = outputs.to(y.dtype)
        _add_weighted_bias(call, block, outputs)
        y.index_add_(0, tokens, outputs)
    return y.to(x.dtype), Kept(x, every_gate_up, every_s)


def _add_weighted_bias(call: MLPCall, block: _Block, outputs: Tensor) -> None:
    """Add ``w bias`` of down to the outputs of a block."""
    for expert in block.experts:
        bias = call.down.frozen.expert_bias(expert.place, outputs.dtype)
        if bias is not None:
            weights = call.weights[expert.start : expert.end].to(outputs.dtype)
            outputs[block.rows_of(expert)].addr_(weights, bias)


def backward_by_blocks(
    call: MLPCall, kept: Kept, grad: Tensor, needs: Needs, results: MLPGradients
) -> MLPGradients:
    """The wanted gradients for dY [T, N], written into ``results``, which are zeros."""
    up = _Stack(call.up, call.up_mask, grad.dtype)
    down = _Stack(call.down, call.down_mask, grad.dtype)
    of_up = _Pair(results.up_a, results.up_b)
    of_down = _Pair(results.down_a, results.down_b)
    for block in _blocks(call.routing.offsets):
        rows = block.rows
        tokens = call.tokens[rows]
        dy = grad[tokens]
        gate_up, h = call.hidden_again(kept.gate_up[rows])
        z = call.weighted(h.detach(), rows) if needs.z else None
        s = down.thin_products(block, z) if z is not None and needs.down_b else None
        dz = down.gradients(block, z, dy, s, needs.of_down, of_down)
        if dz is None:
            continue
        if needs.weights:
            bias = _bias_of_rows(call, block)
            results.weights[rows] = weight_gradients(dz, h.detach(), dy, bias)
        if not needs.gate_up:
            continue
        (dgate_up,) = torch.autograd.grad(h, gate_up, call.weighted(dz, rows))
        x = None if kept.x is None else kept.x[tokens]
        s = None if kept.s is None else kept.s[rows]
        dx = up.gradients(block, x, dgate_up, s, needs.of_up, of_up)
        if dx is not None:
            results.x.index_add_(0, tokens, dx.to(results.x.dtype))
    return results


def _bias_of_rows(call: MLPCall, block: _Block) -> Tensor | None:
    """Down's bias for each row of a block."""
    frozen = call.down.frozen
    if frozen.bias is None:
        return None
    biases = []
    for expert in block.experts:
        bias = frozen.expert_bias(expert.place, call.dtype)
        assert bias is not None
        biases.append(bias.expand(expert.end - expert.start, -1))
    return _joined(biases)


def weight_gradients(dz: Tensor, h: Tensor, dy: Tensor, bias: Tensor | None) -> Tensor:
    """Those of rows' routing weights: Σ dZ ∘ H + Σ dY ∘ bias, [rows]."""
    dtype = sum_dtype(dz.dtype)
    gradients = (dz * h).sum(-1, dtype=dtype)
    return gradients if bias is None else gradients.add_((dy * bias).sum(-1, dtype=dtype))
