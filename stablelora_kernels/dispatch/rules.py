"""Which strategy a call takes, and which kernel: tables, each row with its reason. Needs no Triton.

A strategy says in which launches a call computes S and the product: "few_rows", "one_launch" or
"branch_first". A kernel is a function on the GPU. The kernel of a product in one launch is
"split_k", "tma" or "pointers".

A row of the strategies' table is a limit of the kernels, never a guess about time. Which of the
strategies that can do a call is faster, first use measures on the user's GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from stablelora_kernels.dispatch import problem
from stablelora_kernels.dispatch.problem import MAX_CHAINED_R, Call, Device, Rule, first
from stablelora_kernels.dispatch.settings import STRATEGIES, settings, tf32_allowed
from stablelora_kernels.dispatch.tiles import MAX_CHAINED_M, Tile, filled


class Choice(NamedTuple):
    strategy: str
    reason: str
    # A measured tile, or None for the table's.
    tile: Tile | None = None


FORCED = "forced by slk.settings or STABLELORA_STRATEGY"


def _can_take_few_rows(c: Call) -> bool:
    """Whether programs may each compute the S that they need: a forward of few rows, without
    dropout, whose ranks fit in registers.
    """
    few = c.m <= problem.SMALL_M and c.r <= problem.MAX_BLOCK_R
    return few and c.direction == "forward" and not c.dropout


def is_idle(device: Device, call: Call) -> bool:
    """Whether tiles of 128 by 128 would leave two fifths of the GPU idle."""
    programs = problem.cdiv(call.m, 128) * problem.cdiv(call.n, 128)
    return filled(device, programs) < 0.6


RULES = (
    Rule(lambda c: c.r == 0 and not c.gated, "branch_first", "no LoRA branch: nothing to fuse into the product"),
    Rule(lambda c: c.dtype == torch.float32 and c.m > 16,
         "branch_first", "float32, more than 16 rows: Triton has no exact float32 matrix instruction"),
    Rule(lambda c: c.r > MAX_CHAINED_R,
         "branch_first", f"above rank {MAX_CHAINED_R}: the low-rank product does not fit in registers beside the product"),
    Rule(lambda c: c.m > MAX_CHAINED_M,
         "branch_first", f"more than {MAX_CHAINED_M} rows: one launch has no flags for more blocks of 64"),
    Rule(_can_take_few_rows,
         "few_rows", f"up to {problem.SMALL_M} rows: reading W takes the time, so each program computes the low-rank product "
         "that it needs"),
    Rule(lambda c: True,
         "one_launch", "one launch, whose first programs compute the low-rank product for all others"),
)  # fmt: skip

# W in 4 or 8 bits: dequantized in the product's own loop, or by a launch before one of the
# strategies above. The rows also take the bits of an element of W, and whether W is aligned.
QUANTIZED_RULES = (
    Rule(lambda c, bits, aligned: not aligned,
         "dequantize", "unaligned rows of W: loading single bytes and scales would exceed shared memory"),
    Rule(lambda c, bits, aligned: c.dtype == torch.float32 and c.m > 16,
         "dequantize", "float32, more than 16 rows: the vendor's library computes the product and needs a dequantized W"),
    # Dequantizing once moves 4 bytes an element; the loop repeats 13 to 19 instructions an element.
    Rule(lambda c, bits, aligned: c.m > problem.IN_LOOP_M,
         "dequantize", f"more than {problem.IN_LOOP_M} rows: the product would dequantize W again for every 128 rows"),
    # Of 19 instructions an element, 6 would access shared memory.
    Rule(lambda c, bits, aligned: bits == 4 and c.direction == "backward" and c.m > problem.SMALL_M and c.k <= c.n,
         "dequantize", "4 bits, more than 64 rows, short sums: the product would also transpose each dequantized tile of W"),
    Rule(lambda c, bits, aligned: True, "in_loop", "few rows: the kernel reads W as it is stored"),
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


def choose(call: Call) -> Choice:
    """The strategy for ``call``: the table's, or the one that ``slk.settings`` forces.

    A forced strategy that can't do this call raises ValueError.
    """
    forced = settings.strategy
    if forced == "auto":
        return Choice(*first(RULES, call))
    if forced == "few_rows" and call.direction == "backward":
        # It is a forward's.
        forced = "one_launch"
    check_possible(call, forced)
    return Choice(forced, FORCED)


def choose_quantized(call: Call, bits: int, aligned: bool = True) -> Choice:
    """``"in_loop"`` or ``"dequantize"`` for a call with a W of 4 or 8 bits; a forced strategy takes
    W in full.

    ``aligned``: rows of W begin at multiples of 16 bytes, and no block of W lies across two rows.
    """
    forced = settings.strategy
    if forced != "auto":
        return Choice("dequantize", f"strategy {forced!r} is forced and needs a dequantized W")
    return Choice(*first(QUANTIZED_RULES, call, bits, aligned))


def choose_kernel(device: Device, call: Call, described: bool) -> tuple[str, str]:
    """The product's kernel, ``"split_k"``, ``"tma"`` or ``"pointers"``, and the reason for it.
    ``described``: tensor descriptors can hold X, W and Y.
    """
    return first(KERNEL_RULES, device, call, described)


# A branch without a product: one launch, or S (backward dS) has one of its own.
BRANCH_RULES = (
    Rule(lambda c: c.m <= MAX_CHAINED_M and c.r <= MAX_CHAINED_R,
         "one_launch", "one launch, whose first programs compute the low-rank product"),
    Rule(lambda c: True,
         "two_launches", f"above rank {MAX_CHAINED_R}, or more than {MAX_CHAINED_M} rows: the low-rank product has a launch of "
         "its own"),
)  # fmt: skip


def choose_branch(call: Call) -> Choice:
    """``"one_launch"`` or ``"two_launches"``."""
    return Choice(*first(BRANCH_RULES, call))


class Sharing(NamedTuple):
    shared: bool
    reason: str


def choose_group(calls: Sequence[Call]) -> Sharing:
    """Whether projections of one X get their S (and dA) from one read of it, in a launch of its
    own, or each by itself.
    """
    if not all(call.r for call in calls):
        return Sharing(False, "a projection has no LoRA branch")
    if calls[0].m <= problem.SMALL_M:
        return Sharing(
            False,
            f"up to {problem.SMALL_M} rows: x stays in the L2 cache, so one read of it gains nothing",
        )
    if max(call.r for call in calls) > problem.MAX_BLOCK_R:
        return Sharing(
            False,
            f"rank above {problem.MAX_BLOCK_R}: sums of several projections do not fit in registers",
        )
    return Sharing(True, "one read of x serves all projections")


def check_possible(call: Call, strategy: str) -> None:
    """Raise ValueError if ``strategy`` can't do ``call``. Without a branch each one can."""
    if call.r == 0:
        return
    if strategy == "few_rows":
        if call.dropout:
            raise ValueError(
                "strategy 'few_rows' was asked for, but it has no dropout; 'one_launch' and 'branch_first' have"
            )
        _check_limit(strategy, "rows", call.m, problem.SMALL_M)
        _check_limit(strategy, "ranks", call.r, problem.MAX_BLOCK_R)
    if strategy == "one_launch":
        _check_limit(strategy, "rows", call.m, MAX_CHAINED_M)
        _check_limit(strategy, "ranks", call.r, MAX_CHAINED_R)


def _check_limit(strategy: str, of: str, value: int, limit: int) -> None:
    if value > limit:
        raise ValueError(
            f"strategy {strategy!r} was asked for, but it takes {of} up to {limit}, got {value}"
        )


def possible_strategies(call: Call) -> list[str]:
    """Every strategy that can do ``call``."""
    possible = []
    for strategy in STRATEGIES[1:]:
        if strategy == "few_rows" and call.direction == "backward":
            continue
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


def choose_gate_up(
    device: Device, call: Call, described: bool, strategy: str | None = None
) -> GateUp:
    """The kernel for gate's and up's ``call``.

    ``strategy``: "one_launch" takes one kernel for both, and another one computes them one by one.
    None: the table's, or the one that is forced.
    """
    if strategy is None and settings.strategy != "auto":
        strategy = settings.strategy
    if strategy not in (None, "one_launch"):
        return GateUp(SEPARATE, f"strategy {strategy!r} computes one projection at a time")
    rows = [rule for rule in GATE_UP_RULES if strategy is None or rule.choice != SEPARATE]
    return GateUp(*first(rows, device, call, described))
