"""Where pairs stand: their norms over their widths, and whether they have latched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .pairs import LoRAPair


@dataclass(frozen=True)
class PairStability:
    """Where one pair stands: ``a_norm`` = ||A||_F / n, ``b_norm`` = ||B||_F / m, for W [m, n].

    ``stable`` says whether the pair has latched, so that A shrinks no more, and ``latched_at`` at which step of A, counted
    from one, or None.
    """

    name: str
    a_norm: float
    b_norm: float
    stable: bool
    latched_at: int | None


def finite_norms(pairs: Sequence[LoRAPair]) -> list[tuple[float, float]]:
    """||A||_F and ||B||_F of every pair, in float64, or RuntimeError for one that is not finite."""
    halves = [p.detach() for pair in pairs for p in (pair.A, pair.B)]
    norms = torch.stack([p.norm(dtype=torch.float64).cpu() for p in halves]).view(-1, 2).tolist()
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise RuntimeError(
                f"pair {pair.name!r} holds values that are not finite: ||A||_F = {a}, ||B||_F = {b}. "
                "It has not been shrunk or latched since; training has diverged before this point"
            )
    return norms
