"""The optimizer's step against torch's fused and foreach AdamW and the naive Algorithm 1: time on the device and on the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.common import optimizers
from benchmarks.common.optimizers import LR
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.load import LOAD
from benchmarks.lab.gpu.section import Clock, Row, Unit, capture_all, time_columns
from stablelora_kernels import LoRAPair

COLUMNS = (
    "set", "tensors", "dtype", "state", "arm", "status", "device_us", "q1_us", "q3_us", "samples", *LOAD,
    "host_us", "ours_over", "note", "dry",
)  # fmt: skip
ARMS = {
    "naive": optimizers.NAIVE_FOREACH,
    "foreach": optimizers.ADAMW_FOREACH,
    "fused": optimizers.ADAMW_FUSED,
    "ours": optimizers.OURS,
}
SECONDS = 0.25
# (out, in) of the seven linear layers in one of an 8B model's 32 blocks: 448 tensors, 41.9M parameters at r 16.
BLOCK = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
# How many blocks, the rank, and what the sizes are divided by; and those of a dry run.
MODEL, DRY_MODEL = (32, 16, 1), (1, 2, 64)


def pairs(device: Device, dtype: torch.dtype, latched: bool) -> list[LoRAPair]:
    """Draw an 8B model's pairs and gradients on the device. B is zero, or so large that all pairs latch at the first step."""
    blocks, r, scale = DRY_MODEL if device.dry else MODEL
    generator = torch.Generator(device=device.device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device.device) * std).to(dtype)

    found = []
    for i, (n, k) in enumerate((n // scale, k // scale) for n, k in BLOCK * blocks):
        a = normal(r, k, k**-0.5).requires_grad_()
        b = torch.full((n, r), 1.0 if latched else 0.0, device=device.device, dtype=dtype).requires_grad_()
        a.grad, b.grad = normal(r, k, 1e-3), normal(n, r, 1e-3)
        found.append(LoRAPair(f"layer{i}", a, b))
    return found


def measure(device: Device, dtype: torch.dtype, latched: bool) -> Iterator[Row]:
    def fresh() -> list[LoRAPair]:
        """Each arm has its own parameters, gradients and moments."""
        return pairs(device, dtype, latched)

    built = {arm: optimizers.build(name, fresh(), lr=LR) for arm, name in ARMS.items()}
    ours, steps = built["ours"], {arm: optimizer.step for arm, optimizer in built.items()}
    # In its first step ours measures each pair's norms. The others create their moments.
    for step in steps.values():
        step()
    device.synchronize()
    host = {name: round(device.host_seconds(step) * 1e6, 3) for name, step in steps.items()}
    timings = device.time(steps, SECONDS, queued=False)
    if {pair.latched for pair in ours.stability()} != {latched}:
        raise RuntimeError(f"every pair should stay {'latched' if latched else 'shrinking'} during the measurement")
    # Capture last: this is the same optimizer, without the host's part. One step a graph: a second would upload its tables again.
    capturable = optimizers.build(optimizers.ADAMW_FUSED, fresh(), lr=LR, capturable=not device.dry)
    graphs, failed = capture_all(
        device, {"ours, graph": [ours.step], "fused, graph": [capturable.step]}, "arm", ("fused, graph",), most=1
    )
    yield from failed
    timings |= device.time(graphs, SECONDS, queued=True)
    columns = {name: time_columns(timing, "device_us") for name, timing in timings.items()}
    for name, times in columns.items():
        baseline = columns["ours, graph" if name.endswith("graph") and "ours, graph" in columns else "ours"]
        row: Row = {"arm": name, **times, "ours_over": round(baseline["device_us"] / times["device_us"], 4)}
        if name in host:
            row["host_us"] = host[name]
        yield row


def units(device: Device, clock: Clock) -> list[Unit]:
    tensors = 2 * len(BLOCK) * (DRY_MODEL if device.dry else MODEL)[0]
    dtypes = (torch.float32,) if device.dry else (torch.float32, torch.bfloat16)
    found = []
    for dtype, latched in product(dtypes, (False, True)):
        key: Row = {"set": "8B model", "tensors": tensors, "dtype": str(dtype).removeprefix("torch.")}
        key["state"] = "latched" if latched else "shrinking"
        found.append(Unit(key, partial(measure, device, dtype, latched), 4.0))
    return found


if __name__ == "__main__":
    section.main(COLUMNS, units)
