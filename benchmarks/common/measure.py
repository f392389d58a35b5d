"""Fair timing, and the machine, versions and commit of a measurement."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from stablelora_kernels.utils.timing import interleave, machine, shuffled, summarize, synchronize

__all__ = ["commit", "environment", "interleave", "shuffled", "summarize", "synchronize"]


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
