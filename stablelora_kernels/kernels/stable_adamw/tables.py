"""The tables that the optimizer's kernels read: their columns, and the codes and flags in them."""

from __future__ import annotations

import torch
import triton.language as tl

# Columns of the table of tensors (int64), one row each, of an odd number for the reason below.
TENSOR_COLUMNS = (
    "param",
    "exp_avg",
    "exp_avg_sq",
    "numel",
    "group",
    "role",
    "base",
    "a_at",
    "a_n",
    "b_at",
    "b_n",
    "n",
    "m",
    "max_exp_avg_sq",
    "master",
    "exp_avg_scale",
    "exp_avg_sq_scale",
    "columns",
    "pitch",
    "first",
    "unused",
)
COLUMNS: tl.constexpr = tl.constexpr(len(TENSOR_COLUMNS))
# Columns of the table of hyper-parameters (float32), one row a group. Rows of an odd number: with 12, which is 48 bytes, the
# compiler loads several at once and holds them, which costs bfloat16 and float16 ten registers on some GPUs.
HYPER_COLUMNS = (
    "beta1",
    "rest1",
    "beta2",
    "rest2",
    "eps",
    "decay",
    "ratio",
    "sign",
    "log1",
    "log2",
    "lr",
    "lr_ratio",
    "unused",
)
HYPERS: tl.constexpr = tl.constexpr(len(HYPER_COLUMNS))
# Columns of the table of words (int64), one row a group: the address of the learning rate, the seed's part of the rounding
# key, and the addresses of the weight decay and the shrink ratio, which are used where one of them is a tensor.
WORD_COLUMNS = ("lr", "seed", "decay", "ratio")
WORDS: tl.constexpr = tl.constexpr(len(WORD_COLUMNS))
KINDS = (torch.float32, torch.bfloat16, torch.float16)
# Variants of the code for one chunk: twice the kind, plus one where every address and size is a multiple of 16.
N_VARIANTS: tl.constexpr = tl.constexpr(2 * len(KINDS))
# An A of ROLE_A_NEVER never latches.
ROLE_LONE, ROLE_A, ROLE_B, ROLE_A_NEVER = 0, 1, 2, 3
A: tl.constexpr = tl.constexpr(ROLE_A)
A_NEVER: tl.constexpr = tl.constexpr(ROLE_A_NEVER)
# FLAGS of a launch: what some tensor or group asks for beyond the plain step.
FLAG_AMSGRAD, FLAG_DYNAMIC, FLAG_NEVER, FLAG_MASTER = 1, 2, 4, 8
# Moments in bfloat16, or in 8 bits with a scale for each block of MOMENT_BLOCK.
FLAG_LOW_MOMENTS, FLAG_8BIT_MOMENTS = 16, 32
# SHARDED: the pairs' squares have been summed over all processes; a_at and b_at are the addresses of these sums.
# CUT: some parts are not a run of their parameter's elements, which "columns" and "pitch" tell (ops.stable_adamw_shards.Place).
FLAG_SHARDED, FLAG_CUT = 64, 128
AMSGRAD: tl.constexpr = tl.constexpr(FLAG_AMSGRAD)
DYNAMIC: tl.constexpr = tl.constexpr(FLAG_DYNAMIC)
NEVER: tl.constexpr = tl.constexpr(FLAG_NEVER)
MASTER: tl.constexpr = tl.constexpr(FLAG_MASTER)
LOW_MOMENTS: tl.constexpr = tl.constexpr(FLAG_LOW_MOMENTS)
EIGHT_BITS: tl.constexpr = tl.constexpr(FLAG_8BIT_MOMENTS)
SHARDED: tl.constexpr = tl.constexpr(FLAG_SHARDED)
CUT: tl.constexpr = tl.constexpr(FLAG_CUT)
# The norm of all gradients is the sum of at most this many partial sums, each the work of one program.
MAX_GRAD_SUMS = 512
NUM_WARPS = 8
