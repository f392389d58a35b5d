"""Sums of squares of parameters and gradients, which some steps need before."""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.stable_adamw.elementwise import element_mask, element_pointers
from stablelora_kernels.kernels.stable_adamw.tables import COLUMNS, MASTER, N_VARIANTS


@triton.jit(do_not_specialize=["n_chunks", "n_squares"])
def _square_sums_kernel(
    tensors_ptr,
    addresses_ptr,
    chunks_ptr,
    squares_ptr,
    grad_squares_ptr,
    n_chunks,
    n_squares,
    FLAGS: tl.constexpr,
    VARIANTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """squares[i] = the sum of squares in chunk i of the parameters, by the first ``n_squares`` programs, one a chunk or none;

    grad_squares[i] = the same of the gradients in chunks i, i + programs, ..., by the other programs.
    """
    program = tl.program_id(0)
    programs = n_squares
    values_ptr, stride, sums_ptr = tensors_ptr, COLUMNS + 0, squares_ptr
    if program >= n_squares:
        program -= n_squares
        programs = tl.num_programs(0) - n_squares
        values_ptr, stride, sums_ptr = addresses_ptr, 2, grad_squares_ptr
    offsets = tl.arange(0, CHUNK)
    total = tl.full((), 0.0, tl.float32)
    for chunk in range(program, n_chunks, programs):
        tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
        start = (chunk - tl.load(tensors_ptr + tensor * COLUMNS + 19)) * CHUNK
        value = tl.load(values_ptr + tensor * stride)
        numel = tl.load(tensors_ptr + tensor * COLUMNS + 3)
        variant = tl.load(addresses_ptr + 2 * tensor + 1)
        if MASTER & FLAGS:
            master = tl.load(tensors_ptr + tensor * COLUMNS + 14)
            if (master != 0) & (tl.program_id(0) < n_squares):
                value = master
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
