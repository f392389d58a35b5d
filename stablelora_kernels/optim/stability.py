"""Where pairs stand: their norms over their widths, and whether they have latched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.dtensor import local


@dataclass(frozen=True)
class PairStability:
    """Where one pair stands, for W [m, n].

    Attributes:
        name: the pair's, as :class:`~stablelora_kernels.LoRAPair` has it.
        a_norm: ``||A||_F / n``.
        b_norm: ``||B||_F / m``.
        stable: whether the pair has latched, so that A shrinks no more.
        latched_at: the step of A, counted from one, at which it latched, or None.
    """

    name: str
    a_norm: float
    b_norm: float
    stable: bool
    latched_at: int | None


def finite_norms(pairs: Sequence[LoRAPair], here: bool = False) -> list[tuple[float, float]]:
    """||A||_F and ||B||_F of every pair, in float64, or RuntimeError for one that is not finite.

    Of sharded pairs the norms over all processes, which all must ask for together; or, ``here``, of this one's parts.
    """
    halves = [p for pair in pairs for p in (pair.A, pair.B)]
    norms_there = [local(p.detach()).norm(dtype=torch.float64) for p in halves]
    sums = ShardSums([] if here else halves)
    if sums:
        norms_there = list(sums.add_up_(torch.stack(norms_there).square_()).sqrt_())
    norms = torch.stack([norm.cpu() for norm in norms_there]).view(-1, 2).tolist()
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise RuntimeError(
                f"pair {pair.name!r} holds values that are not finite: ||A||_F = {a}, ||B||_F = {b}. "
                "It has not been shrunk or latched since; training has diverged before this point"
            )
    return norms
