"""Theoretical occupancy: the share of a processor's warps that are resident when programs of one kernel fill it."""

from __future__ import annotations

from typing import NamedTuple


class Processor(NamedTuple):
    """One streaming multiprocessor, or one compute unit."""

    warps: int
    programs: int
    # Registers of one of its four parts, for one thread of a warp in AMD's case, and the step they are given out in.
    registers: int
    register_step: int
    shared: int
    shared_step: int
    # Taken from every program by the system.
    reserved: int


def _nvidia(warps: int, programs: int, shared_kib: int) -> Processor:
    return Processor(warps, programs, 16384, 256, shared_kib * 1024, 128, 1024)


# CUDA's programming guide, "technical specifications per compute capability"; AMD's CDNA manuals and LLVM's AMDGPU target.
_CDNA = Processor(32, 16, 512, 8, 64 * 1024, 512, 0)
PROCESSORS = {
    "sm_80": _nvidia(64, 32, 164),
    "sm_86": _nvidia(48, 16, 100),
    "sm_89": _nvidia(48, 24, 100),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228),
    "sm_120": _nvidia(48, 24, 100),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}
# Columns of Blackwell's tensor memory.
TENSOR_COLUMNS = 512
_PARTS = 4


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> float:
    """For programs of ``warps`` warps with ``registers`` a thread and ``shared`` bytes; 0 where not even one fits."""
    p = PROCESSORS[arch]
    nvidia = arch.startswith("sm_")
    # A warp's registers are all in one part of the processor.
    per_part = p.registers // _up(registers * (32 if nvidia else 1), p.register_step)
    limits = [
        p.warps // warps,
        # A program of one warp takes none of AMD's barriers, of which there are 16.
        p.warps if not nvidia and warps == 1 else p.programs,
        per_part * _PARTS // warps,
    ]
    if shared + p.reserved:
        limits.append(p.shared // _up(shared + p.reserved, p.shared_step))
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return round(min(limits) * warps / p.warps, 3)
