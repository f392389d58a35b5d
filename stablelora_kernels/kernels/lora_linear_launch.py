"""Tiles for the kernels of ``lora_linear``, and their launches. Tensors are 2-D and of any strides unless it says otherwise."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from stablelora_kernels.kernels._common import input_precision, launch, shared_limit
from stablelora_kernels.kernels.lora_linear import _lora_linear_grads_kernel, _lora_linear_kernel, _lora_shrink_kernel

# A fused rank block wider than this costs more in registers than reading X again.
MAX_BLOCK_R = 64


class LinearConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


class ReduceConfig(NamedTuple):
    """BLOCK_M by BLOCK_C tiles of the activation, BLOCK_R of the rank."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


def rank_block(r: int) -> int:
    """The rank padded to what a matrix instruction takes: a power of two of at least 16."""
    return min(max(16, triton.next_power_of_2(r)), MAX_BLOCK_R)


def _is_hopper_or_later(limit: int) -> bool:
    """Of the data-centre kind: only these give a program 227 KiB of shared memory."""
    return limit >= 200_000


def _stages_that_fit(stages: int, bytes_a_stage: int, limit: int, hopper: bool) -> int:
    """The deepest pipeline of at most ``stages``, and at least 2, whose buffers fit into ``limit`` bytes."""
    # Hopper's and Blackwell's matrix units read shared memory while it is being filled, and need a buffer more for it.
    spare = 0 if hopper else 1
    while stages > 2 and (stages - spare) * bytes_a_stage > limit:
        stages -= 1
    return stages


def linear_config(
    m: int, n: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, limit: int, masked: bool = False
) -> LinearConfig:
    """The tile of Y for the product with the LoRA branch, pipelined as deep as ``limit`` bytes of shared memory allow.

    ``masked``: dropout's mask is applied to the branch, which then needs an accumulator of its own.
    """
    block_r = rank_block(r)
    hopper = _is_hopper_or_later(limit)
    if dtype == torch.float32:
        block_m, block_n, block_k, warps, stages = (16, 64, 64, 4, 3) if m <= 16 else (64, 64, 32, 4, 3)
    elif m <= 64:
        # Few rows: the product is bound by reading W, so tiles are narrow to spread it over the GPU and K is deep.
        block_k = 128 if block_r <= 32 else 64
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(m)), 32, 4, 4
    elif m >= 1024 and n >= 1024 and block_r == 16 and hopper and not masked:
        block_m, block_n, block_k, warps, stages = 128, 256, 64, 8, 3
    elif not hopper and block_r > 32:
        # Accumulators are in registers before Blackwell; a wide rank block beside 128 x 128 would spill them.
        block_m, block_n, block_k, warps, stages = 64, 128, 64, 4, 3
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 64, 8, 3

    stage = block_k * ((block_m + block_n) * dtype.itemsize + block_r * lora_dtype.itemsize)
    # The branch's operands are in shared memory beside the pipeline's buffers.
    branch = block_r * (block_m * dtype.itemsize + block_n * lora_dtype.itemsize)
    stages = _stages_that_fit(stages, stage, limit - branch, hopper)
    return LinearConfig(block_m, block_n, block_k, block_r, warps, stages)


def shrink_config(m: int, r: int, dtype: torch.dtype, lora_dtype: torch.dtype, limit: int) -> ReduceConfig:
    """The tile of S: few rows each, so that many programs share the reading of X."""
    block_m, block_k, block_r = 16 if m <= 4096 else 64, 64 if dtype == torch.float32 else 128, rank_block(r)
    stage = block_k * (block_m * dtype.itemsize + block_r * lora_dtype.itemsize)
    return ReduceConfig(block_m, block_k, block_r, 4, _stages_that_fit(3, stage, limit, _is_hopper_or_later(limit)))


def weight_grads_config(n: int, k: int, r: int, dtype: torch.dtype) -> ReduceConfig:
    """The tile of dA and dB: narrow where the layer is, since each tile sums all rows by itself."""
    block_c = 32 if n + k <= 4096 else 64
    return ReduceConfig(32 if dtype == torch.float32 else 64, block_c, rank_block(r), 4, 3)


def _threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**31), 2**31 - 1)


