"""Which kernels a call of ``lora_linear`` takes, and their tiles: two tables, each row with its reason. Needs no Triton.

No row has been timed on a GPU yet. They come from counting bytes and operations, and from what the compiler makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

# "auto" asks the table.
KERNELS = ("auto", "fused", "split", "vendor")


class Device(NamedTuple):
    """What the tables ask about a GPU."""

    # "sm_90", "gfx942"
    arch: str
    # Streaming multiprocessors, or compute units.
    processors: int
    # Bytes of shared memory that one program may have.
    shared_limit: int

    @property
    def nvidia(self) -> bool:
        return self.arch.startswith("sm_")

    @property
    def generation(self) -> int:
        """NVIDIA's compute capability times ten, 0 for other makers."""
        return _generation(self.arch)

    @property
    def tma(self) -> bool:
        """Whether the descriptors' kernel pays: matrix instructions that read shared memory behind the loads."""
        return self.shared_limit >= 200_000 and self.generation >= 90

    @property
    def tf32(self) -> bool:
        """Whether there are TensorFloat-32 products."""
        return self.generation >= 80 or self.arch == "gfx942"

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin before the one ahead of it has ended (programmatic dependent launch)."""
        return self.generation >= 90


@cache
def _generation(arch: str) -> int:
    # Asked for ten times in a call.
    return int(arch[3:]) if arch.startswith("sm_") else 0


# One of each kind that the kernels are compiled for; processors as on the model named.
DEVICES = {
    d.arch: d
    for d in (
        Device("sm_80", 108, 166_912),  # A100
        Device("sm_86", 84, 101_376),  # A40
        Device("sm_89", 142, 101_376),  # L40S
        Device("sm_90", 132, 232_448),  # H100
        Device("sm_100", 148, 232_448),  # B200
        Device("sm_120", 170, 101_376),  # RTX 5090
        Device("gfx90a", 104, 65_536),  # MI250X, one of its two dies
        Device("gfx942", 304, 65_536),  # MI300X
    )
}


@cache
def device_of(device: torch.device) -> Device:
    """The GPU behind ``device``; an H100 where the interpreter stands in for one."""
    if device.type != "cuda":
        return DEVICES["sm_90"]
    import triton

    index = torch.cuda.current_device() if device.index is None else device.index
    properties = torch.cuda.get_device_properties(index)
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    return Device(arch_of(properties), properties.multi_processor_count, limits["max_shared_mem"])


def arch_of(properties: Any) -> str:
    """``"sm_90"`` or ``"gfx942"``, of what ``torch.cuda.get_device_properties`` gives."""
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


class Call(NamedTuple):
    """A product with its LoRA branch: the forward's, [M, K] by [N, K]^T, or dX's, where K and N have changed places."""

    # "forward" or "backward".
    direction: str
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    lora_dtype: torch.dtype
    dropout: bool
    # Whether the result is added to what is there: dX of the second and further projections of one X.
    add: bool = False

    @property
    def masked(self) -> bool:
        """Whether dropout's mask falls on the branch's result (backward), not on X (forward)."""
        return self.dropout and self.direction == "backward"


# Which kernel.

# Up to here a product is bound by reading W, whatever is computed beside it.
SMALL_M = 64
# What a fused kernel's S can be: one block of ranks in registers.
MAX_FUSED_R = 64


class Rule(NamedTuple):
    applies: Callable[[Device, Call], bool]
    kernel: str
    reason: str


# The first row that applies is taken.
RULES = (
    Rule(
        lambda d, c: c.dtype == torch.float32 and c.m > 16,
        "vendor",
        "float32, more than 16 rows: Triton's exact product has no matrix instruction, the vendor's is tuned by hand",
    ),
    Rule(
        lambda d, c: c.direction == "backward",
        "split",
        "dX: dS on its own goes with dB, in one pass over dY, and dA with dX: two launches that may overlap, at any rank",
    ),
    Rule(
        lambda d, c: c.dropout,
        "split",
        "dropout: the mask is drawn once an element, not again for every column tile",
    ),
    Rule(
        lambda d, c: c.m <= SMALL_M and c.r <= MAX_FUSED_R,
        "fused",
        f"up to {SMALL_M} rows and rank {MAX_FUSED_R}: bound by reading W, S costs little beside it, and saves a launch",
    ),
    Rule(
        lambda d, c: True,
        "split",
        "many rows or a high rank: one more read of X costs less than S beside every column tile, whose matrix instructions "
        "are too narrow to be fed at full rate",
    ),
)


class QuantisedRule(NamedTuple):
    # The last argument: 4 or 8, the bits of an element of W.
    applies: Callable[[Device, Call, int], bool]
    kernel: str
    reason: str


# W in 4 or 8 bits: dequantised in the product's own loop, or by a launch before it, for one of the kernels above.
QUANTISED_RULES = (
    QuantisedRule(
        lambda d, c, bits: c.dtype == torch.float32 and c.m > 16,
        "dequantise",
        "float32, more than 16 rows: the products are the vendor's, who wants a plain W",
    ),
    QuantisedRule(
        lambda d, c, bits: c.m > 256,
        "dequantise",
        "more than 256 rows: W in full is written and read once, 4 bytes an element; in the loop every 128 rows would look up "
        "and scale each element anew, 13 to 19 instructions",
    ),
    QuantisedRule(
        lambda d, c, bits: bits == 4 and c.direction == "backward" and c.m > 128,
        "dequantise",
        "dX from 4 bits, more than 128 rows: turning a tile in shared memory makes 6 of 19 instructions an element go to memory",
    ),
    QuantisedRule(
        lambda d, c, bits: True,
        "in_loop",
        "few rows: W is read as it is stored, and no memory is taken for it in full",
    ),
)


class Choice(NamedTuple):
    kernel: str
    reason: str
    # None: the table's.
    tile: Tile | None = None


def choose(device: Device, call: Call, forced: str | None = None) -> Choice:
    """The kernel for ``call``: the table's, or ``forced``, or what :func:`use_kernel` forces.

    Raises:
        ValueError: the kernel that is forced can't do this call.
    """
    forced = forced or _kernel
    if forced == "auto":
        return next(Choice(rule.kernel, rule.reason) for rule in RULES if rule.applies(device, call))
    check_possible(call, forced)
    return Choice(forced, "asked for")


def choose_quantised(device: Device, call: Call, bits: int, aligned: bool = True) -> Choice:
    """``"in_loop"`` or ``"dequantise"`` for a call with a W of 4 or 8 bits; a kernel that is forced takes W in full.

    ``aligned``: whether rows of W begin at multiples of 16 bytes, and none of its blocks lies across two of them.
    """
    if _kernel != "auto":
        return Choice("dequantise", f"kernel {_kernel!r} was asked for, which reads a plain W")
    if not aligned:
        return Choice(
            "dequantise", "rows of W that begin anywhere: single bytes and a scale an element outgrow a pipeline"
        )
    return next(Choice(rule.kernel, rule.reason) for rule in QUANTISED_RULES if rule.applies(device, call, bits))


class Sharing(NamedTuple):
    shared: bool
    reason: str


def choose_group(calls: Sequence[Call], choices: Sequence[Choice | None]) -> Sharing:
    """Whether projections of one X get their S (and dA) from one read of it, in a launch of its own, or each by itself."""
    if any(choice is not None and choice.kernel == "fused" for choice in choices):
        return Sharing(False, "S is computed beside a product, which saves its launch")
    if calls[0].m <= SMALL_M:
        return Sharing(False, f"up to {SMALL_M} rows: X stays in L2, whoever reads it")
    if max(call.r for call in calls) > MAX_FUSED_R:
        return Sharing(False, f"a rank above {MAX_FUSED_R}: the sums of several projections outgrow the registers")
    return Sharing(True, "one read of X for all projections")


def branch_fuses(call: Call) -> bool:
    """Whether the branch's own backward computes dS within dX's launch, and not in one of its own with dB.

    That saves a launch where rows are few, and reads dY once more, which costs more than a launch where they are many.
    """
    return call.m <= SMALL_M and call.r <= MAX_FUSED_R


def check_possible(call: Call, kernel: str) -> None:
    """Raise ValueError if ``kernel`` can't do ``call``."""
    if kernel == "fused" and call.direction == "forward" and call.dropout:
        raise ValueError("kernel 'fused' was asked for, but it has no dropout; 'split' and 'vendor' have")
    if kernel == "fused" and call.r > MAX_FUSED_R:
        raise ValueError(f"kernel 'fused' was asked for, but it takes ranks up to {MAX_FUSED_R}, got {call.r}")


