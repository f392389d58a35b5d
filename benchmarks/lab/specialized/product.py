"""Y = X W^T + bias + (S UP^T) ∘ keep on Hopper: persistent and warp-specialized.

X [M, K], W [N, K] (with TRANS_W [K, N], as backward has it for dX), S [M, R], UP [N, R], Y [M, N].

A CTA has 12 warps in four roles:

- Two consumers of four warps each multiply and finish the upper and the lower rows of a tile. Only
  the ring of tiles orders them, so one finishes its rows while the other one multiplies.
- The loader, one warp, fills the ring with tiles of X and W by TMA.
- The aide, one warp, waits for S's flag and puts S and UP, rounded, into shared memory.

With two CTAS, pairs of CTAs take tiles of twice as many rows and share W's part: each reads W from
L2 for both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from benchmarks.lab.specialized.loads import load_branch, load_tiles
from benchmarks.lab.specialized.tiles import (
    ROWS,
    BranchBuffers,
    Place,
    Ring,
    Sizes,
    accumulator,
    barriers,
    copied,
    next_place,
    shared_layout,
    split_rows,
    tile_of,
    tiles_of,
)

# Its name since Triton 3.8, and in 3.6 and 3.7.
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def column_parts(x, PARTS: gl.constexpr):
    """Equal parts of the columns, in registers."""
    parts = (x,)
    for _ in gl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for j in gl.static_range(len(parts)):
            whole = parts[j]
            pairs = whole.reshape(whole.shape[0], 2, whole.shape[1] // 2)
            halves += pairs.permute(0, 2, 1).split()
        parts = halves
    return parts


@gluon.jit
def keep_of(words, first: gl.constexpr, cols):
    """Whether each element of a part is kept: ``words[first]`` has the part's first 32 columns."""
    PART_N: gl.constexpr = cols.shape[0]
    word = words[first][:, None]
    for j in gl.static_range(1, PART_N // 32):
        word = gl.where((cols < 32 * j)[None, :], word, words[first + j][:, None])
    return ((word >> (cols & 31)[None, :]) & 1) != 0


@gluon.jit
def load_words(mask, rows, col0, sizes, BLOCK_N: gl.constexpr):
    """The mask's words of a tile: of each 32 columns, one for each row."""
    words = ()
    for j in gl.static_range(BLOCK_N // 32):
        inside = rows < gl.where(col0 + 32 * j < sizes.N, sizes.M, 0)
        ptrs = mask + rows * gl.cdiv(sizes.N, 32) + (col0 // 32 + j)
        words += (gl.load(ptrs, mask=inside, other=0),)
    return words


@gluon.jit
def load_bias(bias, cols, col0, N, PARTS: gl.constexpr, PART_N: gl.constexpr):
    """The bias of each part of a tile's columns."""
    biases = ()
    for j in gl.static_range(PARTS):
        at = col0 + j * PART_N + cols
        biases += (gl.load(bias + at, mask=at < N, other=0.0),)
    return biases


@gluon.jit
def step(ring, place, acc, HALF: gl.constexpr, ADDS: gl.constexpr, TRANS_W: gl.constexpr):
    """Begin one step's product, onto ``acc`` or anew. Return once the one before it is complete."""
    mbarrier.wait(ring.ready.index(place.index), place.phase)
    x_tile = ring.x.index(2 * place.index + HALF)
    w_tile = ring.w.index(place.index)
    if not TRANS_W:
        w_tile = w_tile.permute((1, 0))
    acc = warpgroup_mma(x_tile, w_tile, acc, use_acc=ADDS, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def give_back(ring, index, CTAS: gl.constexpr):
    """Say that this consumer has read a tile of the ring."""
    mbarrier.arrive(ring.empty.index(index), count=1)
    if CTAS == 2:
        mbarrier.arrive(ring.shared_empty.index(index), count=1)


@gluon.jit
def columns_of(buffer, first: gl.constexpr, count: gl.constexpr):
    if count == buffer.shape[1]:
        return buffer
    return buffer.slice(first, count, dim=1)


@gluon.jit
def store_part(y, y_desc, y_buf, row0, col0, FIRST: gl.constexpr, TILE: gl.constexpr):
    """Put columns FIRST to FIRST + PART_N of a tile into the buffer, and store those that are
    complete.
    """
    STORE_N: gl.constexpr = TILE.STORE_N
    END: gl.constexpr = FIRST + TILE.PART_N
    if FIRST % TILE.BUFFER_N == 0:
        # Wait until the stores out of the buffer have read it.
        tma.store_wait(0)
    columns_of(y_buf, FIRST % TILE.BUFFER_N, TILE.PART_N).store(y)
    if END % STORE_N == 0:
        fence_async_shared()
        stored = columns_of(y_buf, (END - STORE_N) % TILE.BUFFER_N, STORE_N)
        store_box(y_desc, [row0, col0 + END - STORE_N], stored)


@gluon.jit
def consume(
    ring, buffers, y_desc, y_bufs, mask, bias, sizes,
    HALF: gl.constexpr, TILE: gl.constexpr, BRANCH: gl.constexpr,
):  # fmt: skip
    """One consumer: the upper (HALF 0) or lower rows of each tile."""
    # Without a mask the branch is one more product onto the tile's accumulator.
    ADDED: gl.constexpr = BRANCH is not None and mask is None
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    PART_N: gl.constexpr = TILE.PART_N
    PARTS: gl.constexpr = BLOCK_N // PART_N
    PART_M: gl.constexpr = ROWS * TILE.CTAS
    whole: gl.constexpr = accumulator(BLOCK_N, TILE.CTAS)
    part: gl.constexpr = accumulator(PART_N, TILE.CTAS)
    zeros = gl.zeros((PART_M, BLOCK_N), gl.float32, whole)
    cols = gl.arange(0, PART_N, layout=gl.SliceLayout(0, part))
    row_numbers = gl.arange(0, PART_M, layout=gl.SliceLayout(1, part))
    y_buf = y_bufs.index(HALF)
    place = Place(gl.to_tensor(0), gl.to_tensor(0))
    branch_phase = 0
    for tile in range(sizes.program, tiles_of(sizes, TILE), sizes.PRODUCTS):
        tile_row0, col0 = tile_of(tile, sizes, TILE)
        row0 = tile_row0 + HALF * PART_M
        acc = step(ring, place, zeros, HALF, False, TILE.TRANS_W)
        # The tile of the ring that the product in flight reads.
        reads = place.index
        place = next_place(place, TILE.STAGES)
        for _ in range(TILE.BLOCK_K, sizes.K, TILE.BLOCK_K):
            acc = step(ring, place, acc, HALF, True, TILE.TRANS_W)
            give_back(ring, reads, TILE.CTAS)
            reads = place.index
            place = next_place(place, TILE.STAGES)

        # The wait for the last product hides the latency of these loads.
        if mask is not None:
            words = load_words(mask, (row0 + row_numbers).to(gl.int64), col0, sizes, BLOCK_N)
        if bias is not None:
            biases = load_bias(bias, cols, col0, sizes.N, PARTS, PART_N)
        if BRANCH is not None:
            mbarrier.wait(buffers.ready, branch_phase)
            branch_phase ^= 1
        if ADDED:
            up_tile = buffers.up.permute((1, 0))
            acc = warpgroup_mma(buffers.s.index(HALF), up_tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        give_back(ring, reads, TILE.CTAS)
        if ADDED:
            mbarrier.arrive(buffers.empty, count=1)

        # A part at a time: a masked branch has an accumulator of its own.
        parts = column_parts(acc, PARTS)
        for j in gl.static_range(PARTS):
            y = gl.convert_layout(parts[j], part, assert_trivial=True)
            if mask is not None:
                up_tile = buffers.up.slice(j * PART_N, PART_N, dim=0).permute((1, 0))
                empty = gl.zeros((PART_M, PART_N), gl.float32, part)
                added = warpgroup_mma(buffers.s.index(HALF), up_tile, empty, use_acc=False)
                y += gl.where(keep_of(words, PART_N // 32 * j, cols), added, 0.0)
            if bias is not None:
                y += biases[j].to(gl.float32)[None, :]
            store_part(y.to(y_desc.dtype), y_desc, y_buf, row0, col0, j * PART_N, TILE)
        if mask is not None:
            mbarrier.arrive(buffers.empty, count=1)
    tma.store_wait(0)


@gluon.jit
def product(
    x_desc, w_desc, y_desc, branch, mask, flags, bias, sizes,
    TILE: gl.constexpr, BRANCH: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """The tiles of one program."""
    STAGES: gl.constexpr = TILE.STAGES
    CTAS: gl.constexpr = TILE.CTAS
    dtype: gl.constexpr = x_desc.dtype
    SPLIT: gl.constexpr = [[1]] if CTAS == 2 else []
    LEADING: gl.constexpr = [[0]] if CTAS == 2 else []
    x_bufs = gl.allocate_shared_memory(
        dtype, [2 * STAGES, ROWS * CTAS, TILE.BLOCK_K], x_desc.layout
    )
    w_bufs = gl.allocate_shared_memory(
        dtype, [STAGES, w_desc.block_type.shape[0], w_desc.block_type.shape[1]], w_desc.layout
    )
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [2, ROWS * CTAS, TILE.BUFFER_N], y_desc.layout)
    ready = barriers(STAGES, 1, CTAS, SPLIT)
    empty = barriers(STAGES, 2, CTAS, SPLIT)
    shared_empty = empty
    if CTAS == 2:
        # One for both CTAs, to which the consumers of both say that they have read W.
        shared_empty = barriers(STAGES, 2, 1, LEADING)
    ring = Ring(x_bufs, w_bufs, ready, empty, shared_empty)
    if BRANCH is None:
        gl.warp_specialize(
            [
                (consume, (ring, None, y_desc, y_bufs, None, bias, sizes, 0, TILE, None)),
                (consume, (ring, None, y_desc, y_bufs, None, bias, sizes, 1, TILE, None)),
                (load_tiles, (x_desc, w_desc, ring, sizes, TILE)),
            ],
            [4, 1],
            [REGISTERS.consumer, REGISTERS.helper],
        )
    else:
        BLOCK_R: gl.constexpr = BRANCH.BLOCK_R
        of_s: gl.constexpr = shared_layout(ROWS * CTAS, BLOCK_R, dtype, split_rows(CTAS))
        of_up: gl.constexpr = shared_layout(TILE.BLOCK_N, BLOCK_R, dtype, copied(CTAS))
        s_buf = gl.allocate_shared_memory(dtype, [2, ROWS * CTAS, BLOCK_R], of_s)
        up_buf = gl.allocate_shared_memory(dtype, [TILE.BLOCK_N, BLOCK_R], of_up)
        branch_ready = barriers(1, 1, CTAS, SPLIT).index(0)
        branch_empty = barriers(1, 2, CTAS, SPLIT).index(0)
        buffers = BranchBuffers(s_buf, up_buf, branch_ready, branch_empty)
        gl.warp_specialize(
            [
                (consume, (ring, buffers, y_desc, y_bufs, mask, bias, sizes, 0, TILE, BRANCH)),
                (consume, (ring, buffers, y_desc, y_bufs, mask, bias, sizes, 1, TILE, BRANCH)),
                (load_tiles, (x_desc, w_desc, ring, sizes, TILE)),
                (load_branch, (branch, flags, buffers, sizes, TILE, BRANCH)),
            ],
            [4, 1, 1],
            [REGISTERS.consumer, REGISTERS.helper, REGISTERS.helper],
        )


@gluon.jit(do_not_specialize=["M", "PRODUCTS"])
def specialized_product_kernel(
    x_desc, w_desc, y_desc, branch, mask, flags, bias, M, N, K, PRODUCTS,
    TILE: gl.constexpr, BRANCH: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Each program takes every PRODUCTS-th tile."""
    sizes = Sizes(M, N, K, PRODUCTS, gl.program_id(0))
    product(x_desc, w_desc, y_desc, branch, mask, flags, bias, sizes, TILE, BRANCH, REGISTERS)
