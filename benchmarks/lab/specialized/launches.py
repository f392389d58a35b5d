"""The specialized product's operands and launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.lab.specialized.product import specialized_product_kernel
from benchmarks.lab.specialized.support import UnavailableError, reason_against
from benchmarks.lab.specialized.tiles import Branch, BranchTile, Registers, Tile, shared_layout
from stablelora_kernels.dispatch.problem import cdiv
from stablelora_kernels.launch.base import Launch

# 12 warps of 168 registers a thread fill a processor; then the loader and the aide give some back,
# and the consumers take them. The aide's loads need more than the loader's.
REGISTERS_AT_LAUNCH = 168
WITHOUT_AIDE, WITH_AIDE = Registers(240, 24), Registers(232, 40)
MAX_RANK = 64
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Operands(NamedTuple):
    """y = x w^T + bias + (s up^T) ∘ keep. ``w`` is [N, K], or [K, N] with ``trans_w``."""

    x: Tensor
    w: Tensor
    y: Tensor
    trans_w: bool = False
    s: Tensor | None = None
    # [N, R], of any strides and dtype.
    up: Tensor | None = None
    bias: Tensor | None = None
    # int32 [M, N / 32]
    mask: Tensor | None = None
    # int32, with S: for each 128 rows, how many tiles of S are stored.
    flags: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[1]


def tile_for(rank: int, masked: bool, trans_w: bool, pairs: bool) -> Tile:
    """The tile whose registers and shared memory suffice."""
    columns = 256
    if masked or rank > 16:
        # A masked branch's accumulator of its own takes registers; wide blocks of ranks take the
        # shared memory of half of Y's buffer.
        columns = 128
    if masked and rank > 16:
        columns = 64
    buffer = 256 if rank <= 16 else 128
    return Tile(
        TRANS_W=trans_w,
        CTAS=2 if pairs else 1,
        PART_N=columns,
        STORE_N=columns,
        BUFFER_N=buffer,
    )


def _descriptor(t: Tensor, rows: int, columns: int, bases: list[list[int]]) -> TensorDescriptor:
    layout = shared_layout(rows, columns, DTYPES[t.dtype], bases)
    return TensorDescriptor(t, [*t.shape], [*t.stride()], [rows, columns], layout)


def launch_product(operands: Operands, programs: int, pairs: bool = False) -> Launch:
    """The launch. ``programs``: at most so many, of one CTA each, or of two with ``pairs``.

    Raises:
        UnavailableError: the installed Triton cannot compile it.
        ValueError: the kernel cannot compute this product.
    """
    x, w, y = operands.x, operands.w, operands.y
    rank = operands.rank
    if reason := reason_against(pairs):
        raise UnavailableError(reason)
    if x.dtype not in DTYPES or {w.dtype, y.dtype} != {x.dtype}:
        raise ValueError(
            f"x, w and y must have one dtype of bfloat16 and float16, got {x.dtype}, {w.dtype} and {y.dtype}"
        )
    if rank > MAX_RANK:
        raise ValueError(f"up must have at most {MAX_RANK} columns, got {rank}")
    if operands.mask is not None and operands.s is None:
        raise ValueError("mask needs s and up: it masks the branch")
    tile = tile_for(rank, operands.mask is not None, operands.trans_w, pairs)
    m, k = x.shape
    n = y.shape[1]
    part_m = 64 * tile.CTAS
    tiles = cdiv(m, 2 * part_m) * cdiv(n, tile.BLOCK_N)
    products = min(tiles, programs)
    w_block = (tile.BLOCK_N, tile.BLOCK_K)
    if operands.trans_w:
        w_block = (tile.BLOCK_K, tile.BLOCK_N)
    split = [[1, 0]] if pairs else []
    copied = [[0, 0]] if pairs else []
    branch = None
    branch_tile = None
    registers = WITHOUT_AIDE
    if operands.s is not None and operands.up is not None:
        s, up = operands.s, operands.up
        branch = Branch(s, s.stride(0), up, up.stride(0), up.stride(1), rank)
        block_r = max(16, triton.next_power_of_2(rank))
        branch_tile = BranchTile(block_r)
        registers = WITH_AIDE
    args = (
        _descriptor(x, part_m, tile.BLOCK_K, split),
        _descriptor(w, *w_block, copied),
        _descriptor(y, part_m, tile.STORE_N, split),
        branch,
        operands.mask,
        operands.flags,
        operands.bias,
        m,
        n,
        k,
        products,
    )
    constants = {"TILE": tile, "BRANCH": branch_tile, "REGISTERS": registers}
    options = {"num_warps": 4, "num_ctas": tile.CTAS, "maxnreg": REGISTERS_AT_LAUNCH}
    variant = "pairs of CTAs" if pairs else "one CTA a tile"
    return Launch(
        specialized_product_kernel, variant, "an experiment", (products,), args, constants, options
    )
