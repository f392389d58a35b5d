"""The whole optimizer step, clipping and latch rule included, as one kernel over tables of
addresses; and the norms before it.
"""

# "and" does not stop at its first false operand in a kernel, so conditions are nested.
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast
from stablelora_kernels.kernels.stable_adamw.elementwise import (
    element_mask,
    element_pointers,
    load8,
    mix,
    one_minus_exp,
    pair_sums,
    span_sum,
    square_sum,
    stochastic_round,
    store8,
)
from stablelora_kernels.kernels.stable_adamw.tables import (
    ADDRESS,
    CUT,
    DYNAMIC,
    EIGHT_BITS,
    HYPER,
    LATCHING_A,
    LOW_MOMENTS,
    MASTER,
    N_VARIANTS,
    NEVER,
    NEVER_LATCHING_A,
    SHARDED,
    TENSOR,
    WORD,
)


@triton.jit
def _shrink_ratio(row, hyper, words, before_ptr, latched_ptr, step, FLAGS: tl.constexpr):
    """The latch rule: A shrinks while ||A||_F / n > ||B||_F / m, then latches for good. Returns the
    ratio, 0 for no shrink.
    """
    # Integers of 64 bits would take twice the registers.
    n = tl.load(row + TENSOR.value.n).to(tl.float32)
    m = tl.load(row + TENSOR.value.m).to(tl.float32)
    a_first, b_first = tl.load(row + TENSOR.value.a_first), tl.load(row + TENSOR.value.b_first)
    if SHARDED & FLAGS:
        a = tl.load(a_first.to(tl.pointer_type(tl.float32)))
        b = tl.load(b_first.to(tl.pointer_type(tl.float32)))
    else:
        a_count, b_count = tl.load(row + TENSOR.value.a_count), tl.load(row + TENSOR.value.b_count)
        a, b = pair_sums(before_ptr, a_first, a_count, b_first, b_count, 128)
    shrinks = tl.sqrt(a) / n > tl.sqrt(b) / m
    if NEVER & FLAGS:
        shrinks = shrinks | (tl.load(row + TENSOR.value.role) == NEVER_LATCHING_A)
    # A sum that is not finite compares false: such a pair neither shrinks nor latches.
    finite = (a < float("inf")) & (b < float("inf"))
    if finite & (shrinks == 0):
        # As for the other counters.
        tl.debug_barrier()
        tl.store(latched_ptr, step.to(tl.int32))
    ratio_ptr = hyper + HYPER.value.shrink_ratio
    if DYNAMIC & FLAGS:
        ratio_ptr = tl.load(words + WORD.value.shrink_ratio).to(tl.pointer_type(tl.float32))
    return tl.where(finite & shrinks, tl.load(ratio_ptr), 0.0)


