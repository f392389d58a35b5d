"""Pieces that every kernel shares."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from stablelora_kernels import backend

INTERPRETING: tl.constexpr = tl.constexpr(backend.INTERPRETING)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b, in float32."""
    # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those.
    if INTERPRETING:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x as ``dtype``; float32 is rounded to nearest even."""
    if x.dtype == dtype:
        return x
    # The interpreter truncates to bfloat16 where a GPU rounds.
    elif INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def keep_mask(seed, rows, col0, n_cols, threshold, BLOCK_C: tl.constexpr):
    """Dropout's mask for rows × [col0, col0 + BLOCK_C), int1; its definition is ``reference.dropout_keep_ref``.

    One Philox call serves four neighbours in a row; col0 must be a multiple of 4.
    """
    groups = col0 // 4 + tl.arange(0, BLOCK_C // 4)
    counter = rows[:, None].to(tl.int64) * tl.cdiv(n_cols, 4) + groups[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words.to(tl.uint32) >> 1).to(tl.int32) >= threshold


# Launches since the process started, by kernel; tests and benchmarks take differences.
launch_counts: Counter[str] = Counter()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` once on ``device``'s current stream."""
    launch_counts[kernel.__name__] += 1
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        # Said outright: Triton 3.10 changes the default, which would change results.
        kernel[grid](*args, enable_fp_fusion=True, **meta)


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may have on ``device``; an H100's where nothing is compiled."""
    if device.type != "cuda":
        return 232_448
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def input_precision(dtype: torch.dtype) -> str:
    """What float32 products are computed in: as PyTorch's own, exact unless TensorFloat-32 was allowed."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"
