"""Sums of squares of parameters and gradients, measured before the steps that need them."""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.stable_adamw.elementwise import element_mask, element_pointers
from stablelora_kernels.kernels.stable_adamw.tables import (
    ADDRESS,
    MASTER,
    N_VARIANTS,
    TENSOR,
)


@triton.jit(do_not_specialize=["n_chunks", "n_squares"])
def _square_sums_kernel(
    tensors_ptr, addresses_ptr, chunks_ptr, squares_ptr, grad_squares_ptr, n_chunks, n_squares,
    FLAGS: tl.constexpr, VARIANTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """squares[i] = the sum of squares of the parameters' chunk i;  grad_squares[j] = that of the gradients' chunks j, j + J, ...

    The first ``n_squares`` programs (all of the chunks or none) write squares, the other J programs write grad_squares.
    The tables and constants are those of :func:`~stablelora_kernels.kernels.stable_adamw.step._stable_adamw_kernel`.
    """
    program = tl.program_id(0)
    programs = n_squares
    values_ptr, stride, sums_ptr = tensors_ptr + TENSOR.value.param, len(TENSOR.value), squares_ptr
    if program >= n_squares:
        program -= n_squares
        programs = tl.num_programs(0) - n_squares
        # The first column is the gradient's address.
        values_ptr, stride, sums_ptr = addresses_ptr, len(ADDRESS.value), grad_squares_ptr
    offsets = tl.arange(0, CHUNK)
    total = tl.full((), 0.0, tl.float32)
    for chunk in range(program, n_chunks, programs):
        tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
        row = tensors_ptr + tensor * len(TENSOR.value)
        start = (chunk - tl.load(row + TENSOR.value.first_chunk)) * CHUNK
        value = tl.load(values_ptr + tensor * stride)
        numel = tl.load(row + TENSOR.value.numel)
        variant = tl.load(addresses_ptr + len(ADDRESS.value) * tensor + ADDRESS.value.variant)
        if MASTER & FLAGS:
            master = tl.load(row + TENSOR.value.master)
            if (master != 0) & (tl.program_id(0) < n_squares):
                value = master
                # A master is float32.
                variant = variant % 2
        if value != 0:
            for code in tl.static_range(N_VARIANTS):
                if (VARIANTS >> code) & 1:
                    if variant == code:
                        mask = element_mask(start, numel, offsets, code % 2 == 1)
                        pointers = element_pointers(value, start, offsets, code // 2, code % 2 == 1)
                        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                        total += tl.sum(x * x, 0)
    tl.store(sums_ptr + program, total)
