"""Theoretical occupancy: the share of a processor's warps that are resident when programs of one
kernel fill it.
"""

from __future__ import annotations

# One streaming multiprocessor or compute unit: warps, programs, KiB of shared memory. CUDA's
# programming guide, "technical specifications per compute capability"; AMD's CDNA manuals and
# LLVM's AMDGPU target.
PROCESSORS = {
    "sm_80": (64, 32, 164),
    "sm_86": (48, 16, 100),
    "sm_89": (48, 24, 100),
    "sm_90": (64, 32, 228),
    "sm_100": (64, 32, 228),
    "sm_120": (48, 24, 100),
    "gfx90a": (32, 16, 64),
    "gfx942": (32, 16, 64),
}
# Columns of Blackwell's tensor memory.
TENSOR_COLUMNS = 512


def occupancy(arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> float:
    """For programs of ``warps`` warps with ``registers`` a thread and ``shared`` bytes; 0 where not
    even one fits.
    """
    most, programs, kib = PROCESSORS[arch]
    nvidia = arch.startswith("sm_")
    # A warp's registers are all in one of four parts of the processor. AMD counts those of one
    # thread of a warp.
    per_part = 16384 // _up(32 * registers, 256) if nvidia else 512 // _up(registers, 8)
    # The system takes 1 KiB from every program on NVIDIA's GPUs.
    taken = _up(shared + 1024, 128) if nvidia else _up(shared, 512)
    # A program of one warp takes none of AMD's barriers, of which there are 16.
    limits = [most // warps, most if not nvidia and warps == 1 else programs, 4 * per_part // warps]
    limits += [kib * 1024 // taken] if taken else []
    limits += [TENSOR_COLUMNS // tensor_columns] if tensor_columns else []
    return round(min(limits) * warps / most, 3)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
