"""The memory that launches take for themselves, beside their operands and results: scratch and counters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Workspace:
    """What launchers have taken."""

    def __init__(self) -> None:
        self.scratch: list[Tensor] = []
        # Those of all lanes.
        self.counters: Tensor | None = None


class _Notes(threading.local):
    taken: Workspace | None = None


_notes = _Notes()


@contextmanager
def noted() -> Iterator[Workspace]:
    """Note what this thread's launchers take in the block."""
    outer, _notes.taken = _notes.taken, Workspace()
    try:
        yield _notes.taken
    finally:
        _notes.taken = outer


def note_counters(counters: Tensor) -> Tensor:
    """``counters``, noted if someone asked for notes."""
    if _notes.taken is not None:
        _notes.taken.counters = counters
    return counters


def scratch(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized memory on ``like``'s device, in its dtype or in ``dtype``, which nothing reads after the launches."""
    memory = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if _notes.taken is not None:
        _notes.taken.scratch.append(memory)
    return memory
