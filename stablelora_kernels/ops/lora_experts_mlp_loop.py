"""A module of experts computed one expert at a time, without autograd: on a CPU.

Only G and up's S have the size of all slots. A token's sums are in the order of the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import mask_of_rows, masked
from stablelora_kernels.ops.formulas import Gradients, Wanted, torch_bwd, torch_fwd
from stablelora_kernels.ops.lora_experts import ExpertRows, experts_with_rows, thin_product
from stablelora_kernels.ops.lora_experts_mlp_call import (
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


class _Stack:
    """A stack as one expert's products read it, in their dtype."""

    def __init__(self, stack: ExpertStack, mask: Tensor | None, dtype: torch.dtype) -> None:
        self._stack = stack
        self._mask = mask
        self._dtype = dtype
        # PEFT packs B with the expert fastest, and a product cannot read that order. A copy of all
        # is as large as the gradient; one expert's alone would read all of B.
        self._run_length = -(-stack.lora_B.shape[0] // _RUNS)
        self._run = -1
        self._copied = stack.lora_B

    def projection(self, place: int, has_bias: bool) -> Projection:
        """The projection of the expert at a place of the stack."""
        frozen = self._stack.frozen
        bias = frozen.expert_bias(place, self._dtype) if has_bias else None
        weight = frozen.expert(place, self._dtype)
        lora_A = self.lora_A(place)
        return Projection(weight, bias, lora_A, self._lora_B(place), frozen.scaling)

    def lora_A(self, place: int) -> Tensor:
        """A of the expert at a place of the stack."""
        return self._stack.lora_A[place].to(self._dtype)

    def _lora_B(self, place: int) -> Tensor:
        run, place_in_run = divmod(place, self._run_length)
        if run != self._run:
            experts = slice(run * self._run_length, (run + 1) * self._run_length)
            self._copied = self._stack.lora_B[experts].to(self._dtype).contiguous()
            self._run = run
        return self._copied[place_in_run]

    def mask_of(self, rows: slice) -> Tensor | None:
        return mask_of_rows(self._mask, rows, self._stack.in_features)


def forward_by_expert(call: MLPCall, x: Tensor, saves: bool) -> tuple[Tensor, Kept]:
    """Y [T, N] of x [T, H], and what backward reads; with ``saves``, not empty."""
    up = _Stack(call.up, call.up_mask, call.dtype)
    down = _Stack(call.down, call.down_mask, call.dtype)
    y = x.new_zeros(x.shape[0], call.down.out_features, dtype=sum_dtype(x.dtype))
    slots = call.routing.slots if saves else 0
    every_gate_up = x.new_empty(slots, call.up.out_features)
    every_s = x.new_empty(slots, call.up.rank)
    for expert in experts_with_rows(call.routing.offsets):
        rows = slice(expert.start, expert.end)
        tokens = call.tokens[rows]
        gate_up, s = _project(
            x[tokens], up.projection(expert.place, has_bias=True), up.mask_of(rows)
        )
        if saves:
            every_gate_up[rows] = gate_up
            every_s[rows] = s
        z = call.weighted(call.hidden(gate_up), rows)
        outputs, _ = _project(z, down.projection(expert.place, has_bias=False), down.mask_of(rows))
        outputs = outputs.to(y.dtype)
        bias = call.down.frozen.expert_bias(expert.place, y.dtype)
        if bias is not None:
            outputs.addr_(call.weights[rows].to(y.dtype), bias)
        y.index_add_(0, tokens, outputs)
    return y.to(x.dtype), Kept(x, every_gate_up, every_s)


def backward_by_expert(
    call: MLPCall, kept: Kept, grad: Tensor, needs: Needs, results: MLPGradients
) -> MLPGradients:
    """The wanted gradients for dY [T, N], written into ``results``, which are zeros."""
    up = _Stack(call.up, call.up_mask, grad.dtype)
    down = _Stack(call.down, call.down_mask, grad.dtype)
    for expert in experts_with_rows(call.routing.offsets):
        rows = slice(expert.start, expert.end)
        tokens = call.tokens[rows]
        gate_up, h = call.hidden_again(kept.gate_up[rows])
        dz = _backward_of_down(call, down, expert, h.detach(), grad[tokens], needs, results)
        if dz is None or not needs.gate_up:
            continue
        (dgate_up,) = torch.autograd.grad(h, gate_up, call.weighted(dz, rows))
        x = None if kept.x is None else kept.x[tokens]
        s = None if kept.s is None else kept.s[rows]
        of_up = _gradients(
            x,
            dgate_up,
            up.projection(expert.place, has_bias=False),
            s,
            up.mask_of(rows),
            results.up_a.dtype,
            needs.of_up,
        )
        _store(of_up, expert.place, results.up_a, results.up_b)
        if of_up.dx is not None:
            results.x.index_add_(0, tokens, of_up.dx.to(results.x.dtype))
    return results


def _backward_of_down(
    call: MLPCall,
    down: _Stack,
    expert: ExpertRows,
    h: Tensor,
    dy: Tensor,
    needs: Needs,
    results: MLPGradients,
) -> Tensor | None:
    """dZ of one expert, None if it is not wanted. The gradients of down's A and B and of the
    routing weights are written into ``results``.
    """
    rows = slice(expert.start, expert.end)
    mask = down.mask_of(rows)
    z = call.weighted(h, rows) if needs.z else None
    s = None
    if z is not None and needs.down_b:
        s = thin_product(masked(z, mask), down.lora_A(expert.place))
    of_down = _gradients(
        z,
        dy,
        down.projection(expert.place, has_bias=False),
        s,
        mask,
        results.down_a.dtype,
        needs.of_down,
    )
    _store(of_down, expert.place, results.down_a, results.down_b)
    dz = of_down.dx
    if dz is not None and needs.weights:
        bias = call.down.frozen.expert_bias(expert.place, dy.dtype)
        results.weights[rows] = weight_gradients(dz, h, dy, bias)
    return dz


def weight_gradients(dz: Tensor, h: Tensor, dy: Tensor, bias: Tensor | None) -> Tensor:
    """Those of rows' routing weights: Σ dZ ∘ H + Σ dY ∘ bias, [rows]."""
    dtype = sum_dtype(dz.dtype)
    gradients = (dz * h).sum(-1, dtype=dtype)
    return gradients if bias is None else gradients.add_((dy * bias).sum(-1, dtype=dtype))


def _project(x: Tensor, p: Projection, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Y and S of one expert."""
    outputs, every_s = torch_fwd(x, [p], [mask])
    return outputs[0], every_s[0]


def _gradients(
    x: Tensor | None,
    grad: Tensor,
    p: Projection,
    s: Tensor | None,
    mask: Tensor | None,
    lora_dtype: torch.dtype,
    wanted: Wanted,
) -> Gradients:
    """Those of one expert's projection."""
    return torch_bwd(x, [grad], [p], [s], [mask], lora_dtype, wanted)


def _store(gradients: Gradients, place: int, da: Tensor, db: Tensor) -> None:
    """Store an expert's gradients of A and B, those that are there, among those of all experts."""
    if gradients.das:
        da[place] = gradients.das[0]
    if gradients.dbs:
        db[place] = gradients.dbs[0]
