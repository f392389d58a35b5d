"""Which of the 32-bit registers R0, R1, ... an instruction of SASS writes and reads, by its text.

The register life ranges of ``nvdisasm -plr`` agree. Where the text leaves a doubt, these functions
name a register too many: a hazard check then sees too much, never too little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# An instruction of WGMMA: the columns of its sum, and F16 if these are half as wide.
WARPGROUP_PRODUCT = re.compile(r"[A-Z]GMMA\.64x(\d+)x\d+\.(F16\b)?")
# A in registers is 64 rows of 32 bytes over 128 threads.
WARPGROUP_A = 4
_REGISTER = re.compile(r"[-|~!]*R(\d+)")
_IN_ADDRESS = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?P(?:\d|T|R)")
# Their first operands are no results, even if these are registers.
_WITHOUT_RESULT = re.compile(
    r"\w*SETP|FCHK|R2P|SYNCS|BAR|BRX|CALL|RET|NANOSLEEP|WARPSYNC|VOTEU|R2UR|ELECT|ST|RED(?!UX)"
)
_MATRIX_TILES = re.compile(r"(?:LDSM|STSM)\S*\.([24])$")
_TENSOR_MEMORY = re.compile(r"(?:LDTM|STTM)(?:\.\d+dp(\d+)bit\S*?)?\.x(\d+)")
_CONVERSION = re.compile(r"[FI]2[FI]\b.*[FSU]64")
_TWO_FLOATS = re.compile(r"(?:FADD|FMUL|FFMA)2|D(?:ADD|MUL|FMA|SETP|MNMX)")


def written(opcode: str, operands: Sequence[str]) -> set[int]:
    """The numbers of the registers that an instruction writes."""
    width = _result_width(opcode)
    return {number for operand in _results(opcode, operands) for number in _numbers(operand, width)}


def read(opcode: str, operands: Sequence[str]) -> set[int]:
    """The numbers of the registers that an instruction reads."""
    results = _results(opcode, operands)
    leading = operands.index(results[-1]) + 1 if results else 0
    sources = [operand for operand in operands[leading:] if not _PREDICATE.match(operand)]
    numbers: set[int] = set()
    for place, operand in enumerate(sources):
        if "[" in operand:
            for register, wide in _IN_ADDRESS.findall(operand):
                numbers.update(range(int(register), int(register) + (2 if wide else 1)))
        else:
            numbers.update(_numbers(operand, _source_width(opcode, place)))
    return numbers


def _results(opcode: str, operands: Sequence[str]) -> list[str]:
    """The operands that are registers to write. A predicate may stand before them."""
    if _WITHOUT_RESULT.match(opcode):
        return []
    results = list(operands[:1])
    if results and _PREDICATE.match(results[0]):
        results = list(operands[1:2])
    if ".ENL2" in opcode:
        # A load of 256 bits names two times four registers.
        results = list(operands[:2])
    return [operand for operand in results if _REGISTER.match(operand)]


def _numbers(operand: str, width: int) -> Iterator[int]:
    if match := _REGISTER.match(operand):
        yield from range(int(match[1]), int(match[1]) + width)


def _result_width(opcode: str) -> int:
    """How many registers a result is in."""
    names = opcode.split(".")
    if match := WARPGROUP_PRODUCT.match(opcode):
        return int(match[1]) // (4 if match[2] else 2)
    if names[0].endswith("MMA"):
        return 2 if "F16" in names[2:] and "F32" not in names else 4
    if names[0] == "CS2R":
        return 1 if "32" in names else 2
    if "WIDE" in names:
        return 2
    return _data_width(opcode)


def _source_width(opcode: str, place: int) -> int:
    """How many registers the source at ``place`` is in."""
    names = opcode.split(".")
    if WARPGROUP_PRODUCT.match(opcode):
        return WARPGROUP_A if place == 0 else _result_width(opcode)
    if names[0].endswith("MMA"):
        return (4, 2, _result_width(opcode))[min(place, 2)]
    if "WIDE" in names:
        return 2 if place == 2 else 1
    return _data_width(opcode)


def _data_width(opcode: str) -> int:
    """How many registers the data of an instruction are in, where sources and results have one
    width.
    """
    names = opcode.split(".")
    if match := _TENSOR_MEMORY.match(opcode):
        lanes = int(match[1] or 32)
        return int(match[2]) * max(lanes // 64, 1)
    if match := _MATRIX_TILES.match(opcode):
        return int(match[1])
    if "128" in names or ".ENL2" in opcode:
        return 4
    if "64" in names or _TWO_FLOATS.match(opcode) or _CONVERSION.match(opcode):
        return 2
    return 1
