"""The roles that only load: the loader (X and W) and the aide (S and UP)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from benchmarks.lab.specialized.tiles import (
    ROWS,
    Place,
    copied,
    narrow_layout,
    next_place,
    split_rows,
    tile_of,
    tiles_of,
)

# Its name since Triton 3.8, and in 3.6 and 3.7.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def load_tiles(x_desc, w_desc, ring, sizes, TILE: gl.constexpr):
    """The loader."""
    BLOCK_K: gl.constexpr = TILE.BLOCK_K
    PART_M: gl.constexpr = ROWS * TILE.CTAS
    # The ring is empty at first: waits for the phase before the first one return.
    place = Place(gl.to_tensor(0), gl.to_tensor(1))
    for tile in range(sizes.program, tiles_of(sizes, TILE), sizes.PRODUCTS):
        row0, col0 = tile_of(tile, sizes, TILE)
        for k0 in range(0, sizes.K, BLOCK_K):
            ready = ring.ready.index(place.index)
            mbarrier.wait(ring.empty.index(place.index), place.phase)
            # Bytes of each CTA.
            mbarrier.expect(ready, 2 * BLOCK_K * (2 * ROWS + TILE.BLOCK_N))
            for half in gl.static_range(2):
                x_tile = ring.x.index(2 * place.index + half)
                load_box(x_desc, [row0 + half * PART_M, k0], ready, x_tile)
            w_tile = ring.w.index(place.index)
            w_row = k0 if TILE.TRANS_W else col0
            w_col = col0 if TILE.TRANS_W else k0
            if TILE.CTAS == 2:
                mbarrier.wait(ring.shared_empty.index(place.index), place.phase)
                load_box(w_desc, [w_row, w_col], ready, w_tile, multicast=True)
            else:
                load_box(w_desc, [w_row, w_col], ready, w_tile)
            place = next_place(place, TILE.STAGES)


@gluon.jit
def wait_for_flag(flags, row, M, BRANCH: gl.constexpr):
    """Wait until the rows of S that share the flag of ``row`` are stored. ``flags``: for each FLAG_M
    rows, how many tiles of S are.

    As the package's kernels do: one loop in the machine code, which the compiler does not see.
    """
    flag = gl.minimum(row, M - 1) // BRANCH.FLAG_M
    rows = gl.minimum(M - flag * BRANCH.FLAG_M, BRANCH.FLAG_M)
    gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        WAIT: ld.acquire.gpu.global.b32 $0, [$1];
        setp.lt.s32 p, $0, $2;
        @p bra WAIT;
        }""",
        "=&r,l,r,~{memory}",
        [flags + flag, gl.cdiv(rows, BRANCH.S_BLOCK_M)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_branch(branch, flags, buffers, sizes, TILE: gl.constexpr, BRANCH: gl.constexpr):
    """The aide."""
    BLOCK_R: gl.constexpr = BRANCH.BLOCK_R
    PART_M: gl.constexpr = ROWS * TILE.CTAS
    # Rows at a time: a few, for few registers. Fewer than 8 would cut the swizzle's pattern.
    DEEP: gl.constexpr = 2 if BLOCK_R > 32 else 1
    STEP: gl.constexpr = DEEP * 256 // BLOCK_R
    # A pair's part cannot be cut by rows.
    S_STEP: gl.constexpr = STEP if TILE.CTAS == 1 else PART_M
    of_up: gl.constexpr = narrow_layout(DEEP, BLOCK_R, copied(TILE.CTAS))
    of_s: gl.constexpr = narrow_layout(DEEP, BLOCK_R, split_rows(TILE.CTAS))
    up_rows = gl.arange(0, STEP, layout=gl.SliceLayout(1, of_up))
    up_ranks = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, of_up))
    s_rows = gl.arange(0, S_STEP, layout=gl.SliceLayout(1, of_s))
    s_ranks = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, of_s))
    phase = 1
    for tile in range(sizes.program, tiles_of(sizes, TILE), sizes.PRODUCTS):
        row0, col0 = tile_of(tile, sizes, TILE)
        mbarrier.wait(buffers.empty, phase)
        for j in gl.static_range(TILE.BLOCK_N // STEP):
            cols = (col0 + j * STEP + up_rows).to(gl.int64)
            inside = (cols[:, None] < sizes.N) & (up_ranks[None, :] < branch.R)
            up_ptrs = branch.up + cols[:, None] * branch.up_row + up_ranks[None, :] * branch.up_col
            up = gl.load(up_ptrs, mask=inside, other=0.0)
            buffers.up.slice(j * STEP, STEP, dim=0).store(up.to(buffers.up.dtype))
        for half in gl.static_range(2):
            part0 = row0 + half * PART_M
            wait_for_flag(flags, part0, sizes.M, BRANCH)
            for j in gl.static_range(PART_M // S_STEP):
                rows = (part0 + j * S_STEP + s_rows).to(gl.int64)
                inside = (rows[:, None] < sizes.M) & (s_ranks[None, :] < branch.R)
                s_ptrs = branch.s + rows[:, None] * branch.stride_s + s_ranks[None, :]
                s = gl.load(s_ptrs, mask=inside, other=0.0)
                if S_STEP == PART_M:
                    buffers.s.index(half).store(s)
                else:
                    buffers.s.index(half).slice(j * S_STEP, S_STEP, dim=0).store(s)
        fence_async_shared()
        mbarrier.arrive(buffers.ready, count=1)
        phase ^= 1
