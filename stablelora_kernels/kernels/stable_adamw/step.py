"""The whole optimizer step as one kernel over tables of addresses."""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast
from stablelora_kernels.kernels.stable_adamw.elementwise import (
    element_mask,
    element_pointers,
    mix,
    one_minus_exp,
    span_sum,
    stochastic_round,
)
from stablelora_kernels.kernels.stable_adamw.moments_8bit import load8, store8
from stablelora_kernels.kernels.stable_adamw.tables import (
    A_NEVER,
    AMSGRAD,
    COLUMNS,
    CUT,
    DYNAMIC,
    EIGHT_BITS,
    HYPERS,
    LOW_MOMENTS,
    MASTER,
    N_VARIANTS,
    NEVER,
    SHARDED,
    WORDS,
    A,
)


@triton.jit
def _update(
    row,
    grad,
    start,
    hyper,
    lr,
    decay_ptr,
    step,
    ratio,
    scale,
    key,
    base,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """AdamW on one chunk, A's shrink included; returns the sum of squares of what was stored."""
    offsets = tl.arange(0, CHUNK)
    mask = element_mask(start, tl.load(row + 3), offsets, ALIGNED)
    p_ptrs = element_pointers(tl.load(row), start, offsets, KIND, ALIGNED)
    # bfloat16 is kind 1.
    M_KIND: tl.constexpr = 1 if LOW_MOMENTS & FLAGS else 0
    m_ptrs = element_pointers(tl.load(row + 1), start, offsets, M_KIND, ALIGNED)
    v_ptrs = element_pointers(tl.load(row + 2), start, offsets, M_KIND, ALIGNED)
    g = tl.load(element_pointers(grad, start, offsets, KIND, ALIGNED), mask=mask, other=0.0).to(tl.float32)
    from_ptrs = p_ptrs
    if MASTER & FLAGS:
        if KIND != 0:
            from_ptrs = element_pointers(tl.load(row + 14), start, offsets, 0, ALIGNED)
    p = tl.load(from_ptrs, mask=mask, other=0.0).to(tl.float32)
    if EIGHT_BITS & FLAGS:
        left = tl.load(row + 3) - start
        m = load8(tl.load(row + 1), tl.load(row + 15), start, left, offsets, mask, True, ALIGNED, CHUNK)
        v = load8(tl.load(row + 2), tl.load(row + 16), start, left, offsets, mask, False, ALIGNED, CHUNK)
    else:
        m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)

    g *= scale
    m = tl.load(hyper) * m + tl.load(hyper + 1) * g
    v = tl.load(hyper + 2) * v + tl.load(hyper + 3) * g * g
    # (1 - ratio)(1 - lr wd) p, as a small difference from p: the product of two roundings near one would drift.
    decay = lr * tl.load(decay_ptr)
    p -= (ratio + decay - ratio * decay) * p
    size = lr / one_minus_exp(step * tl.load(hyper + 8))
    root = tl.sqrt(one_minus_exp(step * tl.load(hyper + 9)))
    largest = v
    if AMSGRAD & FLAGS:
        address = tl.load(row + 13)
        if address != 0:
            x_ptrs = element_pointers(address, start, offsets, 0, ALIGNED)
            largest = tl.maximum(tl.load(x_ptrs, mask=mask, other=0.0), v, propagate_nan=tl.PropagateNan.ALL)
            tl.store(x_ptrs, largest, mask=mask)
    p -= size * m / (tl.sqrt(largest) / root + tl.load(hyper + 4))
    if KIND != 0 or (LOW_MOMENTS | EIGHT_BITS) & FLAGS:
        # Modulo 2^32; the scalars first, so that no more than the sum is a vector of int64.
        index = (base + start + offsets).to(tl.uint32)
        if CUT & FLAGS:
            columns = tl.load(row + 17).to(tl.uint32)
            if columns != 0:
                own = start.to(tl.uint32) + offsets.to(tl.uint32)
                index = base.to(tl.uint32) + own // columns * tl.load(row + 18).to(tl.uint32) + own % columns
        noise = mix(index ^ key)
    if LOW_MOMENTS & FLAGS:
        # reference_optim.moment_noise_ref
        word = mix(noise + 0x9E3779B9)
        m = stochastic_round(m, word, 1)
        v = stochastic_round(v, word >> 16, 1)
    if MASTER & FLAGS and KIND != 0:
        tl.store(from_ptrs, p, mask=mask)
        tl.store(p_ptrs, cast(p, p_ptrs.dtype.element_ty), mask=mask)
    else:
        if KIND != 0:
            p = stochastic_round(p, noise, KIND)
        tl.store(p_ptrs, p.to(p_ptrs.dtype.element_ty), mask=mask)
    if EIGHT_BITS & FLAGS:
        word = mix(noise + 0x9E3779B9)
        store8(m, word, tl.load(row + 1), tl.load(row + 15), start, left, offsets, mask, True, ALIGNED, CHUNK)
        word = mix(word + 0x9E3779B9)
        store8(v, word, tl.load(row + 2), tl.load(row + 16), start, left, offsets, mask, False, ALIGNED, CHUNK)
    else:
        tl.store(m_ptrs, m.to(m_ptrs.dtype.element_ty), mask=mask)
        tl.store(v_ptrs, v.to(v_ptrs.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, p * p, 0.0), 0)


