"""The memory that launches take for themselves, beside their operands and results: scratch and
counters.

Counters are for kernels whose programs share a sum or draw tickets: int32, 0 before every launch;
the launch sets them back to 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS

# Sums that may run at the same time, in one launch or in two that overlap, count in different
# lanes.
S_LANE = 0
# The product's: its shared sums, or its tickets.
Y_LANE = 1
DB_LANE = 2
DA_LANE = 3
CHAIN_LANE = 4
LANES = 5
# Buffers of zeros that every GPU keeps ready: for further streams, and for captures, which cannot
# make their own.
READY = 16
# Streams and captures with a permanent counter buffer, of 40 KiB each.
MAX_BUFFERS = 1024


class Workspace:
    """What launchers have taken."""

    def __init__(self, placed: Callable[[Tensor], Tensor] | None = None) -> None:
        self.placed = placed
        self.scratch: list[Tensor] = []
        # Of all lanes.
        self.counters: Tensor | None = None


_taken: ContextVar[Workspace | None] = ContextVar("taken", default=None)


@contextmanager
def noted(placed: Callable[[Tensor], Tensor] | None = None) -> Iterator[Workspace]:
    """Note what this thread's launchers take in the block. ``placed``: returns the memory that takes
    the place of scratch.
    """
    taken = Workspace(placed)
    token = _taken.set(taken)
    try:
        yield taken
    finally:
        _taken.reset(token)


def scratch(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized memory on ``like``'s device, in its dtype or in ``dtype``, which nothing reads
    after the launches.
    """
    memory = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if (taken := _taken.get()) is not None:
        if taken.placed is not None:
            memory = taken.placed(memory)
        taken.scratch.append(memory)
    return memory


class _Stream(NamedTuple):
    """A stream whose launches run one after another, so that no two of them count at once.

    ``capture`` is the number of the capture that records the stream, or 0. A graph may be replayed
    on any stream at any time, so each capture counts in buffers of its own.
    """

    device_type: str
    device_index: int
    handle: int
    capture: int


_in_use: dict[_Stream, Tensor] = {}
_ready: dict[int, list[Tensor]] = {}


def counters(n: int, device: torch.device, lane: int = 0) -> Tensor:
    """``n`` counters of a lane on ``device``'s current stream, n <= MAX_SHARED_SUMS, at an address
    that is a multiple of 16.
    """
    if device.type == "meta":
        return torch.empty(n, dtype=torch.int32, device=device)
    stream = _current_stream(device)
    if stream.device_type == "cuda" and not stream.capture:
        _keep_ready(stream.device_index)
    if stream not in _in_use:
        ready = _ready.get(stream.device_index)
        if stream.capture and (not ready or len(_in_use) >= MAX_BUFFERS):
            # No launch came before the capture, or captures have taken all: the graph zeroes these
            # at each replay.
            return torch.zeros(n, dtype=torch.int32, device=device)
        _in_use[stream] = ready.pop() if ready else _zeros(1, device)[0]
    every_lane = _in_use[stream]
    if (taken := _taken.get()) is not None:
        taken.counters = every_lane
    return every_lane.view(LANES, MAX_SHARED_SUMS)[lane, :n]


def all_counters(device: torch.device) -> Tensor:
    """The counters of every lane on ``device``'s current stream, which no capture records."""
    handle = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    index = -1 if device.index is None else device.index
    # A plain tuple equals a _Stream, and is made in half the time.
    stream: Any = (device.type, index, handle, 0)
    every_lane = _in_use.get(stream)
    if every_lane is None:
        counters(0, device)
        every_lane = _in_use[_current_stream(device)]
    return every_lane


def reset_counters(device: torch.device) -> bool:
    """Set the counters of ``device``'s current stream to 0. Return whether any was not."""
    every_lane = all_counters(device)
    was_left = bool(every_lane.any())
    if was_left:
        every_lane.zero_()
    return was_left


def _zeros(count: int, device: torch.device) -> list[Tensor]:
    """``count`` buffers, zero for every stream."""
    buffers = torch.zeros(count, LANES * MAX_SHARED_SUMS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return list(buffers)


def _keep_ready(index: int) -> None:
    """Fill up a GPU's buffers if few are left.

    A thread of its own allocates them. While torch.compile warms up or records a CUDA graph, what
    the calling thread allocates goes to the graph's memory pool, which must not hold memory that
    outlives the graph.
    """
    ready = _ready.setdefault(index, [])
    if len(ready) >= READY // 2:
        return

    with ThreadPoolExecutor(1) as pool:
        ready += pool.submit(_zeros, READY, torch.device("cuda", index)).result()


def _current_stream(device: torch.device) -> _Stream:
    if device.type != "cuda":
        return _Stream(device.type, -1 if device.index is None else device.index, 0, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    handle = torch.cuda.current_stream(index).cuda_stream
    capture = _capture_number(handle) if torch.cuda.is_current_stream_capturing() else 0
    return _Stream(device.type, index, handle, capture)


# The drivers' functions that tell about a capture, the newest first, and how many results behind
# status and number each of them has. A symbol's name fixes its signature in every driver.
_CAPTURE_INFO = {
    "cuStreamGetCaptureInfo_v3": 4,
    "cuStreamGetCaptureInfo_v2": 3,
    "hipStreamGetCaptureInfo_v2": 3,
}


@cache
def _capture_info() -> Callable[..., int]:
    """The driver's function of a stream and the addresses of a status and a number. It returns 0 or
    an error.
    """
    library = "libamdhip64.so" if torch.version.hip else "libcuda.so.1"
    loaded = ctypes.CDLL(library)
    for name, more_results in _CAPTURE_INFO.items():
        function = getattr(loaded, name, None)
        if function is not None:
            function.argtypes = [ctypes.c_void_p] * (3 + more_results)
            # Those results are not asked for.
            return lambda *args: function(*args, *[None] * more_results)
    raise RuntimeError(
        f"captures of CUDA graphs cannot be told apart: {library} has none of {', '.join(_CAPTURE_INFO)}"
    )


def _capture_number(handle: int) -> int:
    """The number of the capture that records a stream, which no other capture has, or 0."""
    status = ctypes.c_int()
    number = ctypes.c_ulonglong()
    error = _capture_info()(handle, ctypes.byref(status), ctypes.byref(number))
    if error:
        raise RuntimeError(
            f"the driver cannot tell about the capture of stream {handle:#x}: error {error}"
        )
    # Drivers need not count from 1.
    return number.value + 1 if status.value else 0
