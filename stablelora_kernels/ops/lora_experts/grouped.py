"""``lora_experts`` by PyTorch's grouped product, on GPUs: all experts at once, with the offsets read
on the device.

A packed stack is dequantized in chunks of experts. If one chunk does not hold all of them, their
rows are looked up on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.dropout import masked
from stablelora_kernels.ops.formulas import Gradients
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackwardCall,
    ExpertsForwardCall,
    ExpertStack,
)
from stablelora_kernels.packed_experts import PackedExperts, chunks

# A grouped product takes rows that begin at multiples of so many bytes.
ALIGNMENT = 16
# So much of a packed stack is dequantized for a grouped product.
CHUNK_BYTES = 256 << 20


def can_group(x: Tensor, stack: ExpertStack) -> bool:
    """Whether PyTorch's grouped product takes x [T, K], or dY, and the stack."""
    if (
        not x.is_cuda
        or x.dtype != torch.bfloat16
        or torch.version.hip
        or not hasattr(torch, "_grouped_mm")
    ):
        return False
    aligned = x.data_ptr() % ALIGNMENT == 0 and x.stride(1) == 1
    sizes = (x.stride(0), stack.in_features, stack.out_features)
    even = all(n * x.element_size() % ALIGNMENT == 0 for n in sizes)
    weight = stack.weight
    # A packed stack is dequantized into memory of its own.
    readable = (
        weight is None
        or isinstance(weight, PackedExperts)
        or (weight.data_ptr() % ALIGNMENT == 0 and weight.is_contiguous())
    )
    return aligned and even and readable and torch.cuda.get_device_capability(x.device) >= (8, 0)


def grouped_forward(call: ExpertsForwardCall) -> tuple[Tensor, Tensor]:
    """Y and S; zeros in rows of no expert."""
    stack = call.stack
    multiply = _grouped_product(call.offsets)
    y = _stack_product(call, call.x, to_inputs=False)
    s = _thin_product(call)
    if stack.rank:
        lora_B = _padded(_lora_B(stack, call.x.dtype), 2)
        y.add_(multiply(s, lora_B.transpose(1, 2)), alpha=stack.scaling)
    unused = unused_rows(call.offsets, call.x.shape[0])
    if stack.bias is not None:
        y.add_(rows_of_experts(stack.bias, call.offsets, call.x.shape[0]))
    saved = s.new_empty(0, stack.rank)
    if call.save_s:
        saved = s[:, : stack.rank].masked_fill(unused, 0)
    return y.masked_fill_(unused, 0), saved


def grouped_thin_product(call: ExpertsForwardCall) -> Tensor:
    """S alone."""
    unused = unused_rows(call.offsets, call.x.shape[0])
    return _thin_product(call)[:, : call.stack.rank].masked_fill(unused, 0)


def grouped_backward(call: ExpertsBackwardCall) -> Gradients:
    """The wanted gradients; zeros of rows of no expert and of experts without rows."""
    stack = call.stack
    dtype = call.grad.dtype
    multiply = _grouped_product(call.offsets)
    has_no_rows = _counts(call.offsets)[:, None, None] == 0
    dx = None
    da = None
    db = None
    if call.wanted.x or call.wanted.a:
        ds = multiply(call.grad, _padded(_lora_B(stack, dtype), 2)).mul_(stack.scaling)
    if call.wanted.x:
        dx = _stack_product(call, call.grad, to_inputs=True)
        if stack.rank:
            of_branch = multiply(ds, _padded(stack.lora_A.to(dtype), 1))
            dx.add_(of_branch if stack.keep is None else of_branch * stack.keep)
        dx.masked_fill_(unused_rows(call.offsets, call.grad.shape[0]), 0)
    if call.wanted.a:
        assert call.x is not None
        da = multiply(ds.t(), masked(call.x, stack.keep))[:, : stack.rank]
        da = da.masked_fill(has_no_rows, 0).to(stack.lora_A.dtype)
    if call.wanted.b:
        assert call.s is not None
        db = multiply(call.grad.t(), _padded(call.s, 1))[:, :, : stack.rank]
        db = db.masked_fill(has_no_rows, 0).to(stack.lora_B.dtype).mul_(stack.scaling)
    return Gradients(dx, da, db)


