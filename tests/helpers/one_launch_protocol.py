"""The one-launch protocol in its smallest form: one launch computes S, the sums of X's rows, and Y = X + S."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stablelora_kernels.launch.base import Launch
from tests.helpers.interleaving_cases import Case

# Blocks of rows, and rows of a block.
BLOCKS, ROWS, COLUMNS = 2, 2, 4


@triton.jit
def _publish(flag_ptr):
    """Publish this program's stores and count it at the flag."""
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def _wait(flag_ptr, n):
    """Wait until n programs have published."""
    while tl.load(flag_ptr, volatile=True) < n:
        pass
    tl.atomic_add(flag_ptr, 0, sem="acquire")


@triton.jit
def _one_launch_kernel(
    x_ptr, s_ptr, y_ptr, total_ptr, ticket_ptr, flags_ptr, done_ptr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first tickets compute one row of S each, the next tickets one block of Y each, and the last ticket the total of S."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    columns = tl.arange(0, COLUMNS)
    if ticket < BLOCKS * ROWS:
        s = tl.sum(tl.load(x_ptr + ticket * COLUMNS + columns), 0)
        tl.store(s_ptr + ticket, s)
        _publish(flags_ptr + ticket // ROWS)
    elif ticket < BLOCKS * ROWS + BLOCKS:
        block = ticket - BLOCKS * ROWS
        rows = block * ROWS + tl.arange(0, ROWS)
        x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :])
        _wait(flags_ptr + block, ROWS)
        tl.store(y_ptr + rows[:, None] * COLUMNS + columns[None, :], x + tl.load(s_ptr + rows)[:, None])
    else:
        total = tl.full((), 0.0, tl.float32)
        for block in range(BLOCKS):
            _wait(flags_ptr + block, ROWS)
            total += tl.sum(tl.load(s_ptr + block * ROWS + tl.arange(0, ROWS)), 0)
        tl.store(total_ptr, total)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)
        tl.store(done_ptr, 0)
        for block in range(BLOCKS):
            tl.store(flags_ptr + block, 0)


def case(launches: int = 2) -> Case:
    """Launches one after another that share the ticket, the flags and the counter."""
    ticket, done = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    flags = torch.zeros(BLOCKS, dtype=torch.int32)
    made, results = [], []
    for i in range(launches):
        x = torch.randn(BLOCKS * ROWS, COLUMNS, generator=torch.Generator().manual_seed(i))
        s, y, total = (torch.full(size, torch.nan) for size in ((len(x),), x.shape, (1,)))
        args = (x, s, y, total, ticket, flags, done)
        constants = {"BLOCKS": BLOCKS, "ROWS": ROWS, "COLUMNS": COLUMNS}
        made.append(Launch(_one_launch_kernel, "", "", (BLOCKS * ROWS + BLOCKS + 1,), args, constants, {}))
        results.append((x, y, total))

    def check() -> None:
        for x, y, total in results:
            sums = x.double().sum(1)
            torch.testing.assert_close(y.double(), x + sums[:, None], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(total.double(), sums.sum(0, True), rtol=1e-6, atol=1e-6)

    return Case(made, check)
