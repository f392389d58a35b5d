"""``lora_experts`` an expert after another, each as a projection of its own rows. It reads the
offsets on the host.

A packed stack is dequantized one expert at a time, and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import mask_of_rows
from stablelora_kernels.ops.formulas import Gradients, Wanted, gradients_of, project, thin_product
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackwardCall,
    ExpertsForwardCall,
    ExpertStack,
)
from stablelora_kernels.projection import Projection
from stablelora_kernels.utils.tensors import cast

# In so many runs of experts are A and B cast and copied, one after another; but in one run if B
# takes no more bytes than these.
_RUNS = 4
_BYTES_OF_A_RUN = 1 << 20


class ExpertRows(NamedTuple):
    """The rows of the expert at a place of the stack: the first, and the one behind the last."""

    place: int
    start: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


def experts_with_rows(offsets: Tensor) -> Iterator[ExpertRows]:
    start = 0
    for place, end in enumerate(offsets.tolist()):
        if end > start:
            yield ExpertRows(place, start, end)
            start = end


class ExpertByExpert:
    """A stack as the products of one expert after another read it, in their dtype."""

    def __init__(self, stack: ExpertStack, dtype: torch.dtype) -> None:
        self._stack = stack
        self._dtype = dtype
        # PEFT packs B with the expert fastest, and a product cannot read that order. A copy of all
        # is as large as the gradient; one expert's alone would read all of B.
        lora_B = stack.lora_B
        of_expert = max(1, lora_B.shape[1] * lora_B.shape[2] * lora_B.itemsize)
        self._run_length = max(-(-lora_B.shape[0] // _RUNS), _BYTES_OF_A_RUN // of_expert)
        self._run = -1
        self._lora_A = stack.lora_A
        self._lora_B = lora_B

    def project(self, expert: ExpertRows, x: Tensor) -> tuple[Tensor, Tensor]:
        """Y and S of an expert's rows ``x``."""
        return project(x, self._projection(expert.place, True), self._mask_of(expert))

    def thin_product(self, expert: ExpertRows, x: Tensor) -> Tensor:
        """S of an expert's rows ``x``."""
        return thin_product(x, self._projection(expert.place, False), self._mask_of(expert))

    def gradients(
        self, expert: ExpertRows, x: Tensor | None, grad: Tensor, s: Tensor | None, wanted: Wanted
    ) -> Gradients:
        """The wanted gradients for an expert's rows dY."""
        return gradients_of(
            x,
            grad,
            self._projection(expert.place, wanted.x),
            s,
            self._mask_of(expert),
            self._stack.lora_A.dtype,
            wanted,
        )

    def _projection(self, place: int, reads_weight: bool) -> Projection:
        """The projection of the expert at a place of the stack."""
        weight = self._weight(place) if reads_weight else None
        bias = self._stack.bias
        if bias is not None:
            bias = cast(bias[place], self._dtype)
        lora_A, lora_B = self._pair_of(place)
        return Projection(weight, bias, lora_A, lora_B, self._stack.scaling)

    def _weight(self, place: int) -> Tensor:
        """W [N, K] of the expert at a place of the stack. Only here is one read."""
        weight = self._stack.weight
        assert weight is not None
        matrix = weight[place] if isinstance(weight, Tensor) else weight.expert(place, self._dtype)
        matrix = cast(matrix, self._dtype)
        return matrix.t() if self._stack.transposed else matrix

    def _pair_of(self, place: int) -> tuple[Tensor, Tensor]:
        """A and B of the expert at a place of the stack."""
        run, place_in_run = divmod(place, self._run_length)
        if run != self._run:
            experts = slice(run * self._run_length, (run + 1) * self._run_length)
            self._lora_A = cast(self._stack.lora_A[experts], self._dtype)
            self._lora_B = _by_expert(self._stack.lora_B[experts], self._dtype)
            self._run = run
        return self._lora_A[place_in_run], self._lora_B[place_in_run]

    def _mask_of(self, expert: ExpertRows) -> Tensor | None:
        keep = self._stack.keep
        return None if keep is None else mask_of_rows(keep, expert.rows, self._stack.in_features)


def _by_expert(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """B [experts, N, r] in ``dtype``, expert by expert in memory."""
    if lora_B.stride(0) != 1:
        return lora_B.to(dtype).contiguous()
    # PyTorch copies rows, and transposes a matrix, several times as fast as it permutes.
    count, out_features, rank = lora_B.shape
    rows = lora_B.permute(1, 2, 0).to(dtype, memory_format=torch.contiguous_format)
    by_expert = rows.view(out_features * rank, count).t().contiguous()
    return by_expert.view(count, out_features, rank)


def loop_forward(call: ExpertsForwardCall) -> tuple[Tensor, Tensor]:
    """Y and S; zeros in rows of no expert."""
    stack = ExpertByExpert(call.stack, call.x.dtype)
    count = call.x.shape[0]
    y = call.x.new_empty(count, call.stack.out_features)
    every_s = call.x.new_empty(count if call.save_s else 0, call.stack.rank)
    end = 0
    for expert in experts_with_rows(call.offsets):
        rows = expert.rows
        y[rows], s = stack.project(expert, call.x[rows])
        if call.save_s:
            every_s[rows] = s
        end = expert.end
    y[end:] = 0
    every_s[end:] = 0
    return y, every_s


def loop_thin_product(call: ExpertsForwardCall) -> Tensor:
    """S alone."""
    stack = ExpertByExpert(call.stack, call.x.dtype)
    s = call.x.new_zeros(call.x.shape[0], call.stack.rank)
    for expert in experts_with_rows(call.offsets):
        s[expert.rows] = stack.thin_product(expert, call.x[expert.rows])
    return s


def loop_backward(call: ExpertsBackwardCall) -> Gradients:
    """The wanted gradients; zeros of rows of no expert and of experts without rows."""
    stack = ExpertByExpert(call.stack, call.grad.dtype)
    results = zero_gradients(call.stack, call.wanted)
    if call.wanted.x:
        dx = call.grad.new_empty(call.grad.shape[0], call.stack.in_features)
        results = results._replace(dx=dx)
    end = 0
    for expert in experts_with_rows(call.offsets):
        rows = expert.rows
        gradients = stack.gradients(
            expert,
            None if call.x is None else call.x[rows],
            call.grad[rows],
            None if call.s is None else call.s[rows],
            call.wanted,
        )
        if results.dx is not None and gradients.dx is not None:
            results.dx[rows] = gradients.dx
        store_pair(results, expert, gradients)
        end = expert.end
    if results.dx is not None:
        results.dx[end:] = 0
    return results


def zero_gradients(stack: ExpertStack, wanted: Wanted) -> Gradients:
    """Those of A and B, as :func:`store_pair` fills them."""
    return Gradients(
        None,
        stack.lora_A.new_zeros(stack.lora_A.shape) if wanted.a else None,
        stack.lora_B.new_zeros(stack.lora_B.shape) if wanted.b else None,
    )


def store_pair(results: Gradients, expert: ExpertRows, gradients: Gradients) -> None:
    """Store one expert's gradients of A and B in those of all."""
    if results.da is not None and gradients.da is not None:
        results.da[expert.place] = gradients.da
    if results.db is not None and gradients.db is not None:
        results.db[expert.place] = gradients.db
