"""Draw a product's tiles by ticket: a program takes the next tile when it is free.

Programs that stay on their processors could each have fixed tiles. But while a collective holds
some processors, the programs that begin late would begin with all of their tiles when the others
end. So only a program's first tile is fixed. A launch whose tiles fit into one round draws none.

``tickets`` is an int32 in memory, 0 before and after a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Elements of a request, as many as a program has threads.
THREADS: tl.constexpr = tl.constexpr(256)


@triton.jit
def request_tile(tickets, tiles, programs):
    """Ask for the next tile's number, for which ``requested_tile`` waits.

    The first thread asks. Its ticket stays its own until then: a scalar would pass through shared
    memory to all threads at once, so that the program would wait for it here.
    """
    threads = tl.arange(0, THREADS)
    # At addresses of their own, although one thread asks: ptxas joins requests at one address, and
    # then waits here as well.
    return tl.atomic_add(
        tickets + threads, 1, mask=_asks(threads, tiles, programs), sem="relaxed", scope="gpu"
    )


@triton.jit
def requested_tile(request, tickets, tiles, programs):
    """The number of this program's next tile. If it is not below ``tiles``, no tile is left."""
    threads = tl.arange(0, THREADS)
    asks = _asks(threads, tiles, programs)
    # Each tile comes with one request, so this ticket is the launch's last. It sets the counter
    # back, by an atomic, because nothing else orders that behind other programs' requests.
    is_last = asks & (request == tiles - 1)
    tl.atomic_add(tickets + threads, -tiles, mask=is_last, sem="relaxed", scope="gpu")
    # The first thread's, or 0 if it has not asked, through shared memory to all threads.
    ticket = tl.gather(tl.where(asks, request, 0), tl.zeros((1,), tl.int32), 0)
    return programs + tl.sum(ticket, 0)


@triton.jit
def _asks(threads, tiles, programs):
    """The first of ``threads``, or none if each tile has a program."""
    return threads < tl.minimum(tiles - programs, 1)
