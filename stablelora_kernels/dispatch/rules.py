"""Which kernels a call of ``lora_linear`` takes, and their tiles: two tables, each row with its reason. Needs no Triton.

No row has been timed on a GPU yet. They come from counting bytes and operations, and from what the compiler makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch.problem import MAX_FUSED_R, SMALL_M, Call, Device
from stablelora_kernels.dispatch.tiles import Tile

# "auto" asks the table.
KERNELS = ("auto", "fused", "split", "vendor")


# Which kernel.


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


class QuantizedRule(NamedTuple):
    # The last argument: 4 or 8, the bits of an element of W.
    applies: Callable[[Device, Call, int], bool]
    kernel: str
    reason: str


# W in 4 or 8 bits: dequantized in the product's own loop, or by a launch before it, for one of the kernels above.
QUANTIZED_RULES = (
    QuantizedRule(
        lambda d, c, bits: c.dtype == torch.float32 and c.m > 16,
        "dequantize",
        "float32, more than 16 rows: the products are the vendor's, who wants a plain W",
    ),
    QuantizedRule(
        lambda d, c, bits: c.m > 256,
        "dequantize",
        "more than 256 rows: W in full is written and read once, 4 bytes an element; in the loop every 128 rows would look up "
        "and scale each element anew, 13 to 19 instructions",
    ),
    QuantizedRule(
        lambda d, c, bits: bits == 4 and c.direction == "backward" and c.m > 128,
        "dequantize",
        "dX from 4 bits, more than 128 rows: turning a tile in shared memory makes 6 of 19 instructions an element go to memory",
    ),
    QuantizedRule(
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


def choose_quantized(device: Device, call: Call, bits: int, aligned: bool = True) -> Choice:
    """``"in_loop"`` or ``"dequantize"`` for a call with a W of 4 or 8 bits; a kernel that is forced takes W in full.

    ``aligned``: whether rows of W begin at multiples of 16 bytes, and none of its blocks lies across two of them.
    """
    if _kernel != "auto":
        return Choice("dequantize", f"kernel {_kernel!r} was asked for, which reads a plain W")
    if not aligned:
        return Choice(
            "dequantize", "rows of W that begin anywhere: single bytes and a scale an element outgrow a pipeline"
        )
    return next(Choice(rule.kernel, rule.reason) for rule in QUANTIZED_RULES if rule.applies(device, call, bits))


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
