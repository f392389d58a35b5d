"""Bytes that a step keeps for backward, and its peak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

# The file descriptor that C++ libraries write to.
_STDERR = 2


def saved_for_backward(run: Callable[[], Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that the graph of ``run``'s result keeps, without the storages
    of ``exclude``.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Identify storages by themselves, not by address: tensors without memory have no address.
        if storage._cdata not in excluded:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    # The graph keeps every counted storage alive until here, so none was counted twice.
    del result
    return sum(kept.values())


def peak_over_start(run: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that ``run`` has allocated on ``device`` at a time, beyond what was allocated
    before it; None on devices that are neither GPUs of CUDA or ROCm nor the CPU.

    PyTorch's allocators are asked, so memory that they hold in reserve does not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    if device.type != "cpu":
        return None
    # PyTorch's stubs do not know what events have.
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with _without_kinetos_lines():
        profile.__enter__()
    try:
        run()
    finally:
        with _without_kinetos_lines():
            profile.__exit__(None, None, None)
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    allocated = 0
    peak = 0
    for event in events:
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@contextmanager
def _without_kinetos_lines() -> Iterator[None]:
    """Drop what Kineto, the library of PyTorch's profiler, logs as it starts and stops. It writes to
    the process's stderr; what others write there meanwhile comes afterwards.
    """
    try:
        stderr = os.dup(_STDERR)
    except OSError:
        # The process has closed it.
        yield
        return
    with TemporaryFile() as written:
        os.dup2(written.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(stderr, _STDERR)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not line.startswith(b"USDT:"):
                    os.write(_STDERR, line)
