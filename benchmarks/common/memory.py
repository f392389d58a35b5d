"""Memory that a step holds."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

from stablelora_kernels.utils.memory import saved_for_backward

__all__ = ["MIB", "resident_over_start", "saved_for_backward", "status_mib"]

MIB = 1 << 20


def status_mib(field: str) -> float | None:
    """A size in /proc/self/status, in MiB; None if the system has none."""
    status = Path("/proc/self/status")
    found = (
        re.search(rf"^{field}:\s+(\d+)", status.read_text(), re.MULTILINE)
        if status.exists()
        else None
    )
    return int(found[1]) / 1024 if found else None


def resident_over_start(run: Callable[[], object]) -> float:
    """MiB of this process's memory at the peak of ``run``, beyond what it held before. Linux alone,
    with glibc.
    """
    gc.collect()
    # Have glibc give back what was freed, or the process would seem to hold it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_mib("VmRSS")
    # Reset the high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = status_mib("VmHWM")
    assert before is not None and peak is not None
    return peak - before
