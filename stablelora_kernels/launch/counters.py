"""Counters for kernels whose programs share a sum: int32, 0 before every launch, set back to 0 by the launch itself."""

from __future__ import annotations

import torch
from torch import Tensor

# A counter a tile; more tiles than this fill any GPU without sharing sums.
MAX_COUNTERS = 2048
LANES = 4
# For launches that a CUDA graph captures: a mebibyte for each device.
_CAPTURE_COUNTERS = 1 << 18

# One buffer a stream, where launches follow each other, so that no two of them count in it at once.
_by_stream: dict[tuple[str, int | None, int], Tensor] = {}
# A graph may be replayed beside anything, on any stream: every captured launch has counters that are never lent again.
_for_capture: dict[int, tuple[Tensor, int]] = {}


def counters(n: int, device: torch.device, lane: int = 0) -> Tensor:
    """``n`` counters for one sum on ``device``'s current stream, n <= MAX_COUNTERS.

    Sums that may be computed at the same time, in one launch or in two that may overlap, take different lanes below LANES.
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
            # Whatever stream captures must find them zeroed.
            torch.cuda.current_stream(index).synchronize()
    if key not in _by_stream:
        _by_stream[key] = torch.zeros(LANES * MAX_COUNTERS, dtype=torch.int32, device=device)
    return _by_stream[key][lane * MAX_COUNTERS : lane * MAX_COUNTERS + n]


def _captured(n: int, index: int, device: torch.device) -> Tensor:
    buffer, used = _for_capture.get(index, (None, 0))
    if buffer is None or used + n > buffer.numel():
        # Nothing was launched before the capture, or very many graphs were captured: zeroed by the graph, at each replay.
        return torch.zeros(n, dtype=torch.int32, device=device)
    _for_capture[index] = (buffer, used + n)
    return buffer[used : used + n]
