"""The registers of a CTA: ``setmaxnreg`` gives some of a warp's back, and others take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class RegisterPool:
    """``held``: of each warp, the registers of a thread."""

    def __init__(self, warps: int, number: int) -> None:
        self.held = np.full(warps, number)
        self.size = warps * number

    def has(self, warps: Sequence[int] | npt.NDArray[np.int64], number: int) -> bool:
        """Whether each of ``warps`` may hold ``number``, beside what the other warps hold."""
        taken = self.held.copy()
        taken[list(warps)] = number
        return int(taken.sum()) <= self.size

    def allows(self, warps: npt.NDArray[np.int64], number: int, grows: bool) -> bool:
        """Whether PTX allows the size: ``inc`` must not shrink it, nor ``dec`` enlarge it."""
        before = self.held[warps]
        return bool((before <= number).all() if grows else (before >= number).all())

    def resize(self, warps: npt.NDArray[np.int64], number: int) -> None:
        self.held[warps] = number