@triton.jit
def _update(
    row,
    grad,
    start,
    hyper,
    words,
    lr,
    decay_ptr,
    step,
    may_shrink,
    before_ptr,
    latched_ptr,
    scale,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    FLAGS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """AdamW on one chunk, A's shrink included; returns the sum of squares of the stored values.

    Args:
        grad: the gradient's address.
        start: the chunk's first element within the parameter.
        hyper, words: the setting's rows.
        decay_ptr: where the weight decay is.
        step: this step, counted from one.
        may_shrink: whether this is part of an A that has not latched.
        before_ptr: the sums of squares that the launch before left.
        latched_ptr: where the chunk's step of latching is.
        scale: multiplies the gradient: unscaling, clipping and the sign of ``maximize``.
        KIND: index of the parameter's dtype in ``tables.KINDS``.
        ALIGNED: whether every address and size is a multiple of 16.
    """
    offsets = tl.arange(0, CHUNK)
    mask = element_mask(start, tl.load(row + TENSOR.value.numel), offsets, ALIGNED)
    p_ptrs = element_pointers(tl.load(row + TENSOR.value.param), start, offsets, KIND, ALIGNED)
    # bfloat16 is kind 1.
    M_KIND: tl.constexpr = 1 if LOW_MOMENTS & FLAGS else 0
    m_ptrs = element_pointers(tl.load(row + TENSOR.value.exp_avg), start, offsets, M_KIND, ALIGNED)
    v_ptrs = element_pointers(
        tl.load(row + TENSOR.value.exp_avg_sq), start, offsets, M_KIND, ALIGNED
    )
    g = tl.load(element_pointers(grad, start, offsets, KIND, ALIGNED), mask=mask, other=0.0)
    from_ptrs = p_ptrs
    if MASTER & FLAGS:
        if KIND != 0:
            from_ptrs = element_pointers(
                tl.load(row + TENSOR.value.master), start, offsets, 0, ALIGNED
            )
    p = tl.load(from_ptrs, mask=mask, other=0.0)
    if EIGHT_BITS & FLAGS:
        remaining = tl.load(row + TENSOR.value.numel) - start
        codes = tl.load(row + TENSOR.value.exp_avg)
        scales = tl.load(row + TENSOR.value.exp_avg_scale)
        m = load8(
            codes,
            scales,
            start,
            remaining,
            offsets,
            mask,
            SIGNED=True,
            ALIGNED=ALIGNED,
            CHUNK=CHUNK,
        )
        codes = tl.load(row + TENSOR.value.exp_avg_sq)
        scales = tl.load(row + TENSOR.value.exp_avg_sq_scale)
        v = load8(
            codes,
            scales,
            start,
            remaining,
            offsets,
            mask,
            SIGNED=False,
            ALIGNED=ALIGNED,
            CHUNK=CHUNK,
        )
    else:
        m, v = tl.load(m_ptrs, mask=mask, other=0.0), tl.load(v_ptrs, mask=mask, other=0.0)
    # While the data arrives. The branch also keeps the compiler from spreading the loads above over
    # several waits.
    ratio = tl.full((), 0.0, tl.float32)
    if may_shrink:
        ratio = _shrink_ratio(row, hyper, words, before_ptr, latched_ptr, step, FLAGS)

    p, m, v = p.to(tl.float32), m.to(tl.float32), v.to(tl.float32)
    g = g.to(tl.float32) * scale
    m = tl.load(hyper + HYPER.value.beta1) * m + tl.load(hyper + HYPER.value.one_minus_beta1) * g
    v = (
        tl.load(hyper + HYPER.value.beta2) * v
        + tl.load(hyper + HYPER.value.one_minus_beta2) * g * g
    )
    # (1 - ratio)(1 - lr wd) p as a small difference from p: the product of two roundings near one
    # would drift.
    decay = lr * tl.load(decay_ptr)
    p -= (ratio + decay - ratio * decay) * p
    size = lr / one_minus_exp(step * tl.load(hyper + HYPER.value.log_beta1))
    root = tl.sqrt(one_minus_exp(step * tl.load(hyper + HYPER.value.log_beta2)))
    p -= size * m / (tl.sqrt(v) / root + tl.load(hyper + HYPER.value.eps))
    if KIND != 0 or (LOW_MOMENTS | EIGHT_BITS) & FLAGS:
        key = mix(step.to(tl.uint32) + tl.load(words + WORD.value.seed).to(tl.uint32))
        base = tl.load(row + TENSOR.value.base)
        # Indices are modulo 2^32. Add the scalars first, so that only the sum is a vector of int64.
        index = (base + start + offsets).to(tl.uint32)
        if CUT & FLAGS:
            columns = tl.load(row + TENSOR.value.shard_columns).to(tl.uint32)
            if columns != 0:
                element = start.to(tl.uint32) + offsets.to(tl.uint32)
                index = (
                    base.to(tl.uint32)
                    + element // columns * tl.load(row + TENSOR.value.shard_pitch).to(tl.uint32)
                    + element % columns
                )
        noise = mix(index ^ key)
    if LOW_MOMENTS & FLAGS:
        # As reference.optimizer.moment_noise_ref.
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
        codes = tl.load(row + TENSOR.value.exp_avg)
        scales = tl.load(row + TENSOR.value.exp_avg_scale)
        store8(
            m,
            word,
            codes,
            scales,
            start,
            remaining,
            offsets,
            mask,
            SIGNED=True,
            ALIGNED=ALIGNED,
            CHUNK=CHUNK,
        )
        word = mix(word + 0x9E3779B9)
        codes = tl.load(row + TENSOR.value.exp_avg_sq)
        scales = tl.load(row + TENSOR.value.exp_avg_sq_scale)
        store8(
            v,
            word,
            codes,
            scales,
            start,
            remaining,
            offsets,
            mask,
            SIGNED=False,
            ALIGNED=ALIGNED,
            CHUNK=CHUNK,
        )
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
    """A <- (1 - lambda) A unless latched, then AdamW, for every parameter; one program a chunk of
    CHUNK elements.

    Every counter exists once a chunk, so no program reads what another writes in the same launch.
    All chunks of A reach the same decision from the sums of squares that the launch before left.
    The halves of ``squares`` swap roles at each launch; swapping on the device lets a CUDA graph
    replay and found_inf skip a step.

    Args:
        tensors_ptr, addresses_ptr, hyper_ptr, words_ptr: the tables of
            :mod:`~stablelora_kernels.kernels.stable_adamw.tables`.
        chunks_ptr: int32 [n_chunks], each chunk's row in the table of tensors.
        steps_ptr: float32 [n_chunks], the steps that the parameter has taken.
        turns_ptr: int8 [n_chunks], the half of ``squares`` (0 or 1) to read: launches since it was
            measured, modulo 2.
        latched_ptr: int32 [n_chunks], the step at which A latched, 0 for not yet.
        squares_ptr: float32 [2, n_chunks], the sums of squares of the chunks' values.
        skipped_ptr: int32 [], the steps not taken because the gradients' norm was not finite.
        grad_scale_ptr, found_inf_ptr: float32 [], torch.amp's scale and verdict.
        grad_squares_ptr: float32 [n_grad_squares], partial sums of squares of all gradients, for
            clipping.
        HAS_SCALE, HAS_INF, CLIP: whether to read grad_scale, found_inf and grad_squares.
        FLAGS: the options in use, a sum of ``tables.FLAG_*``.
        VARIANTS: bit i is set if some tensor needs variant i of a chunk's code.
        GRAD_SUMS: the block in which grad_squares is summed, at least one.
    """
    chunk = tl.program_id(0)
    if HAS_INF:
        if tl.load(found_inf_ptr) != 0:
            return
    total = tl.full((), 0.0, tl.float32)
    if CLIP:
        total = tl.sqrt(span_sum(grad_squares_ptr, n_grad_squares, GRAD_SUMS))
        if HAS_SCALE:
            total /= tl.load(grad_scale_ptr)
        # A norm that is infinite or NaN: change nothing but the count of such steps.
        if (total < float("inf")) == 0:
            if chunk == 0:
                skipped = tl.load(skipped_ptr)
                # As below: all warps load, one thread stores.
                tl.debug_barrier()
                tl.store(skipped_ptr, skipped + 1)
            return
    tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
    row = tensors_ptr + tensor * len(TENSOR.value)
    start = (chunk - tl.load(row + TENSOR.value.first_chunk)) * CHUNK
    # The row's first column is the gradient's address.
    grad = tl.load(addresses_ptr + len(ADDRESS.value) * tensor)
    variant = tl.load(addresses_ptr + len(ADDRESS.value) * tensor + ADDRESS.value.variant)
    setting, role = tl.load(row + TENSOR.value.setting), tl.load(row + TENSOR.value.role)
    turn, step = tl.load(turns_ptr + chunk).to(tl.int32), tl.load(steps_ptr + chunk) + 1
    # Every warp loads the counters, and one thread stores their new values. The barrier keeps a
    # late warp from loading those.
    tl.debug_barrier()
    tl.store(turns_ptr + chunk, 1 - turn)
    before_ptr = squares_ptr + turn * n_chunks
    after_ptr = squares_ptr + (1 - turn) * n_chunks

    if grad == 0:
        tl.store(after_ptr + chunk, tl.load(before_ptr + chunk))
    else:
        hyper = hyper_ptr + setting * len(HYPER.value)
        tl.store(steps_ptr + chunk, step)
        is_a = role == LATCHING_A
        if NEVER & FLAGS:
            is_a = is_a | (role == NEVER_LATCHING_A)
        may_shrink = is_a & (tl.load(latched_ptr + chunk) == 0)
        scale = tl.load(hyper + HYPER.value.sign)
        if HAS_SCALE:
            scale /= tl.load(grad_scale_ptr)
        if CLIP:
            scale *= tl.minimum(max_grad_norm / (total + 1e-6), 1.0)
        words = words_ptr + setting * len(WORD.value)
        lr = tl.load(tl.load(words + WORD.value.lr).to(tl.pointer_type(tl.float32)))
        decay_ptr = hyper + HYPER.value.weight_decay
        if DYNAMIC & FLAGS:
            lr *= tl.load(hyper + HYPER.value.lr_ratio)
            decay_ptr = tl.load(words + WORD.value.weight_decay).to(tl.pointer_type(tl.float32))
        square = tl.full((), 0.0, tl.float32)
        for code in tl.static_range(N_VARIANTS):
            if (VARIANTS >> code) & 1:
                if variant == code:
                    square = _update(
                        row=row,
                        grad=grad,
                        start=start,
                        hyper=hyper,
                        words=words,
                        lr=lr,
                        decay_ptr=decay_ptr,
                        step=step,
                        may_shrink=may_shrink,
                        before_ptr=before_ptr,
                        latched_ptr=latched_ptr + chunk,
                        scale=scale,
                        KIND=code // 2,
                        ALIGNED=code % 2 == 1,
                        FLAGS=FLAGS,
                        CHUNK=CHUNK,
                    )
        tl.store(after_ptr + chunk, square)


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
    """squares[i] = the sum of squares of the parameters' chunk i, grad_squares[j] = that of the
    gradients' chunks j, j + J, ...

    The first ``n_squares`` programs (all of the chunks or none) write squares, the other J programs
    write grad_squares. The tables and constants are those of :func:`_stable_adamw_kernel`.
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
            total += square_sum(value, start, numel, variant, offsets, VARIANTS)
    tl.store(sums_ptr + program, total)
