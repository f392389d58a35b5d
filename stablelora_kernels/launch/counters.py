"""Counters for kernels whose programs share a sum: int32, 0 before every launch; the launch sets them back to 0."""

from __future__ import annotations

import torch
from torch import Tensor

from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS

LANES = 4
# For launches that a CUDA graph captures: a mebibyte for each device.
_CAPTURE_COUNTERS = 1 << 18

# One buffer a stream: its launches run one after another, so no two of them count at once.
_by_stream: dict[tuple[str, int | None, int], Tensor] = {}
# A graph may be replayed on any stream, at any time: each captured launch owns its counters for good.
_for_capture: dict[int, tuple[Tensor, int]] = {}


def counters(n: int, device: torch.device, lane: int = 0) -> Tensor:
    """``n`` counters on ``device``'s current stream, n <= MAX_SHARED_SUMS.

    Sums that may run at the same time, in one launch or in two that overlap, take different lanes below LANES.
    """
    if device.type == "meta":
        return torch.empty(n, dtype=torch.int32, device=device)
    if device.type != "cuda":
        key: tuple[str, int | None, int] = (device.type, device.index, 0)
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.cuda.is_current_stream_capturing():
            return _captured(n, index, device)
        key = (device.type, index, torch.cuda.current_stream(index).cuda_stream)
        if index not in _for_capture:
            _for_capture[index] = (torch.zeros(_CAPTURE_COUNTERS, dtype=torch.int32, device=device), 0)
            # They must be zero before any other stream captures.
            torch.cuda.current_stream(index).synchronize()
    if key not in _by_stream:
        _by_stream[key] = torch.zeros(LANES * MAX_SHARED_SUMS, dtype=torch.int32, device=device)
    return _by_stream[key][lane * MAX_SHARED_SUMS : lane * MAX_SHARED_SUMS + n]


def _captured(n: int, index: int, device: torch.device) -> Tensor:
    buffer, used = _for_capture.get(index, (None, 0))
    if buffer is None or used + n > buffer.numel():
        # The first launch is a captured one, or graphs have taken all of the buffer: the graph zeroes these at each replay.
        return torch.zeros(n, dtype=torch.int32, device=device)
    _for_capture[index] = (buffer, used + n)
    return buffer[used : used + n]