@triton.jit(do_not_specialize=["n_chunks", "n_grad_squares", "max_grad_norm"])
def _stable_adamw_kernel(
    tensors_ptr,
    addresses_ptr,
    chunks_ptr,
    hyper_ptr,
    words_ptr,
    steps_ptr,
    turns_ptr,
    latched_ptr,
    squares_ptr,
    skipped_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    grad_squares_ptr,
    n_chunks,
    n_grad_squares,
    max_grad_norm,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    CLIP: tl.constexpr,
    FLAGS: tl.constexpr,
    VARIANTS: tl.constexpr,
    CHUNK: tl.constexpr,
    GRAD_SUMS: tl.constexpr,
):
    """A <- (1 - lambda) A unless latched, then AdamW, for every parameter; one program a chunk of CHUNK elements.

    Everything that changes is kept once for each chunk: the parameter's ``step``, the ``turn`` (0 or 1: launches since the sums
    were measured) and A's ``latched`` step. So no program reads what another writes in the same launch, and all of A's
    reach the same decision from the sums of squares that the launch before left. ``squares`` [2, n_chunks] is read and
    written in turn; taking turns on the device lets a CUDA graph replay and found_inf skip a step.
    """
    chunk = tl.program_id(0)
    if HAS_INF:
        if tl.load(found_inf_ptr) != 0:
            return
    total = tl.full((), 0.0, tl.float32)
    if CLIP:
        total = tl.sqrt(span_sum(grad_squares_ptr, 0, n_grad_squares, GRAD_SUMS))
        if HAS_SCALE:
            total /= tl.load(grad_scale_ptr)
        # Gradients of no finite norm, a NaN's included: nothing changes, but it is counted.
        if (total < float("inf")) == 0:
            if chunk == 0:
                tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)
            return
    tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
    row = tensors_ptr + tensor * COLUMNS
    start = (chunk - tl.load(row + 19)) * CHUNK
    grad = tl.load(addresses_ptr + 2 * tensor)
    variant = tl.load(addresses_ptr + 2 * tensor + 1)
    turn = tl.load(turns_ptr + chunk).to(tl.int32)
    tl.store(turns_ptr + chunk, 1 - turn)
    before_ptr = squares_ptr + turn * n_chunks
    after_ptr = squares_ptr + (1 - turn) * n_chunks

    if grad == 0:
        tl.store(after_ptr + chunk, tl.load(before_ptr + chunk))
    else:
        group = tl.load(row + 4)
        hyper = hyper_ptr + group * HYPERS
        step = tl.load(steps_ptr + chunk) + 1
        tl.store(steps_ptr + chunk, step)
        ratio = tl.full((), 0.0, tl.float32)
        role = tl.load(row + 5)
        is_a = role == A
        if NEVER & FLAGS:
            is_a = is_a | (role == A_NEVER)
        if is_a:
            if tl.load(latched_ptr + chunk) == 0:
                if SHARDED & FLAGS:
                    a = tl.load(tl.load(row + 7).to(tl.pointer_type(tl.float32)))
                    b = tl.load(tl.load(row + 9).to(tl.pointer_type(tl.float32)))
                else:
                    a = span_sum(before_ptr, tl.load(row + 7), tl.load(row + 8), 64)
                    b = span_sum(before_ptr, tl.load(row + 9), tl.load(row + 10), 64)
                # Sums that are not finite compare false: such a pair neither shrinks nor latches.
                if (a < float("inf")) & (b < float("inf")):
                    shrinks = tl.sqrt(a) / tl.load(row + 11) > tl.sqrt(b) / tl.load(row + 12)
                    if NEVER & FLAGS:
                        shrinks = shrinks | (role == A_NEVER)
                    if shrinks:
                        ratio_ptr = hyper + 6
                        if DYNAMIC & FLAGS:
                            ratio_ptr = tl.load(words_ptr + group * WORDS + 3).to(tl.pointer_type(tl.float32))
                        ratio = tl.load(ratio_ptr)
                    else:
                        tl.store(latched_ptr + chunk, step.to(tl.int32))
        scale = tl.load(hyper + 7)
        if HAS_SCALE:
            scale /= tl.load(grad_scale_ptr)
        if CLIP:
            scale *= tl.minimum(max_grad_norm / (total + 1e-6), 1.0)
        words = words_ptr + group * WORDS
        lr = tl.load(tl.load(words).to(tl.pointer_type(tl.float32)))
        decay_ptr = hyper + 5
        if DYNAMIC & FLAGS:
            lr *= tl.load(hyper + 11)
            decay_ptr = tl.load(words + 2).to(tl.pointer_type(tl.float32))
        key = mix(step.to(tl.uint32) + tl.load(words + 1).to(tl.uint32))
        base = tl.load(row + 6)
        square = tl.full((), 0.0, tl.float32)
        for code in tl.static_range(N_VARIANTS):
            if (VARIANTS >> code) & 1:
                if variant == code:
                    square = _update(
                        row,
                        grad,
                        start,
                        hyper,
                        lr,
                        decay_ptr,
                        step,
                        ratio,
                        scale,
                        key,
                        base,
                        code // 2,
                        code % 2 == 1,
                        FLAGS,
                        CHUNK,
                    )
        tl.store(after_ptr + chunk, square)
