"""Clusters: CTAs that a GPU runs at the same time, with a barrier of their own, and that reach each
other's shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.ptx_emulator.machine import CTA, Machine


@dataclass(eq=False)
class Cluster:
    """One cluster. A launch without clusters has one CTA in each."""

    machine: Machine
    ctas: list[CTA] = field(default_factory=list)
    barriers_passed: int = 0

    @property
    def leading(self) -> CTA:
        return self.ctas[0]

    def rank(self, c: CTA) -> int:
        return self.ctas.index(c)

    def members(self, bits: int) -> list[CTA]:
        """The CTAs whose bits are set."""
        return [cta for rank, cta in enumerate(self.ctas) if bits >> rank & 1]

    def complete_barrier(self) -> None:
        """Let all go on behind the barrier, if each thread that lives has arrived there."""
        arrived = [cta.at_cluster_barrier for cta in self.ctas]
        missing = [cta.live & ~cta.at_cluster_barrier for cta in self.ctas]
        if not np.any(arrived) or np.any(missing):
            return
        warps = [np.arange(cta.first_warp, cta.first_warp + cta.warps) for cta in self.ctas]
        self.machine.races.join(np.concatenate(warps))
        self.machine.progress += 1
        self.barriers_passed += 1
        for cta in self.ctas:
            cta.at_cluster_barrier = np.zeros(cta.n, bool)
