"""The threads of OpenBLAS, MKL and OpenMP. A program sets them by ``ONE_THREAD`` before it imports
NumPy or PyTorch.
"""

from __future__ import annotations

import ctypes
import runpy
from pathlib import Path

MODULE = Path(__file__).resolve().parents[2] / "stablelora_kernels" / "utils" / "threads.py"
# An import would run the package's __init__, which imports PyTorch and NumPy.
ONE_THREAD: dict[str, str] = runpy.run_path(str(MODULE))["ONE_THREAD"]
# The names of OpenBLAS's function in the wheels of NumPy 1.26 and newer: with integers of 32 or 64
# bits.
QUERIES = [
    f"{prefix}openblas_get_num_threads{suffix}"
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
]


def openblas_threads() -> list[int]:
    """The number of threads of each OpenBLAS in this process."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line[line.index("/") :] for line in mapped if "openblas" in line}
    counts = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        name = next(name for name in QUERIES if hasattr(library, name))
        counts.append(getattr(library, name)())
    return counts
