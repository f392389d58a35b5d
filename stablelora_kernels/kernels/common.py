"""Device functions that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.dispatch import backend

INTERPRETING: tl.constexpr = tl.constexpr(backend.INTERPRETING)
FENCES_COPIES: tl.constexpr = tl.constexpr(backend.TRITON_FENCES_COPIES)


@triton.jit
def dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """acc + a b, in float32."""
    # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply the integers.
    if INTERPRETING:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        if not FENCES_COPIES:
            _fence_copies()
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)


@triton.jit
def _fence_copies():
    """Make what threads have written to shared memory visible to a WGMMA, which reads it through
    the asynchronous proxy.

    Data-center Blackwell's products would need it too, but the pipeliner of Triton 3.6 refuses
    their loops with such a statement.
    """
    if targets_hopper():
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;",
            "=r",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def register_dot(a, b, acc, INPUT_PRECISION: tl.constexpr):
    """``dot`` in a loop, of an ``a`` in registers, as masked or gated tiles are, and float32 under
    TensorFloat-32.

    Hopper's product is complete on return. Triton lets asynchronous products run on into the loop's
    next round, which overwrites these registers: Triton 3.6 and 3.7 keep no copy of them; Triton
    3.8 does, and its ptxas (CUDA 12.9) removes it again (triton-lang/triton#11781).
    """
    acc = dot(a, b, acc, INPUT_PRECISION)
    if not INTERPRETING:  # noqa: SIM102 - the interpreter does not know the other one
        if targets_hopper() and (a.dtype != tl.float32 or INPUT_PRECISION == "tf32"):
            acc = finished(acc)
    return acc


@triton.jit
def finished(acc):
    """Return ``acc`` once its product is complete.

    Triton lets an asynchronous product of Hopper's run on into the loop's next round, where a copy
    fills a buffer again. Triton adds a buffer for an operand that only this product reads. It adds
    none for an operand with another reader, so the copy would overwrite what the product still
    reads.
    """
    if not INTERPRETING:  # noqa: SIM102 - the interpreter does not know the other one
        if not targets_amd():
            # Any use of the values makes Triton wait for them.
            acc = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
            )
    return acc


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x as ``dtype``, rounded to nearest even."""
    if x.dtype == dtype:
        return x
    # The interpreter truncates to bfloat16; a GPU rounds.
    elif INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def draw_keep(seed, rows, col0, n_cols, threshold, BLOCK_C: tl.constexpr):
    """Draw dropout's mask for rows × [col0, col0 + BLOCK_C), as ``reference.dropout_keep_ref``
    defines it.

    One Philox call serves eight neighbors in a row, 15 bits each, so col0 must be a multiple of 8.
    Returns four uint32 [ROWS, BLOCK_C // 8]: bits 15 and 31 of the i-th are set where elements 2 i
    and 2 i + 1 of the eight are kept.
    """
    groups = col0 // 8 + tl.arange(0, BLOCK_C // 8)
    counter = rows[:, None].to(tl.int64) * tl.cdiv(n_cols, 8) + groups[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    return (
        _compare(w0, threshold),
        _compare(w1, threshold),
        _compare(w2, threshold),
        _compare(w3, threshold),
    )


@triton.jit
def _compare(word, threshold):
    """Set bits 15 and 31 of ``word`` where the 15 bits below them are at least ``threshold``."""
    # Both halves at once: 15 bits that reach the threshold carry into the half's highest bit.
    return (word.to(tl.uint32) & 0x7FFF7FFF) + (0x8000 - threshold).to(tl.uint32) * 0x10001


@triton.jit
def keep_of(drawn):
    """Whether each element is kept, int1 [ROWS, BLOCK_C], of what ``draw_keep`` returns."""
    w0, w1, w2, w3 = drawn
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return tl.interleave((words & 0x8000) != 0, words >= 0x80000000)


@triton.jit
def pack_keep(drawn):
    """The same as bytes, uint8 [ROWS, BLOCK_C // 8], the first element's bit the lowest."""
    w0, w1, w2, w3 = drawn
    bits = (
        ((w0 >> 6) & 0x02000200)
        | ((w1 >> 4) & 0x08000800)
        | ((w2 >> 2) & 0x20002000)
        | (w3 & 0x80008000)
    )
    return (((bits >> 9) & 0x55) | ((bits >> 24) & 0xAA)).to(tl.uint8)


@triton.jit
def load_keep(mask_ptr, rows, col0, M, n_cols, BLOCK_C: tl.constexpr):
    """The stored mask for rows × [col0, col0 + BLOCK_C), int1: as for operands of products, each
    thread with some neighbors.

    The mask has a bit an element, the first column's the lowest of a word: int32 [M, ceil(n_cols /
    32)].
    """
    tl.static_assert(BLOCK_C % 32 == 0)
    row_words = tl.cdiv(n_cols, 32)
    words = col0 // 32 + tl.arange(0, BLOCK_C // 32)
    inside = (rows[:, None] < M) & (words[None, :] < row_words)
    word = tl.load(mask_ptr + rows[:, None] * row_words + words[None, :], mask=inside, other=0)
    bit = tl.arange(0, 32)[None, None, :]
    # A thread has eight neighbors, so the first shift is one for all of them.
    bits = ((word[:, :, None] >> (bit & 24)) & (1 << (bit & 7))) != 0
    return tl.reshape(bits, (bits.shape[0], BLOCK_C))


@triton.jit
def load_words(mask_ptr, rows, col0, M, n_cols, BLOCK_C: tl.constexpr):
    """The stored mask's words for rows × [col0, col0 + BLOCK_C): one [ROWS] a 32 columns."""
    tl.static_assert(BLOCK_C % 32 == 0)
    words = ()
    for i in tl.static_range(BLOCK_C // 32):
        inside = rows < tl.where(col0 + 32 * i < n_cols, M, 0)
        words += (
            tl.load(mask_ptr + rows * tl.cdiv(n_cols, 32) + (col0 // 32 + i), mask=inside, other=0),
        )  # type: ignore[assignment]
    return words


@triton.jit
def unpack_words(words, BLOCK_C: tl.constexpr):
    """The elements' own bits, int1 [ROWS, BLOCK_C]: as in an accumulator, where a thread's columns
    are 8 apart.
    """
    cols = tl.arange(0, BLOCK_C)[None, :]
    keep = cols < 0
    for i in tl.static_range(BLOCK_C // 32):
        # A thread has the same place in each eight columns, so the shift is one for all of them.
        bits = (words[i][:, None] >> (cols & 7)) & (1 << (cols & 24))
        keep = tl.where(cols // 32 == i, bits != 0, keep)
    return keep


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of the pid-th tile. Tiles of GROUP_M rows run column by column, to share
    operands in L2.
    """
    group = pid // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return group * GROUP_M + inside % group_m, inside // group_m


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """1, 2, 4 or 8 equal parts of a tile's columns, from left to right."""
    parts = (tile,)
    if PARTS > 1:
        parts = _halves(tile)
    if PARTS > 2:
        parts = _halves(parts[0]) + _halves(parts[1])  # type: ignore[misc]
    if PARTS > 4:
        parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])  # type: ignore[misc]
    return parts


@triton.jit
def _halves(tile):
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@tl.core.builtin
def targets_amd(_semantic=None):
    """Whether the kernel is compiled for an AMD GPU, a constant."""
    return tl.constexpr(_semantic.builder.options.backend_name == "hip")


@tl.core.builtin
def targets_hopper(_semantic=None):
    """Whether the kernel is compiled for Hopper, a constant."""
    options = _semantic.builder.options
    return tl.constexpr(options.backend_name == "cuda" and options.arch == "sm90")


@triton.jit
def stores_done(n):
    """Wait until all threads' stores are done, so that an atomic may publish them; any int32 will
    do for ``n``.
    """
    if not INTERPRETING:  # noqa: SIM102 - the interpreter does not know the other one
        if targets_amd():
            # AMD's barrier waits for waves, not for their stores, and the atomic waits for its own
            # wave's stores alone.
            tl.inline_asm_elementwise(
                "s_waitcnt vmcnt(0)", "=v,0,~{memory}", [n], dtype=tl.int32, is_pure=False, pack=1
            )
    tl.debug_barrier()


@triton.jit
def arrives_last(counter_ptr, n):
    """Whether this is the last of n programs that share a counter. The last one may read what the
    others stored.

    The counter is an int32, 0 before and after. Chance decides which program is last, but not what
    it reads.
    """
    stores_done(n)
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == n - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def shared_sum(partial, parts_ptr, counter_ptr, place, split, n):
    """The sum of n programs' ``partial``, and whether this program has it.

    The last program to arrive adds up all parts in order.

    ``place``: the sum's number among those of the launch's job.
    """
    ROWS: tl.constexpr = partial.shape[0]
    COLUMNS: tl.constexpr = partial.shape[1]
    PART: tl.constexpr = ROWS * COLUMNS
    # To the pointer, not to a tile of them, which took registers through the main loop of quantized
    # products.
    parts_ptr += place.to(tl.int64) * n * PART
    ptrs = parts_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    last = n == 1
    if n > 1:
        tl.store(ptrs + split * PART, partial)
        last = arrives_last(counter_ptr + place, n)
        if last:
            partial = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for i in range(n):
                partial += tl.load(ptrs + i * PART, cache_modifier=".cg")
    return partial, last
