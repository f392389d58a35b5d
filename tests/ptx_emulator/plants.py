"""Faults to plant into PTX: a barrier, wait or fence that a kernel needs, taken out of the code of
one source file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from tests.ptx_emulator.machine import Schedule

# GPUs by their kernels: sm_120 has those of Ampere; sm_90 and sm_100 have TMA.
BOTH, EVERY = ("sm_80", "sm_90"), ("sm_80", "sm_90", "sm_100", "sm_120")
AMPERE = ("sm_80", "sm_120")
WITH_TMA = ("sm_90", "sm_100")
HOPPER = ("sm_90",)
TCGEN05 = ("sm_100",)


class Plant(NamedTuple):
    """``pattern``, of the code of ``source``, becomes ``by`` in the PTX of ``kernel``; ``case``
    shows it.
    """

    case: str
    kernel: str
    source: str
    pattern: str
    by: str | Callable[[re.Match[str]], str] = ""
    archs: tuple[str, ...] = EVERY
    schedule: Schedule = Schedule()

    def edit(self, name: str, ptx: str) -> str:
        """The PTX of a kernel with the fault in it, or as it was."""
        if name != self.kernel:
            return ptx
        files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:.*/)?(.*?)"', ptx))
        pieces = _pieces(ptx)
        for i, piece in enumerate(pieces):
            place = re.match(r"\n\s*\.loc\s+(\d+)", piece)
            if place and files[place[1]] == self.source:
                pieces[i] = re.sub(self.pattern, self.by, piece)
        return "".join(pieces)


def _pieces(ptx: str) -> list[str]:
    """Pieces that begin with the directive that says where their code is from."""
    return re.split(r"(?=\n\s*\.loc\s)", ptx)


def _line(piece: str) -> str:
    directive = re.match(r"\n\s*\.loc\s+(\d+\s+\d+)", piece)
    return directive[1] if directive else ""


def without_barriers_of_triton(name: str, ptx: str) -> str:
    """The PTX without the barriers that Triton 3.9 adds ahead of an atomic that releases, where the
    source has one already.

    Triton 3.6 adds none. A barrier of the compiler's is of the atomic's own line in the source.
    """
    barrier_before_release = r"bar\.sync\s+0;(?=(?:(?!bar\.sync).)*?\.gpu\.(?:release|acq_rel)\.)"
    lines = ("".join(pieces) for _, pieces in groupby(_pieces(ptx), _line))
    return "".join(re.sub(barrier_before_release, "", line, flags=re.DOTALL) for line in lines)


def _one_more(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1}"


_CHAINED, _APART_S = (
    "linear one_launch bf16/fp32 M130 r16 p0.1",
    "linear branch_first bf16/fp32 M130 r200 p0.1",
)
_TICKETS = "linear one_launch bf16/fp32 M300 N520 r16 p0.0, 6 processors"
_LONG = "linear bf16/fp32 M33 K520 r16 p0.1, long sum"
_COPIES = "linear branch_first bf16/fp32 M1 N40 r1 p0.5"
_OPTIMIZER = "optimizer bf16, masters, clipped"
_SHRINK = "shrink fp32"
_SPLIT_K = "_lora_linear_split_k_kernel"
_TMA = "_lora_linear_tma_kernel"
_DOWN = "_lora_down_kernel"
_BARRIER, _APART = r"bar\.sync\s+0;", Schedule(warps="groups-first")
_ARRIVAL = r"mbarrier.arrive.expect_tx.shared::cta.b64 _, \1, 0;"
# By name. One entry serves all GPUs that have the kernel.
PLANTS = {
    "optimizer-barrier": Plant(_OPTIMIZER, "_stable_adamw_kernel", "step.py", _BARRIER, schedule=_APART),
    "shrink-barrier": Plant(_SHRINK, "_stable_shrink_kernel", "shrink.py", _BARRIER, schedule=_APART),
    "shrink-arrival": Plant(_SHRINK, "_stable_shrink_kernel", "common.py", r"\.acq_rel\.", ".relaxed."),
    "split-k-barrier": Plant(_LONG, _SPLIT_K, "common.py", _BARRIER, schedule=_APART),
    "split-k-release": Plant(_LONG, _SPLIT_K, "common.py", r"\.acq_rel\.", ".acquire."),
    "split-k-acquire": Plant(_LONG, _SPLIT_K, "common.py", r"\.acq_rel\.", ".release."),
    "split-k-scope": Plant(_LONG, _SPLIT_K, "common.py", r"\.gpu\.acq_rel\.", ".cta.acq_rel."),
    "split-k-copies": Plant(_LONG, _SPLIT_K, "linear_split_k.py", r"(cp\.async\.wait_group\s+)(\d+)", _one_more),
    "down-copies": Plant(_APART_S, _DOWN, "thin_products.py", r"(cp\.async\.wait_group\s+)(\d+)", _one_more),
    "down-buffers": Plant(_APART_S, _DOWN, "thin_products.py", _BARRIER, schedule=_APART),
    "flag-release": Plant(_CHAINED, "_lora_linear_kernel", "chain.py", r"\.release\.", ".relaxed.", AMPERE),
    "flag-acquire": Plant(_CHAINED, "_lora_linear_kernel", "chain.py", r"\.acquire\.", ".relaxed.", AMPERE),
    "flag-barrier": Plant(_CHAINED, "_lora_linear_kernel", "common.py", _BARRIER, "", AMPERE, Schedule(warps="first")),
    "chain-end": Plant(_CHAINED, "_lora_linear_kernel", "chain.py", r"\.acq_rel\.", ".relaxed.", AMPERE),
    "tma-flag-release": Plant(_CHAINED, _TMA, "chain.py", r"\.release\.", ".relaxed.", WITH_TMA),
    "tma-flag-acquire": Plant(_CHAINED, _TMA, "chain.py", r"\.acquire\.", ".relaxed.", WITH_TMA),
    "ticket-barrier": Plant(_TICKETS, _TMA, "tickets.py", _BARRIER, "", WITH_TMA, _APART),
    "ticket-scope": Plant(_TICKETS, _TMA, "tickets.py", r"\.gpu\.relaxed\.", ".cta.relaxed.", WITH_TMA),
    "chain-ticket-scope": Plant(_CHAINED, "_lora_linear_kernel", "chain.py", r"\.gpu\.relaxed\.", ".cta.relaxed.", AMPERE),
    "tma-chain-ticket-scope": Plant(_CHAINED, _TMA, "chain.py", r"\.gpu\.relaxed\.", ".cta.relaxed.", WITH_TMA),
    "ticket-reset": Plant(_TICKETS, _TMA, "tickets.py", r"@%p\d+ red\.global[^;]*;", "", WITH_TMA),
    "proxy-fence": Plant(_CHAINED, _TMA, "linear_tma.py", r"fence\.proxy\.async\.shared::cta;", "", WITH_TMA),
    "wgmma-wait": Plant(_CHAINED, _TMA, "common.py", r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)", _one_more, HOPPER),
    "wgmma-fence": Plant(_CHAINED, _TMA, "common.py", r"wgmma\.fence\.sync\.aligned;", "", HOPPER),
    "wgmma-fence-of-copies": Plant(_COPIES, "_lora_linear_kernel", "common.py", r"wgmma\.fence\.sync\.aligned;", "", HOPPER),
    "load-bytes": Plant(_CHAINED, _TMA, "linear_tma.py", r"(expect_tx\.shared\S* _, \[%r\d+\], )(\d+)", _one_more, WITH_TMA),
    "store-wait": Plant(_CHAINED, _TMA, "linear_tma.py", r"cp\.async\.bulk\.wait_group(?:\.read)?\s+0;", "", WITH_TMA),
    "tcgen05-wait-for-stores": Plant(_CHAINED, _TMA, "common.py", r"tcgen05\.wait::st\.sync\.aligned;", "", TCGEN05),
    "tcgen05-wait-for-loads": Plant(_CHAINED, _TMA, "linear_tma.py", r"tcgen05\.wait::ld\.sync\.aligned;", "", TCGEN05),
    "tcgen05-fence": Plant(_CHAINED, _TMA, "common.py", r"fence\.proxy\.async\.shared::cta;", "", TCGEN05),
    # The thread arrives itself, before its products have ended.
    "tcgen05-early-arrival": Plant(_CHAINED, _TMA, "common.py", r"tcgen05\.commit\.\S+ (\[%r\d+\]);", _ARRIVAL, TCGEN05),
    "tcgen05-deallocation": Plant(_CHAINED, _TMA, "linear_tma.py", r"@%p\d+ tcgen05\.dealloc\.[^;]*;", "", TCGEN05),
}  # fmt: skip
