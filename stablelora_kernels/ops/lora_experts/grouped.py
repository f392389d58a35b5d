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
from stablelora_kernels.ops.lora_experts.call import (
    ExpertsBackward,
    ExpertsForward,
    ExpertsGradients,
)
from stablelora_kernels.packed_experts import PackedExperts, chunks

# A grouped product takes rows that begin at multiples of so many bytes.
ALIGNMENT = 16
# So much of a packed stack is dequantized for a grouped product.
CHUNK_BYTES = 256 << 20


def can_group(x: Tensor, weight: Tensor | PackedExperts) -> bool:
    """Whether PyTorch's grouped product takes x [T, K], or dY, and the weights."""
    if (
        not x.is_cuda
        or x.dtype != torch.bfloat16
        or torch.version.hip
        or not hasattr(torch, "_grouped_mm")
    ):
        return False
    aligned = x.data_ptr() % ALIGNMENT == 0 and x.stride(1) == 1
    even = all(n * x.element_size() % ALIGNMENT == 0 for n in (x.stride(0), *weight.shape[1:]))
    # A packed stack is dequantized into memory of its own.
    readable = isinstance(weight, PackedExperts) or (
        weight.data_ptr() % ALIGNMENT == 0 and weight.is_contiguous()
    )
    return aligned and even and readable and torch.cuda.get_device_capability(x.device) >= (8, 0)


def grouped_forward(call: ExpertsForward) -> tuple[Tensor, Tensor]:
    """Y and S as the op ``lora_experts_fwd`` returns them, with A and B in x's dtype and a packed stack in
    one piece.
    """
    multiply = grouped_product(call.offsets)
    rank = call.lora_A.shape[1]
    rows = call.x.shape[0]
    y = _stack_product(call, call.x, to_inputs=False)
    s = multiply(masked(call.x, call.keep), padded(call.lora_A, 1).transpose(1, 2))
    if rank:
        y.add_(multiply(s, padded(call.lora_B, 2).transpose(1, 2)), alpha=call.scaling)
    if call.bias is not None:
        numbers = torch.arange(rows, device=call.x.device, dtype=call.offsets.dtype)
        expert_of_row = torch.searchsorted(call.offsets, numbers, right=True)
        y.add_(call.bias[expert_of_row.clamp_(max=call.bias.shape[0] - 1)])
    unused = unused_rows(call.offsets, rows)
    saved = s.new_empty(0, rank)
    if call.save_s:
        saved = s[:, :rank].masked_fill(unused, 0)
    return y.masked_fill_(unused, 0), saved


def grouped_backward(call: ExpertsBackward, results: ExpertsGradients) -> ExpertsGradients:
    """The gradients as the op ``lora_experts_bwd`` returns them, for a call like
    :func:`grouped_forward`'s.

    ``results`` have the dtypes of the gradients, and stand for those that are not needed.
    """
    multiply = grouped_product(call.offsets)
    rank = call.lora_A.shape[1]
    has_no_rows = _counts(call.offsets)[:, None, None] == 0
    if call.need_x or call.need_a:
        ds = multiply(call.grad, padded(call.lora_B, 2)).mul_(call.scaling)
    if call.need_x:
        dx = _stack_product(call, call.grad, to_inputs=True)
        if rank:
            of_branch = multiply(ds, padded(call.lora_A, 1))
            dx.add_(of_branch if call.keep is None else of_branch * call.keep)
        dx.masked_fill_(unused_rows(call.offsets, call.grad.shape[0]), 0)
        results = results._replace(dx=dx)
    if call.need_a:
        assert call.x is not None
        da = multiply(ds.t(), masked(call.x, call.keep))[:, :rank].masked_fill(has_no_rows, 0)
        results = results._replace(da=da.to(results.da.dtype))
    if call.need_b:
        db = multiply(call.grad.t(), padded(call.s, 1))[:, :, :rank].masked_fill(has_no_rows, 0)
        results = results._replace(db=db.to(results.db.dtype).mul_(call.scaling))
    return results


def _stack_product(call: ExpertsForward | ExpertsBackward, rows: Tensor, to_inputs: bool) -> Tensor:
    """X W^T of each expert's rows [T, K], or dY W if it goes back ``to_inputs``. Unused rows are not
    written.
    """
    stack = call.weight
    # The grouped product takes matrices that map rows from the left: W^T, or W back to inputs.
    is_turned = call.transposed == to_inputs
    if not isinstance(stack, PackedExperts):
        return grouped_product(call.offsets)(rows, stack.transpose(1, 2) if is_turned else stack)
    ranges = chunks(stack, rows.dtype, CHUNK_BYTES)
    width = call.lora_A.shape[2] if to_inputs else call.lora_B.shape[1]
    y = rows.new_empty(rows.shape[0], width)
    for chunk in _chunks_with_rows(ranges, call.offsets, rows.shape[0]):
        matrices = stack.experts(chunk.first, chunk.last, rows.dtype)
        matrices = matrices.transpose(1, 2) if is_turned else matrices
        ends = call.offsets[chunk.first : chunk.last] - chunk.start
        y[chunk.start : chunk.end] = grouped_product(ends)(rows[chunk.start : chunk.end], matrices)
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


def grouped_product(offsets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The grouped product of rows [T, P] and [E, P, Q], or of columns [P, T] and rows [T, Q].
    Unused rows are not written.
    """
    ends = offsets.to(torch.int32)
    return lambda a, b: torch._grouped_mm(a, b, offs=ends)


def padded(t: Tensor, dim: int) -> Tensor:
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
