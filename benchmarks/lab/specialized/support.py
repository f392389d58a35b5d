"""Where the specialized product runs. Needs no Gluon."""

from __future__ import annotations

import triton

from stablelora_kernels.dispatch import backend

# Gluon before 3.6 lacks functions that the kernel calls; before 3.8, slices of a pair's memory.
OLDEST, OLDEST_WITH_PAIRS = (3, 6), (3, 8)
RELEASE = tuple(int(number) for number in triton.__version__.split(".")[:2])
HOPPER = (9, 0)
# The null driver sets backend's, and compiles all the same.
INTERPRETING = backend.INTERPRETING


class UnavailableError(Exception):
    """The specialized product cannot run here. The message says why."""


def reason_against(pairs: bool = False) -> str:
    """Why the installed Triton cannot compile the product, or ""."""
    if INTERPRETING:
        return "Triton's interpreter does not know Gluon"
    oldest = OLDEST_WITH_PAIRS if pairs else OLDEST
    if oldest > RELEASE:
        what = "pairs of CTAs need" if pairs else "the specialized product needs"
        return f"{what} Triton {oldest[0]}.{oldest[1]} or newer, and this is {triton.__version__}"
    return ""


def reason_against_gpu(capability: tuple[int, int]) -> str:
    """Why a GPU of this compute capability cannot run the product, or ""."""
    if capability == HOPPER:
        return ""
    major, minor = capability
    return f"the specialized product is for compute capability 9.0 (H100, H200), this is {major}.{minor}"
