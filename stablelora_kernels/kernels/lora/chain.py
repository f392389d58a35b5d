"""Order the programs of a chained launch: a ticket for each program and a flag for each block of
rows of S.

Launch order is undefined, so programs take tickets. The first tickets compute S and dB, the next
the product, the last dA. Programs that need S wait for its flags. A program only waits for lower
tickets, which are already running and never wait: no deadlock, in any order and on any number of
processors.

A chain is int32 in memory, all 0 before and after a launch: the tickets drawn, the programs done,
and from FLAGS on, for each FLAG_M rows of S, how many of its tiles are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stablelora_kernels.kernels.common import INTERPRETING, stores_done, targets_amd

FLAGS: tl.constexpr = tl.constexpr(4)


@triton.jit
def draw_ticket(chain_ptr):
    """This program's place in the order."""
    return tl.atomic_add(chain_ptr, 1, sem="relaxed", scope="gpu")


@triton.jit
def raise_flag(chain_ptr, flag):
    """Count one tile of S, which this program has stored, as there."""
    stores_done(flag)
    tl.atomic_add(chain_ptr + FLAGS + flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_flag(chain_ptr, flag, M, R, S: tl.constexpr):
    """Wait for all tiles of S in the ``flag``-th FLAG_M rows. Then this program may read them."""
    flag_ptr = chain_ptr + FLAGS + flag
    tiles = tl.cdiv(tl.minimum(M - flag * S.FLAG_M, S.FLAG_M), S.BLOCK_M) * tl.cdiv(R, S.BLOCK_R)
    if INTERPRETING or targets_amd():
        # An atomic, because Triton before 3.9 drops volatile on AMD: the compiler then loads once
        # and waits forever. It acquires itself, because Triton 3.9 does not always wait for an
        # atomic whose result nobody uses before it empties the cache.
        while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") < tiles:
            pass
    else:
        # A loop that Triton does not see: around a loop that it sees, it would not pipeline the
        # stores of tiles. Nor would ptxas keep the load of an atomic whose result nobody uses. The
        # braces make the label local, for several copies.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            WAIT: ld.acquire.gpu.global.b32 $0, [$1];
            setp.lt.s32 p, $0, $2;
            @p bra WAIT;
            }""",
            "=&r,l,r,~{memory}", [flag_ptr, tiles], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    # On AMD, one thread acquires for all.
    tl.debug_barrier()


@triton.jit
def leave(chain_ptr, M, S: tl.constexpr):
    """Be done; the last program to be done sets the chain back."""
    stores_done(M)
    done = tl.atomic_add(chain_ptr + 1, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(chain_ptr, 0)
        tl.store(chain_ptr + 1, 0)
        for flag in range(tl.cdiv(M, S.FLAG_M)):
            tl.store(chain_ptr + FLAGS + flag, 0)
