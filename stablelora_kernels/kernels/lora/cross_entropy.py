"""The losses of a head's logits, and their gradient in the logits' place."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import cast


@triton.jit
def _tanh(x):
    """tanh(x) to a few units in the last place: near 0 by its series, where the fraction cancels."""
    # -1 and 1 where exp is 0 and infinite.
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    square = x * x
    series = 17.0 / 315.0 - square * (62.0 / 2835.0)
    series = 1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * series))
    return tl.where(tl.abs(x) < 0.25, x * series, far)


@triton.jit
def _transformed(z, softcap, logit_scale, SOFTCAP: tl.constexpr):
    """U = cap(scale Z) in float32."""
    u = z.to(tl.float32) * logit_scale
    if SOFTCAP:
        u = softcap * _tanh(u / softcap)
    return u


@triton.jit(do_not_specialize=["V", "ignore_index"])
def _cross_entropy_kernel(
    z_ptr,
    labels_ptr,
    row_scale_ptr,
    entropy_scale_ptr,
    losses_ptr,
    entropies_ptr,
    V,
    ignore_index,
    stride_z,
    softcap,
    logit_scale,
    unit,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """L_i = log Σ_v exp(U_iv) - U_i,label_i, and with GRADIENT Z becomes
    unit g (softmax(U) - onehot(label)) ∘ U'(Z);  Z [M, V] in rows of stride_z elements.

    With entropies_ptr also H_i = -Σ_v p_v log p_v of p = softmax(U). With entropy_scale_ptr its
    gradient is added: unit h (-p (log p + H)) ∘ U'(Z).

    The elements behind V are read and written, too: a mask by stride_z, a multiple of 16, leaves
    loads and stores 16 bytes wide, and one by V does not.
    A program has a row, and its threads their own columns: a thread reads what it writes. Each
    keeps a running maximum and the sum of exponentials below it. An ignored row gives zeros; a
    label outside of the vocabulary gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK_N)
    # Finite, so that no difference is that of two infinities.
    maxima = tl.full((BLOCK_N,), -3.0e38, dtype=tl.float32)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    targets = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # Σ exp(U - max) (U - max), of which no term is above 0.
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    ENTROPY: tl.constexpr = entropies_ptr is not None or entropy_scale_ptr is not None
    for start in range(0, V, BLOCK_N):
        z = tl.load(z_ptr + start + columns, mask=start + columns < stride_z, other=0.0)
        u = _transformed(z, softcap, logit_scale, SOFTCAP)
        u = tl.where(start + columns < V, u, -float("inf"))
        higher = tl.maximum(maxima, u)
        if ENTROPY:
            # 0 times the logarithm of 0 is 0.
            below = tl.where(u > -float("inf"), u - higher, 0.0)
            lower = tl.where(sums > 0.0, maxima - higher, 0.0)
            weighted = (weighted + sums * lower) * tl.exp(lower) + tl.exp(below) * below
        sums = sums * tl.exp(maxima - higher) + tl.exp(u - higher)
        maxima = higher
        targets += tl.where(start + columns == label, u, 0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(sums * tl.exp(maxima - maximum), 0)
    is_ignored = label == ignore_index
    is_known = (label >= 0) & (label < V)
    loss = tl.log(total) + (maximum - tl.sum(targets, 0))
    loss = tl.where(is_known, loss, float("nan"))
    tl.store(losses_ptr + row, tl.where(is_ignored, 0.0, loss))
    entropy = tl.full((), 0.0, dtype=tl.float32)
    if ENTROPY:
        lower = tl.where(sums > 0.0, maxima - maximum, 0.0)
        weighted = (weighted + sums * lower) * tl.exp(lower)
        entropy = tl.log(total) - tl.sum(weighted, 0) / total
        if entropies_ptr is not None:
            shown = tl.where(is_known, entropy, float("nan"))
            tl.store(entropies_ptr + row, tl.where(is_ignored, 0.0, shown))
    if GRADIENT:
        factor = tl.where(is_known, unit * logit_scale, float("nan"))
        entropy_factor = factor
        if row_scale_ptr is not None:
            factor *= tl.load(row_scale_ptr + row).to(tl.float32)
        if entropy_scale_ptr is not None:
            entropy_factor *= tl.load(entropy_scale_ptr + row).to(tl.float32)
        log_total = tl.log(total)
        for start in range(0, V, BLOCK_N):
            inside = start + columns < stride_z
            z = tl.load(z_ptr + start + columns, mask=inside, other=0.0)
            u = _transformed(z, softcap, logit_scale, SOFTCAP)
            p = tl.exp(u - maximum) / total
            dz = p - tl.where(start + columns == label, 1.0, 0.0)
            dz *= factor
            if entropy_scale_ptr is not None:
                of_entropy = p * (u - maximum - log_total + entropy)
                dz -= entropy_factor * tl.where(p > 0.0, of_entropy, 0.0)
            if SOFTCAP:
                share = u / softcap
                dz *= 1.0 - share * share
            dz = tl.where(is_ignored, 0.0, dz)
            tl.store(z_ptr + start + columns, cast(dz, z_ptr.dtype.element_ty), mask=inside)
