"""How stable each pair is: its norms over its widths, and whether it has latched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stablelora_kernels.optim.sharding import ShardSums
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.utils.dtensor import local


@dataclass(frozen=True)
class PairStability:
    """The stability of one pair A [r, n], B [m, r].

    Attributes:
        name: the name of its :class:`~stablelora_kernels.LoRAPair`.
        a_norm: ``||A||_F / n``.
        b_norm: ``||B||_F / m``.
        latched: whether the pair has latched, so that A shrinks no more.
        latched_at: A's step, counted from one, at which the pair latched, or None.
    """

    name: str
    a_norm: float
    b_norm: float
    latched: bool
    latched_at: int | None

    @property
    def stable(self) -> bool:
        """Another name of ``latched``. The command ``inspect``, which sees no latch, calls a pair stable by its norms alone."""
        return self.latched


# Where float32 holds the squares that make a norm: a GPU decides the latch by sums of squares in float32.
SMALLEST_NORM, LARGEST_NORM = 1e-15, 1e19


def warn_of_norms(pairs: Sequence[LoRAPair], norms: Sequence[tuple[float, float]]) -> None:
    """Warn of the pairs whose ``norms``, of A and B, have squares that float32 does not hold."""
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if max(a, b) > LARGEST_NORM or 0 < a < SMALLEST_NORM:
            warnings.warn(
                f"pair {pair.name!r}: ||A||_F = {a:.3g} and ||B||_F = {b:.3g} are outside {SMALLEST_NORM:g} to {LARGEST_NORM:g}, "
                "where float32 holds the sums of squares that decide the latch on a GPU: it may shrink or latch wrongly",
                RuntimeWarning,
                stacklevel=5,
            )


def finite_norms(pairs: Sequence[LoRAPair], local_only: bool = False) -> list[tuple[float, float]]:
    """||A||_F and ||B||_F of every pair, computed in float64.

    The norms of sharded pairs take a collective, so all ranks must call this together; ``local_only`` takes those of this
    process's shards instead.

    Raises:
        RuntimeError: a norm is not finite.
    """
    halves = [p for pair in pairs for p in (pair.A, pair.B)]
    norms_on_device = [local(p.detach()).norm(dtype=torch.float64) for p in halves]
    sums = ShardSums([] if local_only else halves)
    if sums:
        norms_on_device = list(sums.all_reduce_sum_(torch.stack(norms_on_device).square_()).sqrt_())
    norms = torch.stack([norm.cpu() for norm in norms_on_device]).view(-1, 2).tolist()
    for pair, (a, b) in zip(pairs, norms, strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise RuntimeError(
                f"pair {pair.name!r} holds values that are not finite: ||A||_F = {a}, ||B||_F = {b}. "
                "It has not shrunk or latched since; training diverged earlier"
            )
    return norms