_kernel = "auto"


def _check(name: str, source: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, KERNELS))}, got {name!r}")
    return name


_kernel = _check(os.environ.get("STABLELORA_KERNEL", "auto"), "the environment variable STABLELORA_KERNEL")


def get_kernel() -> str:
    """The kernel in force: ``"auto"`` or the one that was forced."""
    return _kernel


def set_kernel(name: str) -> None:
    """Force one kernel on every call that runs on Triton, process-wide, or give the choice back with ``"auto"``.

    ``"fused"``: S beside the product, one launch. ``"split"``: S first, then the product with the branch. ``"vendor"``: the
    product by the vendor's library, then the branch onto it. The start value is the environment variable
    ``STABLELORA_KERNEL``, or ``"auto"``. A call that the forced kernel can't do raises.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _kernel
    _kernel = _check(name, "kernel")


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Like :func:`set_kernel`, for the body of a ``with`` statement. It holds for the whole process, threads included."""
    before = get_kernel()
    set_kernel(name)
    try:
        yield
    finally:
        set_kernel(before)


# Which tiles.


class Tile(NamedTuple):
    """Rows, columns and depth of a program's step; for dA and dB, their columns and the rows that are summed over."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class TileRule(NamedTuple):
    applies: Callable[[Device, Call], bool]
    tile: Tile
    reason: str


def rank_block(r: int, limit: int) -> int:
    """The rank padded to what a matrix instruction takes, a power of two of at least 16; ``limit`` where it is looped over."""
    return min(max(16, 1 << (r - 1).bit_length()), limit)


# Y's tiles read through descriptors (lora_linear_tma).
TMA_TILES = (
    TileRule(
        lambda d, c: c.n < 1024 or c.m < 1024,
        Tile(128, 128, 64, 8, 4),
        "a small result needs more tiles to fill the GPU",
    ),
    TileRule(
        lambda d, c: c.masked and (c.r > 32 or c.add),
        Tile(128, 128, 64, 8, 4),
        "a rank block of 64, or Y's earlier values, beside the mask's random numbers spill registers in a wider tile",
    ),
    TileRule(
        lambda d, c: d.generation >= 100,
        Tile(128, 128, 64, 8, 4),
        "Blackwell: a wider tile and its branch outgrow tensor memory, which the compiler answers with an empty kernel",
    ),
    TileRule(
        lambda d, c: True,
        Tile(128, 256, 64, 8, 3),
        "the widest matrix instruction, whose operands are read 1.5 times less often than 128 by 128",
    ),
)

# Y's tiles read through pointers (lora_linear).
LINEAR_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 4, 3), "float32: products are in registers"),
    TileRule(
        lambda d, c: d.shared_limit < 200_000 and c.r > 32,
        Tile(64, 128, 64, 4, 3),
        "a wide rank block beside 128 by 128 spills where accumulators are in registers, or outgrows shared memory",
    ),
    TileRule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "the usual tile"),
)

# Y for few rows (lora_linear_small): BLOCK_M is 16 or 64, whichever M fits.
SMALL_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 64, 4, 3), "float32: twice the bytes an element"),
    TileRule(lambda d, c: d.shared_limit < 100_000, Tile(16, 64, 64, 4, 3), "little shared memory"),
    TileRule(lambda d, c: True, Tile(16, 64, 128, 4, 4), "many bytes of W on their way at once, in narrow tiles"),
)

# Y with a quantised W (lora_linear_quantised): BLOCK_M is 16 or 64 where M fits.
QUANTISED_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(16, 64, 32, 8, 2), "float32: products are in registers"),
    TileRule(lambda d, c: not d.nvidia, Tile(64, 64, 64, 4, 2), "wider tiles of W, dequantised in registers, spill"),
    TileRule(lambda d, c: c.m <= 16, Tile(16, 64, 128, 4, 3), "many bytes of W on their way at once, in narrow tiles"),
    TileRule(lambda d, c: d.shared_limit < 150_000, Tile(64, 64, 64, 4, 3), "little shared memory"),
    TileRule(lambda d, c: c.m <= SMALL_M, Tile(64, 128, 64, 4, 3), "rows of one wide matrix instruction"),
    TileRule(lambda d, c: True, Tile(128, 128, 64, 8, 3), "each element of W is dequantised for as many rows as fit"),
)

# S (lora_shrink): rows, ranks and K; BLOCK_N is the rank's block.
SHRINK_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 128, 32, 4, 3), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 64 and d.shared_limit < 100_000, Tile(64, 128, 64, 8, 3), "little shared memory"),
    TileRule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so that X is read once"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 64, 4, 4), "random numbers for 64 by 128 would take most registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 128, 4, 3), "rows of one wide matrix instruction, X read in long runs"),
)

# S of several projections (lora_shrink_group), likewise; r is the largest rank's block.
SHRINK_GROUP_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 8, 3), "float32: products are in registers"),
    TileRule(
        lambda d, c: c.r > 32 and c.dropout and d.nvidia and not d.tma,
        Tile(32, 64, 32, 8, 3),
        "three sums, random numbers and X in registers: more rows spill",
    ),
    TileRule(lambda d, c: c.r > 32 and c.dropout, Tile(64, 64, 32, 8, 3), "three sums and random numbers in registers"),
    TileRule(lambda d, c: c.r > 32, Tile(64, 64, 64, 8, 3), "three sums in registers"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 32, 4, 4), "random numbers for each projection in registers"),
    TileRule(
        lambda d, c: True, Tile(128, 64, 64, 8, 3), "the A's, more bytes than a step of X, are read once for 128 rows"
    ),
)

# The branch onto a finished product (lora_linear_branch).
BRANCH_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(64, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 3), "rows of one wide matrix instruction"),
)

# dA and dB (lora_linear_grads): BLOCK_M columns of the result, BLOCK_N ranks, BLOCK_K rows that are summed over.
GRADS_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(32, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 64, Tile(64, 256, 64, 8, 3), "all ranks in one block, so that X and dY are read once"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "rows of one wide matrix instruction"),
)

# dA of several projections (lora_linear_grads_group), likewise.
GRADS_GROUP_TILES = (
    TileRule(lambda d, c: c.dtype == torch.float32, Tile(32, 64, 32, 4, 2), "float32: products are in registers"),
    TileRule(lambda d, c: c.r > 32, Tile(64, 64, 32, 8, 3), "three sums in registers"),
    TileRule(lambda d, c: c.dropout, Tile(64, 64, 32, 4, 4), "random numbers for each projection in registers"),
    TileRule(lambda d, c: True, Tile(64, 64, 64, 4, 4), "rows of one wide matrix instruction"),
)


def pick_tile(
    rules: tuple[TileRule, ...], device: Device, call: Call, measured: Tile | None = None
) -> tuple[Tile, str]:
    """The tile of the first rule that applies, or the one that was measured to be faster, and the reason for it.

    It is still to be fitted into shared memory.
    """
    if measured is not None:
        return measured, "measured to be the fastest"
    return next((rule.tile, rule.reason) for rule in rules if rule.applies(device, call))


def fit(tile: Tile, device: Device, bytes_a_stage: int, bytes_beside: int = 0) -> Tile:
    """``tile`` with the deepest pipeline of at most its own, and at least 2, whose buffers fit into shared memory."""
    # Matrix units that read shared memory while it is being filled need a buffer more.
    spare = 0 if device.tma else 1
    stages = tile.num_stages
    while stages > 2 and (stages - spare) * bytes_a_stage + bytes_beside > device.shared_limit:
        stages -= 1
    return tile._replace(num_stages=stages)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, made for kernels too, takes 5 times as long, and a call needs a dozen."""
    return -(-a // b)


def splits(device: Device, tiles: int, steps: int, programs: int = 2, least_steps: int = 4, most: int = 16) -> int:
    """How many programs share a tile's sum: enough for ``programs`` on every processor, each with ``least_steps`` steps."""
    return max(1, min(programs * device.processors // max(tiles, 1), steps // least_steps, most))


def chunks(rows: int, block_r: int, steps: int) -> int:
    """Into how many chunks of rows dB's sum is cut beside dS, so that what one of the two has read is in L2 for the other.

    A chunk's part of dB, stored and read again in float32, is an eighth of the chunk of dY that it sums up. Of ``steps`` of the
    sum, a chunk has at least 4.
    """
    return max(1, min(cdiv(rows, 32 * block_r), steps // 4))
