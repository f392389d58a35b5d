"""Counting the launches of Triton kernels, and what Triton compiles them for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """How often each kernel, by its name, was launched in the ``with`` block; it is counted when the block ends."""
    from stablelora_kernels.launch.base import launch_counts

    before, made = launch_counts.copy(), Counter()
    yield made
    made.update(launch_counts - before)


def specialization(value: Any) -> Any:
    """What Triton's key has of an argument, unless the kernel says do_not_specialize."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return type(value), value == 1, value % 16 == 0
    return type(value)
