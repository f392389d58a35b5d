"""Which strategy a call takes, and which kernel: tables, each row with its reason. Needs no Triton.

A strategy says in which launches a call computes S and the product: "fused", "chained", "split" or
"vendor". A kernel is a function on the GPU. The kernel of a fused, chained or split product is
"split_k", "tma" or "pointers".

No row has been timed on a GPU yet. The rows follow from counts of bytes and operations, and from
the compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import MAX_CHAINED_R, Call, Device, Rule, first
from stablelora_kernels.dispatch.settings import STRATEGIES, get_kernel, tf32_allowed
from stablelora_kernels.dispatch.tiles import MAX_CHAINED_M, Tile, filled


class Choice(NamedTuple):
    strategy: str
    reason: str
    # A measured tile, or None for the table's.
    tile: Tile | None = None


FORCED = "forced by set_kernel, use_kernel or STABLELORA_KERNEL"


def _fusible(c: Call) -> bool:
    """Whether the table may take "fused": a forward without dropout whose ranks fit in registers."""
    return c.direction == "forward" and not c.dropout and c.r <= problem.MAX_FUSED_R


def is_idle(device: Device, call: Call) -> bool:
    """Whether tiles of 128 by 128 would leave two fifths of the GPU idle."""
    programs = problem.cdiv(call.m, 128) * problem.cdiv(call.n, 128)
    return filled(device, programs) < 0.6


def _is_hopper(device: Device) -> bool:
    return device.generation == 90


def _is_data_center_blackwell(device: Device) -> bool:
    return device.generation >= 100 and device.tma


def _multiplications(call: Call) -> int:
    """Of the product, without the branch."""
    return call.m * call.n * call.k


def _adds_to_branch(call: Call) -> bool:
    """Whether the vendor's product may be faster because it adds to the branch. A gated MLP's
    gradients need the branch after it.
    """
    return call.dtype != torch.float32 and call.m >= 512 and not call.gated


# Behind "predicted": how much more time than the best other strategy a row's choice takes on an H100,
# in the median of its calls and at the worst point of the ranges. docs/internals/predictions.md has
# every row, and says which have no prediction; benchmarks.lab.predict.support computes them.
RULES = (
    Rule(lambda d, c: c.r == 0 and not c.gated, "vendor", "no LoRA branch: nothing to fuse into the product"),
    Rule(lambda d, c: c.dtype == torch.float32 and c.m > 16,
         "vendor", "float32, more than 16 rows: Triton has no exact float32 matrix instruction"),
    # A fused kernel reads all of A for 64 columns, whose W it reads once: a larger A than that W
    # only in small layers. Predicted: -5 %, +13 %; on an A100 +13 %, +33 %.
    Rule(lambda d, c: _fusible(c) and c.m <= problem.SMALL_M and c.k >= c.n
         and (c.r * c.lora_dtype.itemsize <= 64 * c.dtype.itemsize or c.n * c.k <= 2**25),
         "fused", f"up to {problem.SMALL_M} rows, K at least N: reading W takes the time; few tiles compute x @ A.T again"),
    # A gated MLP's gradients need the branch behind the product. No prediction: the tables have single layers.
    Rule(lambda d, c: _is_data_center_blackwell(d) and c.gated and c.dtype != torch.float32 and _multiplications(c) >= 2**36,
         "vendor", "data-center Blackwell, a large product: L2 feeds our tiles more slowly than the vendor's, whose programs "
         "share what they read"),
    # Predicted: -4 %, +16 %; on an A100 -10 %, +11 %.
    Rule(lambda d, c: c.m >= 512 and (is_idle(d, c) or c.k >= 2 * c.n),
         "vendor", "few tiles or long sums: the vendor's library shares each tile among more programs"),
    # Predicted on an A100: -6 %, +9 %; on an RTX 4090 -2 %, +9 %; on an RTX 5090 -7 %, +8 %.
    Rule(lambda d, c: _adds_to_branch(c) and d.nvidia and not _is_hopper(d) and not _is_data_center_blackwell(d),
         "vendor", "from 512 rows: the vendor's product is predicted to gain more than a launch of the branch ahead of it costs"),
    # 2^34 are 1,024 rows through 4,096 x 4,096. Predicted on a B200: -14 %, +13 %.
    Rule(lambda d, c: _adds_to_branch(c) and _is_data_center_blackwell(d) and _multiplications(c) >= 2**34,
         "vendor", "data-center Blackwell: the vendor's product is predicted to gain more than a launch of the branch costs"),
    # The next three are Hopper's, whose chained launches hide the most. Predicted: -4 %, +16 %.
    Rule(lambda d, c: _adds_to_branch(c) and _is_hopper(d) and c.dropout and c.direction == "forward"
         and _multiplications(c) > 2**33,
         "vendor", "dropout: drawing the mask delays the tiles of one launch as long as a launch ahead of the vendor's product"),
    # Predicted: -2 %, +18 %.
    Rule(lambda d, c: _adds_to_branch(c) and _is_hopper(d) and c.direction == "backward"
         and (2 if c.dropout else 1) * c.m * max(c.r, 16) > 2**16,
         "vendor", "many rows or a high rank: the gradients of A and B take as long beside the product as in a launch before it"),
    # 2^36 are 4,096 rows through 4,096 x 4,096. Predicted: -3 %, +9 %.
    Rule(lambda d, c: _adds_to_branch(c) and _is_hopper(d) and _multiplications(c) > 2**36,
         "vendor", "a large product: the vendor's is predicted to gain more than a launch of the branch ahead of it costs"),
    # A wider block of ranks would spill registers; a shorter sum is over before programs could
    # share it. No prediction: the tables have no call of 65 to 511 rows.
    Rule(lambda d, c: _fusible(c) and problem.SMALL_M < c.m <= 512 and c.k >= 1024 and c.m * c.n * c.k <= 2**32
         and c.r <= (32 if d.tma else 16),
         "fused", "a product of a few microseconds: recomputing x @ A.T in each tile takes less time than waiting for it"),
    # Predicted: -4 %, +19 %; on a B200 up to +25 %.
    Rule(lambda d, c: c.m <= MAX_CHAINED_M and c.r <= problem.MAX_CHAINED_R,
         "chained", f"up to rank {MAX_CHAINED_R}: one launch, whose first programs compute the low-rank product for all others"),
    Rule(lambda d, c: True,
         "split", "a high rank: the low-rank product has a launch of its own, with more programs at a time"),
)  # fmt: skip

# W in 4 or 8 bits: dequantized in the product's own loop, or by a launch before one of the
# strategies above. The rows also take the bits of an element of W, and whether W is aligned.
QUANTIZED_RULES = (
    Rule(lambda d, c, bits, aligned: not aligned,
         "dequantize", "unaligned rows of W: loading single bytes and scales would exceed shared memory"),
    Rule(lambda d, c, bits, aligned: c.dtype == torch.float32 and c.m > 16,
         "dequantize", "float32, more than 16 rows: the vendor's library computes the product and needs a dequantized W"),
    # Dequantizing once moves 4 bytes an element; the loop repeats 13 to 19 instructions an element.
    Rule(lambda d, c, bits, aligned: c.m > problem.IN_LOOP_M,
         "dequantize", f"more than {problem.IN_LOOP_M} rows: the product would dequantize W again for every 128 rows"),
    # Of 19 instructions an element, 6 would access shared memory.
    Rule(lambda d, c, bits, aligned: bits == 4 and c.direction == "backward" and c.m > problem.SMALL_M and c.k <= c.n,
         "dequantize", "4 bits, more than 64 rows, short sums: the product would also transpose each dequantized tile of W"),
    Rule(lambda d, c, bits, aligned: True, "in_loop", "few rows: the kernel reads W as it is stored"),
)  # fmt: skip

# The product's kernel, where the vendor's library does not compute it. The rows also take whether
# tensor descriptors can hold X, W and Y.
KERNEL_RULES = (
    Rule(lambda d, c, described: c.m <= problem.SMALL_M,
         "split_k", "few rows: reading W takes the time, so programs split each tile's K until the whole GPU reads"),
    # A shorter sum is over before programs could share it.
    Rule(lambda d, c, described: c.dtype != torch.float32 and c.k >= 1024 and is_idle(d, c),
         "split_k", "128 x 128 tiles would leave two fifths of the GPU idle, so programs split each tile's K"),
    Rule(lambda d, c, described: described and d.tma and c.dtype != torch.float32,
         "tma", "TMA copies whole tiles, which frees registers and threads for matrix instructions"),
    Rule(lambda d, c, described: True, "pointers", "any GPU, any strides, any dtype"),
)  # fmt: skip


def choose(device: Device, call: Call) -> Choice:
    """The strategy for ``call``: the table's, or the one that :func:`use_kernel` forces.

    A forced strategy that can't do this call raises ValueError.
    """
    forced = get_kernel()
    if forced == "auto":
        return Choice(*first(RULES, device, call))
    check_possible(call, forced)
    return Choice(forced, FORCED)


def choose_quantized(device: Device, call: Call, bits: int, aligned: bool = True) -> Choice:
    """``"in_loop"`` or ``"dequantize"`` for a call with a W of 4 or 8 bits; a forced strategy takes
    W in full.

    ``aligned``: rows of W begin at multiples of 16 bytes, and no block of W lies across two rows.
    """
    forced = get_kernel()
    if forced != "auto":
        return Choice("dequantize", f"strategy {forced!r} is forced and needs a dequantized W")
    return Choice(*first(QUANTIZED_RULES, device, call, bits, aligned))


def choose_kernel(device: Device, call: Call, described: bool) -> str:
    """The product's kernel: ``"split_k"``, ``"tma"`` or ``"pointers"``. ``described``: tensor
    descriptors can hold X, W and Y.
    """
    return first(KERNEL_RULES, device, call, described)[0]


def _is_read_once(call: Call) -> bool:
    """Whether a chained launch reads X, or backward dY, from memory once. dB's programs follow dS's
    there, and find dY in half of an A100's L2 cache or of a larger one.
    """
    return call.direction == "forward" or call.m * call.k * call.dtype.itemsize <= 20 * 2**20


# A branch without a product: one launch, or S (backward dS) has one of its own. Predicted with the
# vendor's product that follows.
BRANCH_RULES = (
    # Predicted: -1 %, +4 %; on a B200 up to +8 %.
    Rule(lambda c: c.m <= MAX_CHAINED_M and c.r <= (MAX_CHAINED_R if c.m < 512 else 32) and _is_read_once(c),
         "chained", "one launch, whose first programs compute the low-rank product"),
    # Predicted: -1 %, +13 %.
    Rule(lambda c: True,
         "split", f"above rank 32 from 512 rows, above rank {MAX_CHAINED_R}, or backward with a gradient above 20 MiB: the "
         "low-rank product has a launch of its own"),
)  # fmt: skip


def choose_branch(call: Call) -> Choice:
    """``"chained"`` or ``"split"``."""
    return Choice(*first(BRANCH_RULES, call))


class Sharing(NamedTuple):
    shared: bool
    reason: str


def choose_group(calls: Sequence[Call], choices: Sequence[Choice | None]) -> Sharing:
    """Whether projections of one X get their S (and dA) from one read of it, in a launch of its
    own, or each by itself.
    """
    if not all(call.r for call in calls):
        return Sharing(False, "a projection has no LoRA branch")
    if any(choice is not None and choice.strategy == "fused" for choice in choices):
        return Sharing(False, "each product recomputes x @ A.T in its tiles, which saves a launch")
    if calls[0].m <= problem.SMALL_M:
        return Sharing(
            False,
            f"up to {problem.SMALL_M} rows: x stays in the L2 cache, so one read of it gains nothing",
        )
    if max(call.r for call in calls) > problem.MAX_FUSED_R:
        return Sharing(
            False,
            f"rank above {problem.MAX_FUSED_R}: sums of several projections do not fit in registers",
        )
    return Sharing(True, "one read of x serves all projections")


def check_possible(call: Call, strategy: str) -> None:
    """Raise ValueError if ``strategy`` can't do ``call``."""
    if strategy == "fused" and call.direction == "forward" and call.dropout:
        raise ValueError(
            "strategy 'fused' was asked for, but it has no dropout; 'chained', 'split' and 'vendor' have"
        )
    limit = {"fused": problem.MAX_FUSED_R, "chained": problem.MAX_CHAINED_R}.get(strategy)
    if limit is not None and call.r > limit:
        raise ValueError(
            f"strategy {strategy!r} was asked for, but it takes ranks up to {limit}, got {call.r}"
        )
    if strategy == "chained" and call.m > MAX_CHAINED_M:
        raise ValueError(
            f"strategy 'chained' was asked for, but it takes up to {MAX_CHAINED_M} rows, got {call.m}"
        )