def launch_shrink(
    x: Tensor,
    lora_a: Tensor,
    s: Tensor,
    scaling: float,
    *,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """S = scaling (X ∘ keep) A^T: x [M, K], lora_a [r, K], s [M, r] with unit column stride, seed int64 [1]."""
    (m, k), r = x.shape, lora_a.shape[0]
    c = shrink_config(m, r, x.dtype, lora_a.dtype, shared_limit(x.device))
    grid = (triton.cdiv(m, c.BLOCK_M), triton.cdiv(r, c.BLOCK_R))
    if m == 0:
        return
    launch(
        _lora_shrink_kernel, grid, x.device, x, lora_a, s, seed, m, k, r, *x.stride(), *lora_a.stride(), s.stride(0),
        scaling, _threshold(dropout_p), DROPOUT=dropout_p > 0, BLOCK_M=c.BLOCK_M, BLOCK_K=c.BLOCK_C, BLOCK_R=c.BLOCK_R,
        INPUT_PRECISION=input_precision(x.dtype), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def launch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    y: Tensor,
    scaling: float,
    *,
    load_s: bool,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """Y = X W^T + bias + (S B^T) ∘ keep, with S = scaling X A^T stored into ``s`` (unless None) or, ``load_s``, read from it.

    x [M, K], weight [N, K], bias [N], lora_a [r, K], lora_b [N, r]; s [M, r] and y [M, N] with unit column stride. The
    branch is masked where dropout_p > 0, which is the backward's use.
    """
    (m, k), n, r = x.shape, weight.shape[0], lora_b.shape[1]
    if m == 0:
        return
    c = linear_config(m, n, r, x.dtype, lora_b.dtype, shared_limit(x.device), masked=dropout_p > 0)
    grid = (triton.cdiv(m, c.BLOCK_M) * triton.cdiv(n, c.BLOCK_N),)
    store_s = s is not None and not load_s
    # A pointer that is never followed still needs a type.
    s = y if s is None else s
    launch(
        _lora_linear_kernel, grid, x.device, x, weight, bias, lora_a, lora_b, s, y, seed, m, n, k, r,
        *x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(), s.stride(0), y.stride(0),
        scaling, _threshold(dropout_p), HAS_BIAS=bias is not None, LOAD_S=load_s, STORE_S=store_s,
        MASK_BRANCH=dropout_p > 0, EVEN_K=k % c.BLOCK_K == 0, ONE_RANK_BLOCK=r <= c.BLOCK_R, BLOCK_M=c.BLOCK_M,
        BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=c.BLOCK_R, GROUP_M=c.GROUP_M,
        INPUT_PRECISION=input_precision(x.dtype), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def launch_grads(
    x: Tensor | None,
    grad: Tensor,
    s: Tensor | None,
    ds: Tensor | None,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor,
    *,
    seed: Tensor | None,
    dropout_p: float,
) -> None:
    """Those of dA = dS^T (X ∘ keep), dB = dY^T S and dX = dY W + (dS A) ∘ keep that are not None.

    x [M, K], grad [M, N], weight [N, K], lora_a [r, K]; s and ds [M, r] and dx [M, K] with unit column stride; da [r, K] and
    db [N, r] contiguous. x is read for dA, weight and lora_a for dX.
    """
    (m, n), (r, k) = grad.shape, lora_a.shape
    c = weight_grads_config(n, k, r, grad.dtype)
    # dX's tile has n to sum over and k columns.
    t = linear_config(m, k, r, grad.dtype, lora_a.dtype, shared_limit(grad.device), masked=dropout_p > 0)
    tiles_x = 0 if dx is None else triton.cdiv(m, t.BLOCK_M) * triton.cdiv(k, t.BLOCK_N)
    tiles_a = 0 if da is None else triton.cdiv(k, c.BLOCK_C)
    tiles_b = 0 if db is None else triton.cdiv(n, c.BLOCK_C)
    grid = (tiles_x + (tiles_a + tiles_b) * triton.cdiv(r, c.BLOCK_R),)
    # A pointer that is never followed still needs a type.
    x, weight, s, ds, dx = (grad if given is None else given for given in (x, weight, s, ds, dx))
    da, db = da if da is not None else db, db if db is not None else da
    launch(
        _lora_linear_grads_kernel, grid, grad.device, x, weight, lora_a, lora_a, s, ds, grad, dx, da, db, seed,
        m, n, k, r, tiles_x, tiles_a, tiles_b, *x.stride(), *weight.stride(), *lora_a.stride(), s.stride(0), ds.stride(0),
        *grad.stride(), dx.stride(0), _threshold(dropout_p), WITH_DX=tiles_x > 0, DROPOUT=dropout_p > 0,
        EVEN_N=n % t.BLOCK_K == 0, BLOCK_M=c.BLOCK_M, BLOCK_C=c.BLOCK_C, DX_BLOCK_M=t.BLOCK_M, DX_BLOCK_K=t.BLOCK_N,
        DX_BLOCK_N=t.BLOCK_K, BLOCK_R=c.BLOCK_R, GROUP_M=t.GROUP_M, INPUT_PRECISION=input_precision(grad.dtype),
        num_warps=t.num_warps if tiles_x else c.num_warps, num_stages=t.num_stages if tiles_x else c.num_stages,
    )  # fmt: skip
