"""A GPU's ceilings, from the files of gpus/, each figure with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from stablelora_kernels.dispatch.problem import DEVICES, Device

GPUS = Path(__file__).parent / "gpus"
# The slow end of the band: the least share of the vendor's matrix rate that Triton's products are taken to reach.
SLOWEST = 0.85
# The suffixes of columns at the band's ends.
FAST, SLOW = "", " (slow)"


class Gpu(NamedTuple):
    """Ceilings of a GPU: bytes and operations a second, seconds a launch."""

    name: str
    arch: str
    bandwidth: float
    # What L2 delivers: the figure that the sources suggest, and the lowest and the highest that they allow.
    l2_bandwidth: float
    l2_range: tuple[float, float]
    # Into all processors together; each takes an equal share at most.
    port_bandwidth: float
    # Of the vendor's products in 16 bits.
    matrix_rate: float
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    # Instructions a second of all threads together; of those to memory, shared memory's included, a quarter.
    issue_rate: float
    launch: float
    # A launch that may begin before the one ahead of it ends.
    overlapped_launch: float
    # The share of the vendor's matrix rate that Triton's products reach.
    efficiency: float = 1.0

    @property
    def device(self) -> Device:
        return DEVICES[self.arch]

    def share(self, units: int) -> float:
        """How much longer the busiest processor works than the average one, for ``units`` equal pieces of work."""
        processors = self.device.processors
        return -(-units // processors) * processors / units if units else 1.0


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/lab/predict/gpus/<name>.json."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    del content["sources"]
    return Gpu(**content | {"l2_range": tuple(content["l2_range"])})


def band_ends(gpu: Gpu) -> dict[str, Gpu]:
    """The fast end and the slow one. What only a GPU can tell takes its best value at one and its worst at the other."""
    low, high = gpu.l2_range
    return {FAST: gpu._replace(l2_bandwidth=high), SLOW: gpu._replace(l2_bandwidth=low, efficiency=SLOWEST)}
