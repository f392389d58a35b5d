"""Counting the launches of Triton kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def count_launches() -> Iterator[Counter[str]]:
    """How often each kernel, by its name, was launched in the ``with`` block; it is counted when the block ends."""
    from stablelora_kernels.launch.base import launch_counts

    before, made = launch_counts.copy(), Counter()
    yield made
    made.update(launch_counts - before)
