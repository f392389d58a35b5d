"""Fair timing, and the machine, versions and commit of a measurement."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stablelora_kernels.utils.timing import machine, shuffled, synchronize

__all__ = [
    "commit",
    "environment",
    "others_cpus",
    "seconds_of",
    "shuffled",
    "synchronize",
    "waited_s",
]


def seconds_of(parts: Mapping[str, Callable[[], Any]], names: Iterable[str]) -> dict[str, float]:
    """Run the parts ``names`` in order, and return the seconds that each takes, the GPU's work
    included.
    """
    synchronize()
    found = {}
    for name in names:
        start = time.perf_counter()
        parts[name]()
        synchronize()
        found[name] = time.perf_counter() - start
    return found


def commit() -> str | None:
    """The checked-out commit, with ``-dirty`` if tracked files differ from it, or None outside a
    git checkout.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """:func:`~stablelora_kernels.utils.timing.machine`, and the commit."""
    return machine() | {"commit": commit()}


def waited_s() -> float | None:
    """Seconds that this process's threads waited for a CPU that others had; None if the system
    keeps no count.
    """
    try:
        files = [*Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9 if files else None
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def others_cpus() -> Iterator[list[float]]:
    """Append to the list, at the end of the block, how many CPUs other programs kept busy on
    average; nothing if unknown.
    """
    found: list[float] = []
    start, before = time.perf_counter(), _busy_s()
    own = time.process_time()
    yield found
    if before is not None and (after := _busy_s()) is not None:
        others = after - before - (time.process_time() - own)
        found.append(max(0.0, others / (time.perf_counter() - start)))


def _busy_s() -> float | None:
    """Seconds of all CPUs together that were not idle since the system started."""
    try:
        ticks = [
            int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
    except (OSError, ValueError):
        return None
    # The fourth and the fifth are idle time.
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
