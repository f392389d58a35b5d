"""What the roles of the specialized product share: its records, layouts, barriers and tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Rows of a consumer's part of a tile, in each CTA.
ROWS: gl.constexpr = gl.constexpr(64)


class Tile(NamedTuple):
    """Sizes of a product's step and of its end."""

    BLOCK_N: int = 256
    BLOCK_K: int = 64
    STAGES: int = 3
    GROUP_M: int = 8
    TRANS_W: bool = False
    # CTAs of a cluster: 1, or 2 that share W.
    CTAS: int = 1
    # Columns that a consumer finishes at a time.
    PART_N: int = 256
    # Columns of one store.
    STORE_N: int = 256
    # Columns of Y that a consumer's buffer holds.
    BUFFER_N: int = 256


class BranchTile(NamedTuple):
    """The branch's block of ranks, and the rows of one flag and of one tile of S."""

    BLOCK_R: int = 16
    FLAG_M: int = 128
    S_BLOCK_M: int = 128


class Registers(NamedTuple):
    """Of each thread of a consumer, and of the loader and the aide."""

    consumer: int = 240
    helper: int = 24


class Branch(NamedTuple):
    """LoRA's branch in global memory."""

    s: Any
    stride_s: Any
    up: Any
    up_row: Any
    up_col: Any
    R: Any


class Sizes(NamedTuple):
    M: Any
    N: Any
    K: Any
    # Programs of the launch, and this one's number.
    PRODUCTS: Any
    program: Any


class Ring(NamedTuple):
    """The tiles of X and W in shared memory. ``ready``: a tile is there. ``empty``: both consumers
    of this CTA have read it. ``shared_empty``: those of all CTAs have, so that W's part may go.
    """

    x: Any
    w: Any
    ready: Any
    empty: Any
    shared_empty: Any


class BranchBuffers(NamedTuple):
    """S's and UP's part of one tile in shared memory, and the same two barriers."""

    s: Any
    up: Any
    ready: Any
    empty: Any


class Place(NamedTuple):
    """A place in a ring, and the parity of its barriers' phase there."""

    index: Any
    phase: Any


@gluon.constexpr_function
def split_rows(ctas):
    """The bases of a layout whose rows are split over a cluster's CTAs."""
    return [[1, 0]] if ctas == 2 else []


@gluon.constexpr_function
def copied(ctas):
    """The bases of a layout of which each CTA has a copy."""
    return [[0, 0]] if ctas == 2 else []


@gluon.constexpr_function
def accumulator(columns, ctas):
    if ctas == 1:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16], split_rows(ctas))


@gluon.constexpr_function
def shared_layout(rows, columns, dtype, bases):
    if not bases:
        return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype, cga_layout=bases)


@gluon.constexpr_function
def narrow_layout(deep, block_r, bases):
    """Of a warp's load of BLOCK_R columns: a thread has 8 neighbors of each of ``deep`` rows."""
    lanes = [256 // block_r, block_r // 8]
    if not bases:
        return gl.BlockedLayout([deep, 8], lanes, [1, 1], [1, 0])
    return gl.BlockedLayout([deep, 8], lanes, [1, 1], [1, 0], bases)


@gluon.constexpr_function
def barrier_layout(bases):
    return mbarrier.MBarrierLayout(bases) if bases else mbarrier.MBarrierLayout()


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr, width: gl.constexpr, bases: gl.constexpr):
    """``count`` mbarriers, each completed by ``arrivals``; ``width``: by how many CTAs have one."""
    made = gl.allocate_shared_memory(gl.int64, [count, width], barrier_layout(bases))
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def next_place(place, SIZE: gl.constexpr):
    following = place.index + 1
    wraps = following == SIZE
    return Place(gl.where(wraps, 0, following), gl.where(wraps, place.phase ^ 1, place.phase))


@gluon.jit
def tile_of(number, sizes, TILE: gl.constexpr):
    """The first row and column of the ``number``-th tile. Tiles follow each other down GROUP_M rows
    of tiles, so that those at work at the same time share reads.
    """
    BLOCK_M: gl.constexpr = 2 * ROWS * TILE.CTAS
    tiles_m = gl.cdiv(sizes.M, BLOCK_M)
    tiles_n = gl.cdiv(sizes.N, TILE.BLOCK_N)
    group = number // (TILE.GROUP_M * tiles_n)
    rows_of_group = gl.minimum(tiles_m - group * TILE.GROUP_M, TILE.GROUP_M)
    within = number % (TILE.GROUP_M * tiles_n)
    pid_m = group * TILE.GROUP_M + within % rows_of_group
    pid_n = within // rows_of_group
    return pid_m * BLOCK_M, pid_n * TILE.BLOCK_N


@gluon.jit
def tiles_of(sizes, TILE: gl.constexpr):
    return gl.cdiv(sizes.M, 2 * ROWS * TILE.CTAS) * gl.cdiv(sizes.N, TILE.BLOCK_N)
