"""Algorithm 1 alone, before the step of another optimizer: norms, latch and shrinkage of all pairs
in one launch.
"""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import arrives_last
from stablelora_kernels.kernels.stable_adamw.elementwise import (
    element_mask,
    element_pointers,
    mix,
    square_sum,
    stochastic_round,
)
from stablelora_kernels.kernels.stable_adamw.tables import N_VARIANTS, PAIR


@triton.jit
def _shrink(
    address,
    row,
    ratio,
    key,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    CUT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A <- A - ratio A, for the whole tensor of A's elements at ``address``."""
    numel = tl.load(row + PAIR.value.a_numel)
    for start in range(0, numel, CHUNK):
        offsets = tl.arange(0, CHUNK)
        mask = element_mask(start, numel, offsets, ALIGNED)
        pointers = element_pointers(address, start, offsets, KIND, ALIGNED)
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        # As a small difference: the product with a rounding of 1 - ratio would drift.
        x -= ratio * x
        if KIND != 0:
            base = tl.load(row + PAIR.value.base)
            # Indices are modulo 2^32.
            index = (base + start + offsets).to(tl.uint32)
            if CUT:
                columns = tl.load(row + PAIR.value.shard_columns).to(tl.uint32)
                if columns != 0:
                    element = (start + offsets).to(tl.uint32)
                    pitch = tl.load(row + PAIR.value.shard_pitch).to(tl.uint32)
                    index = base.to(tl.uint32) + element // columns * pitch + element % columns
            x = stochastic_round(x, mix(index ^ key), KIND)
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_pairs"])
def _stable_shrink_kernel(
    pairs_ptr,
    programs_ptr,
    ratios_ptr,
    steps_ptr,
    latched_ptr,
    arrived_ptr,
    squares_ptr,
    found_inf_ptr,
    n_pairs,
    HAS_INF: tl.constexpr,
    SUMMED: tl.constexpr,
    CUT: tl.constexpr,
    VARIANTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A <- (1 - ratio) A of every pair that has not latched and has ||A||_F / n > ||B||_F / m; other
    pairs latch.

    The programs of a pair add up the squares of a chunk each, first A's chunks, then B's. The last
    one to be done decides for the pair and shrinks all of A: no program waits for another, and the
    sums have a fixed order.

    Args:
        pairs_ptr: int64 [n_pairs, columns], the table of
            :class:`~stablelora_kernels.kernels.stable_adamw.tables.PairRow`.
        programs_ptr: int32 [programs], each program's pair.
        ratios_ptr: float32 [n_pairs].
        steps_ptr: int32 [n_pairs], the steps that A has taken.
        latched_ptr: int32 [n_pairs], the step at which the pair latched, 0 for not yet.
        arrived_ptr: int32 [n_pairs], 0 before and after.
        squares_ptr: float32 [programs], sums of squares. SUMMED: [2, n_pairs], those of all A and
            of all B over all processes, which the host has summed; a pair then has one program.
        found_inf_ptr: float32 [], torch.amp's verdict. If it is not 0, nothing changes.
        HAS_INF: whether to read found_inf.
        CUT: whether some shard is not one run of its A's elements.
        VARIANTS: bit i is set if some tensor needs variant i of a chunk's code.
    """
    program = tl.program_id(0)
    if HAS_INF:
        if tl.load(found_inf_ptr) != 0:
            return
    pair = tl.load(programs_ptr + program)
    row = pairs_ptr + pair.to(tl.int64) * len(PAIR.value)
    # A pair whose A has no gradient takes no step.
    if tl.load(row + PAIR.value.present) == 0:
        return
    chunk = program - tl.load(row + PAIR.value.first_program).to(tl.int32)
    if tl.load(latched_ptr + pair) != 0:
        if chunk == 0:
            step = tl.load(steps_ptr + pair)
            # Every warp loads the counter, and one thread stores its new value.
            tl.debug_barrier()
            tl.store(steps_ptr + pair, step + 1)
        return
    if SUMMED:
        last = True
        a, b = tl.load(squares_ptr + pair), tl.load(squares_ptr + n_pairs + pair)
    else:
        a_chunks = tl.load(row + PAIR.value.a_chunks).to(tl.int32)
        chunks = tl.load(row + PAIR.value.chunks).to(tl.int32)
        address, numel = tl.load(row + PAIR.value.a), tl.load(row + PAIR.value.a_numel)
        variant = tl.load(row + PAIR.value.a_variant)
        part = chunk
        if chunk >= a_chunks:
            address, numel = tl.load(row + PAIR.value.b), tl.load(row + PAIR.value.b_numel)
            variant = tl.load(row + PAIR.value.b_variant)
            part = chunk - a_chunks
        square = square_sum(
            address,
            part.to(tl.int64) * CHUNK,
            numel,
            variant,
            tl.arange(0, CHUNK),
            VARIANTS,
        )
        tl.store(squares_ptr + program, square)
        last = arrives_last(arrived_ptr + pair, chunks)
        a, b = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        if last:
            sums_ptr = squares_ptr + program - chunk
            places = tl.arange(0, 128)
            of_a, of_b = tl.zeros((128,), tl.float32), tl.zeros((128,), tl.float32)
            for first in range(0, chunks, 128):
                at = first + places
                values = tl.load(sums_ptr + at, mask=at < chunks, other=0.0, cache_modifier=".cg")
                of_a += tl.where(at < a_chunks, values, 0.0)
                of_b += tl.where(at < a_chunks, 0.0, values)
            a, b = tl.sum(of_a, 0), tl.sum(of_b, 0)
    if last:
        step = tl.load(steps_ptr + pair) + 1
        tl.debug_barrier()
        tl.store(steps_ptr + pair, step)
        n = tl.load(row + PAIR.value.n).to(tl.float32)
        m = tl.load(row + PAIR.value.m).to(tl.float32)
        # A sum that is not finite: such a pair neither shrinks nor latches.
        if (a < float("inf")) & (b < float("inf")):
            if tl.sqrt(a) / n > tl.sqrt(b) / m:
                ratio = tl.load(ratios_ptr + pair)
                key = mix(step.to(tl.uint32) + tl.load(row + PAIR.value.seed).to(tl.uint32))
                variant = tl.load(row + PAIR.value.a_variant)
                for code in tl.static_range(N_VARIANTS):
                    if (VARIANTS >> code) & 1:
                        if variant == code:
                            for column in tl.static_range(2):
                                # A, and what an optimizer keeps beside it.
                                address = tl.load(
                                    row + (PAIR.value.a if column == 0 else PAIR.value.beside)
                                )
                                if address != 0:
                                    _shrink(
                                        address,
                                        row,
                                        ratio,
                                        key,
                                        KIND=code // 2,
                                        ALIGNED=code % 2 == 1,
                                        CUT=CUT,
                                        CHUNK=CHUNK,
                                    )
            else:
                tl.store(latched_ptr + pair, step)