def _thin_product(call: ExpertsForwardCall) -> Tensor:
    """S, with padded ranks. Unused rows are not written."""
    lora_A = _padded(call.stack.lora_A.to(call.x.dtype), 1)
    x = masked(call.x, call.stack.keep)
    return _grouped_product(call.offsets)(x, lora_A.transpose(1, 2))


def _lora_B(stack: ExpertStack, dtype: torch.dtype) -> Tensor:
    # PEFT packs B with the expert fastest; a product cannot read that order.
    return stack.lora_B.to(dtype).contiguous()


def _stack_product(
    call: ExpertsForwardCall | ExpertsBackwardCall, rows: Tensor, to_inputs: bool
) -> Tensor:
    """X W^T of each expert's rows [T, K], or dY W if it goes back ``to_inputs``. Unused rows are not
    written.
    """
    stack = call.stack
    weight = stack.weight
    assert weight is not None
    # The grouped product takes matrices that map rows from the left: W^T, or W back to inputs.
    is_turned = stack.transposed == to_inputs
    if not isinstance(weight, PackedExperts):
        return _grouped_product(call.offsets)(rows, weight.transpose(1, 2) if is_turned else weight)
    ranges = chunks(weight, rows.dtype, CHUNK_BYTES)
    width = stack.in_features if to_inputs else stack.out_features
    y = rows.new_empty(rows.shape[0], width)
    for chunk in _chunks_with_rows(ranges, call.offsets, rows.shape[0]):
        matrices = weight.experts(chunk.first, chunk.last, rows.dtype)
        matrices = matrices.transpose(1, 2) if is_turned else matrices
        ends = call.offsets[chunk.first : chunk.last] - chunk.start
        y[chunk.start : chunk.end] = _grouped_product(ends)(rows[chunk.start : chunk.end], matrices)
    return y


class _Chunk(NamedTuple):
    """Experts from ``first`` to before ``last``, with the rows from ``start`` to before ``end``."""

    first: int
    last: int
    start: int
    end: int


def _chunks_with_rows(
    ranges: Sequence[tuple[int, int]], offsets: Tensor, rows: int
) -> Iterator[_Chunk]:
    """The chunks of experts that have rows. One chunk of all experts needs no host's read."""
    if len(ranges) == 1:
        first, last = ranges[0]
        yield _Chunk(first, last, 0, rows)
        return
    ends = [0, *offsets.tolist()]
    for first, last in ranges:
        if ends[last] > ends[first]:
            yield _Chunk(first, last, ends[first], ends[last])


def _grouped_product(offsets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The grouped product of rows [T, P] and [E, P, Q], or of columns [P, T] and rows [T, Q].
    Unused rows are not written.
    """
    ends = offsets.to(torch.int32)
    return lambda a, b: torch._grouped_mm(a, b, offs=ends)


def _padded(t: Tensor, dim: int) -> Tensor:
    """``t`` with zeros behind its ranks, up to a size that the grouped product takes."""
    step = ALIGNMENT // t.element_size()
    size = max(step, -(-t.shape[dim] // step) * step)
    missing = size - t.shape[dim]
    if not missing:
        return t
    # Pairs of zeros before and behind, from the last dimension on.
    later_dims = t.dim() - 1 - dim
    return torch.nn.functional.pad(t, (*(0, 0) * later_dims, 0, missing))


def _counts(offsets: Tensor) -> Tensor:
    """How many rows each expert has, [E], of behind which row it ends."""
    return torch.diff(offsets, prepend=offsets.new_zeros(1))


def unused_rows(offsets: Tensor, rows: int) -> Tensor:
    """Whether a row is behind the last expert's, [T, 1]."""
    return (torch.arange(rows, device=offsets.device) >= offsets[-1])[:, None]


def rows_of_experts(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Of biases [E, N] the one of each row's expert, [T, N]. Rows of no expert get the last one."""
    numbers = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    expert_of_row = torch.searchsorted(offsets, numbers, right=True)
    return bias[expert_of_row.clamp_(max=bias.shape[0] - 1)]
