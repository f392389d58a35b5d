"""Memory that a step holds."""

from __future__ import annotations

import re
from pathlib import Path

from stablelora_kernels.utils.memory import saved_for_backward

__all__ = ["MIB", "saved_for_backward", "status_mib"]

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
