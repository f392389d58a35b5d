"""Fair timing, and the machine, versions and commit of a measurement."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from stablelora_kernels.utils.timing import interleave, machine, shuffled, summarize, synchronize

__all__ = ["commit", "environment", "interleave", "shuffled", "summarize", "synchronize", "waited_s"]


def commit() -> str | None:
    """The checked-out commit, with ``-dirty`` if tracked files differ from it, or None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """:func:`~stablelora_kernels.utils.timing.machine`, and the commit."""
    return machine() | {"commit": commit()}


def waited_s() -> float | None:
    """Seconds that this process's threads waited for a CPU that others had; None if the system keeps no count."""
    try:
        files = [*Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(file.read_text().split()[1]) for file in files) / 1e9 if files else None
    except (OSError, IndexError, ValueError):
        return None
