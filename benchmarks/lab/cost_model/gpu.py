"""A GPU's ceilings, from the files of gpus/, each figure with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from stablelora_kernels.dispatch.problem import DEVICES, Device

GPUS = Path(__file__).parent / "gpus"


class Rates(dict[str, float]):
    """Operations a second by dtype; hashable, so that times can be cached by GPU."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


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
    matrix_rate: Rates
    # A matrix instruction of fewer columns takes as long as one of these.
    narrow_columns: int
    # Instructions a second of all threads together; of those to memory, shared memory's included, a quarter.
    issue_rate: float
    launch: float
    # A launch that may begin before the one ahead of it ends.
    overlapped_launch: float

    @property
    def device(self) -> Device:
        return DEVICES[self.arch]

    def share(self, units: int) -> float:
        """How much longer the busiest processor works than the average one, for ``units`` equal pieces of work."""
        processors = self.device.processors
        return -(-units // processors) * processors / units if units else 1.0


def load_gpu(name: str) -> Gpu:
    """The GPU in benchmarks/lab/cost_model/gpus/<name>.json."""
    path = GPUS / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in GPUS.glob("*.json")))
        raise SystemExit(f"--gpu must be one of {known}, got {name!r}")
    content = json.loads(path.read_text())
    content |= {"matrix_rate": Rates(content["matrix_rate"]), "l2_range": tuple(content["l2_range"])}
    return Gpu(**{field: content[field] for field in Gpu._fields})


class End(NamedTuple):
    """One end of the band: ceilings, and the share of the vendor's matrix rate that Triton's products reach."""

    gpu: Gpu
    efficiency: float


def band_ends(gpu: Gpu, efficiency: float) -> tuple[End, End]:
    """The fast end and the slow one. What only a GPU can tell takes its best value at one and its worst at the other."""
    low, high = gpu.l2_range
    return End(gpu._replace(l2_bandwidth=high), 1.0), End(gpu._replace(l2_bandwidth=low), efficiency)
