"""The optimizer kernels' tables: rows, column offsets, codes and flags.

The host builds each row as one of the named tuples below. A kernel reads a column at the row's
address plus the column's offset. Kernels import the names that they use, not this module: Triton's
cache key covers globals, not a module's attributes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl


class TensorRow(NamedTuple):
    """One parameter, int64. A column named after a tensor holds its address, 0 for none.

    The number of columns must be odd, for the reason that HyperRow gives.
    """

    param: int
    exp_avg: int
    exp_avg_sq: int
    numel: int
    # The parameter's row in the other two tables.
    setting: int
    role: int = 0
    # ``base``, ``shard_columns`` and ``shard_pitch`` number the elements: see
    # stablelora_kernels.optim.sharding.Shard.
    base: int = 0
    # The first and the number of A's and of B's chunks in the sums of squares. FLAG_SHARDED: the
    # addresses of their totals.
    a_first: int = 0
    a_count: int = 0
    b_first: int = 0
    b_count: int = 0
    # The pair's W is [m, n].
    n: int = 0
    m: int = 0
    master: int = 0
    exp_avg_scale: int = 0
    exp_avg_sq_scale: int = 0
    shard_columns: int = 0
    shard_pitch: int = 0
    # The parameter's first chunk.
    first_chunk: int = 0


class HyperRow(NamedTuple):
    """The hyperparameters of one setting, float32. A column named after an option holds its value.

    13 columns, since rows of 12 (48 bytes) let the compiler load several columns at once and hold
    them. That costs bfloat16 and float16 ten registers on some GPUs.
    """

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    weight_decay: float
    shrink_ratio: float
    # -1 to maximize, else 1.
    sign: float
    log_beta1: float
    log_beta2: float
    lr: float
    # Multiplies the learning rate under FLAG_DYNAMIC.
    lr_ratio: float
    unused: float = 0.0


class WordRow(NamedTuple):
    """The addresses of one setting's scalars and its seed, int64. The addresses point into HyperRow
    or at a user's tensor.
    """

    lr: int
    # The seed's part of the rounding key.
    seed: int
    # The kernel reads these two addresses only under FLAG_DYNAMIC.
    weight_decay: int
    shrink_ratio: int


class AddressRow(NamedTuple):
    """The gradient of one parameter, int64: its address, 0 for none, and the variant of the code
    for the parameter's chunks.
    """

    grad: int
    variant: int


class PairRow(NamedTuple):
    """One pair A [r, n], B [m, r] of a shrinkage alone, int64. A column named after a tensor holds
    its address.
    """

    a: int
    b: int
    # A tensor of A's shape, dtype and strides that shrinks with A, or 0.
    beside: int
    a_numel: int
    b_numel: int
    # Variants of the code for A's chunks, and what is beside A, and for B's.
    a_variant: int
    b_variant: int
    n: int
    m: int
    # Whether A has a gradient.
    present: int
    # The pair's part of the rounding key.
    seed: int
    # ``base``, ``shard_columns`` and ``shard_pitch`` number the elements of A, as in TensorRow.
    base: int
    shard_columns: int
    shard_pitch: int
    # The pair's first program, how many of them have chunks of A, and how many there are.
    first_program: int
    a_chunks: int
    chunks: int


# Column offsets: a kernel reads ``row + TENSOR.value.numel``. Only the compiler, not the
# interpreter, unwraps a constexpr, hence ``.value``.
TENSOR = tl.constexpr(TensorRow(*range(len(TensorRow._fields))))
HYPER = tl.constexpr(HyperRow(*range(len(HyperRow._fields))))
WORD = tl.constexpr(WordRow(*range(len(WordRow._fields))))
ADDRESS = tl.constexpr(AddressRow(*range(len(AddressRow._fields))))
PAIR = tl.constexpr(PairRow(*range(len(PairRow._fields))))

KINDS = (torch.float32, torch.bfloat16, torch.float16)
# Variants of a chunk's code: twice the kind, plus one where every address and size is a multiple of
# 16.
N_VARIANTS = tl.constexpr(2 * len(KINDS))

# An A of ROLE_A_NEVER shrinks at every step and never latches.
ROLE_LONE = 0
ROLE_A = 1
ROLE_B = 2
ROLE_A_NEVER = 3
LATCHING_A = tl.constexpr(ROLE_A)
NEVER_LATCHING_A = tl.constexpr(ROLE_A_NEVER)

# FLAGS of a launch: options that some tensor or setting needs beyond the plain step.
# DYNAMIC: weight decay or shrink ratio is a tensor, or a tensor learning rate has an lr_ratio.
# LOW_MOMENTS: bfloat16 moments. 8BIT_MOMENTS: codes, with one scale a block of 256.
# SHARDED: the host has summed the pairs' squares over all processes.
# CUT: some shard is not one run of its parameter's elements.
FLAG_DYNAMIC = 1
FLAG_NEVER = 2
FLAG_MASTER = 4
FLAG_LOW_MOMENTS = 8
FLAG_8BIT_MOMENTS = 16
FLAG_SHARDED = 32
FLAG_CUT = 64
# By an option: the flag of launches in which some setting does not have its default.
FLAG_OF_OPTION = {"stop_condition": FLAG_NEVER}
DYNAMIC = tl.constexpr(FLAG_DYNAMIC)
NEVER = tl.constexpr(FLAG_NEVER)
MASTER = tl.constexpr(FLAG_MASTER)
LOW_MOMENTS = tl.constexpr(FLAG_LOW_MOMENTS)
EIGHT_BITS = tl.constexpr(FLAG_8BIT_MOMENTS)
SHARDED = tl.constexpr(FLAG_SHARDED)
CUT = tl.constexpr(FLAG_CUT)

# The most partial sums of the gradients' squares; each is the work of one program.
MAX_GRAD_SUMS = 512
NUM_WARPS = 8