def possible_strategies(call: Call) -> list[str]:
    """Every strategy that can do ``call``."""
    possible = []
    for strategy in STRATEGIES[1:]:
        with suppress(ValueError):
            check_possible(call, strategy)
            possible.append(strategy)
    return possible


def input_precision(device: Device, dtype: torch.dtype, transposed: bool = False) -> str:
    """Precision of float32 products: PyTorch's setting, so exact unless TensorFloat-32 is allowed
    and the GPU has it.

    ``transposed``: the operand is contiguous across the sum. TensorFloat-32's instructions want it
    contiguous along the sum, and would load it 4 bytes at a time. Loads bound these products, so
    they stay exact instead.
    """
    if dtype != torch.float32 or transposed or not (device.tf32 and tf32_allowed()):
        return "ieee"
    return "tf32"


# The kernel that computes gate, up and the activation together; SEPARATE: each has a launch of its
# own. The rows take gate's and up's call, and whether tensor descriptors can hold all matrices.
SEPARATE = "separate"
GATE_UP_RULES = (
    Rule(lambda d, c, described: c.dtype == torch.float32,
         SEPARATE, "float32: gate and up together do not fit in registers, or the vendor's library computes the product"),
    Rule(lambda d, c, described: c.m <= problem.SMALL_M,
         SEPARATE, f"up to {problem.SMALL_M} rows: reading W takes the time, so programs split each tile's K"),
    Rule(lambda d, c, described: is_idle(d, c),
         SEPARATE, "128 x 128 tiles would leave two fifths of the GPU idle; separate products split each tile's K"),
    Rule(lambda d, c, described: d.generation >= 100 and d.tma and c.m >= 1024,
         SEPARATE, "data-center Blackwell: the vendor's library computes gate and up, as it does a single projection"),
    Rule(lambda d, c, described: described and d.tma,
         "tma", "one kernel for gate and up: x is read once, and the activation needs no launch of its own"),
    Rule(lambda d, c, described: True,
         "pointers", "one kernel for gate and up, in narrower tiles: x is read once, and the activation needs no launch"),
)  # fmt: skip


class GateUp(NamedTuple):
    """How gate, up and the activation of a gated MLP are computed."""

    # "tma" or "pointers": by one kernel. SEPARATE: by launches of their own.
    kernel: str
    reason: str


def choose_gate_up(device: Device, call: Call, described: bool) -> GateUp:
    """The kernel for gate's and up's ``call``; the forced strategy "split" takes one for both."""
    forced = get_kernel()
    if forced not in ("auto", "split"):
        return GateUp(SEPARATE, f"strategy {forced!r} is forced and computes one projection")
    rows = [rule for rule in GATE_UP_RULES if forced == "auto" or rule.choice != SEPARATE]
    return GateUp(*first(rows, device, call, described))
