"""Whether a machine is fit to measure: what its GPU reaches against the cost model's figures, before a section begins."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.lab.cost_model.gpu import GPUS, Gpu, load_gpu

# Of the model's figures. A copy reaches nine tenths of the data sheet's bandwidth; a GPU that is shared, or throttled, less.
LEAST, MOST = 0.8, 1.15


def model_of(arch: str) -> Gpu | None:
    """The cost model's GPU of this architecture."""
    names = [path.stem for path in sorted(GPUS.glob("*.json")) if json.loads(path.read_text())["arch"] == arch]
    return load_gpu(names[0]) if names else None


def sanity(machine: dict[str, Any]) -> list[str]:
    """A line for the clock, the bandwidth and the matrix rate, with "NOT" where the GPU is far from the model's figure."""
    gpu = model_of(machine.get("arch", ""))
    if gpu is None:
        return [f"the cost model has no GPU of architecture {machine.get('arch')}: nothing to hold the machine to"]
    figures = (
        ("copies, bytes a second", machine["copy_bytes"], gpu.bandwidth),
        ("products in bf16, operations a second", machine["bf16_flops"], gpu.matrix_rate["bf16"]),
        ("clock under load, of the highest", machine.get("clock_mhz"), machine.get("max_clock_mhz")),
    )
    lines = []
    for name, found, expected in figures:
        if not found or not expected:
            lines.append(f"{name}: unknown")
            continue
        share = found / expected
        verdict = "as expected" if LEAST <= share <= MOST else f"NOT as expected of an {gpu.name}"
        lines.append(f"{name}: {found:.4g}, {share:.2f} of {expected:.4g}: {verdict}")
    return lines
