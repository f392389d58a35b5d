"""A GPU's ceilings. Where sources disagree, a ceiling is a range."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from stablelora_kernels.dispatch.problem import DEVICES, Device, cdiv

GPUS = Path(__file__).parent / "gpus"


class Range(NamedTuple):
    """What is known of a figure: no bounds of an error, but the lowest and the highest that the
    sources allow, and one between them.
    """

    low: float
    middle: float
    high: float

    def text(self, form: str = "{:.2f}", between: str = " ") -> str:
        return between.join(form.format(value) for value in self)

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.middle * factor, self.high * factor)


def range_over(values: Iterable[float]) -> Range:
    """The range of a figure that was computed at each of ``points``."""
    values = list(values)
    return Range(min(values), values[0], max(values))


def ratios(ours: Sequence[float], others: Sequence[float]) -> Range:
    """The range of a ratio. Both times belong to the same clock, L2 and share at each point."""
    return range_over(our / other for our, other in zip(ours, others, strict=True))


class Ranges(NamedTuple):
    """The ceilings that only a measurement can tell. They vary independently."""

    # Bytes a second.
    l2_bandwidth: Range
    # Clocks a second under products in 16 bits: the power limit lowers it.
    clock: Range
    # The share of the vendor's matrix rate that the main loops of Triton's products reach.
    triton_share: Range
    # The share of a tile's read of the result's earlier values (beta = 1) that the vendor's product
    # does not hide behind a main loop.
    source_exposed: Range


class Gpu(NamedTuple):
    """Ceilings at one point of ``ranges``: bytes a second, clocks a second, seconds a launch."""

    name: str
    arch: str
    processors: int
    bandwidth: float
    l2_bytes: float
    l2_bandwidth: float
    clock: float
    triton_share: float
    source_exposed: float
    # Of a processor in 16 bits, a clock, and the share of them that the vendor's main loops reach.
    matrix_operations: int
    matrix_share: float
    # Operations a second of the vendor's main loops, at most: those of the best product that a
    # source has.
    matrix_limit: float
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    launch: float
    ranges: Ranges

    @property
    def device(self) -> Device:
        return DEVICES[self.arch]._replace(processors=self.processors)

    @property
    def clocks(self) -> float:
        """Of all processors together, a second."""
        return self.processors * self.clock

    @property
    def matrix_rate(self) -> float:
        """Operations a second of the vendor's main loops."""
        return min(self.clocks * self.matrix_operations * self.matrix_share, self.matrix_limit)

    @property
    def triton_rate(self) -> float:
        """Operations a second of the main loops of Triton's products."""
        return self.matrix_rate * self.triton_share

    def share(self, units: int) -> float:
        """How much longer the busiest processor works than the average one, for ``units`` equal
        pieces of work.
        """
        return cdiv(units, self.processors) * self.processors / units if units else 1.0


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/lab/predict/gpus/<name>.json, at the middle of its ranges."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    del content["sources"]
    ranges = Ranges(*(Range(*content[ceiling]) for ceiling in Ranges._fields))
    middles = {ceiling: known.middle for ceiling, known in ranges._asdict().items()}
    return Gpu(**content | middles, ranges=ranges)


@cache
def points(gpu: Gpu) -> list[Gpu]:
    """The GPU at the middle of its ranges, then at each combination of their ends.

    A time over the frozen layer's need not be worst where all ceilings are lowest: a slow clock
    slows the frozen layer, too.
    """
    middles = tuple(known.middle for known in gpu.ranges)
    corners = product(*((known.low, known.high) for known in gpu.ranges))
    return [
        gpu._replace(**dict(zip(Ranges._fields, values, strict=True)))
        for values in [middles, *corners]
    ]
