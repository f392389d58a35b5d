"""The optimizer's step against torch's fused and foreach AdamW and the naive Algorithm 1: time on the device and on the host."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

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
TARGET_SET = "8B model"


class Set(NamedTuple):
    """The optimizer's tensors. A width of 0 means the 8B model's layers."""

    name: str
    tensors: int
    r: int
    width: int
    dtype: torch.dtype


def sets(dry: bool) -> list[Set]:
    if dry:
        return [Set("uniform", 4, 4, 64, torch.float32), Set(TARGET_SET, 14, 2, 0, torch.float32)]
    fp32, bf16 = torch.float32, torch.bfloat16
    model = [Set(TARGET_SET, 448, 16, 0, fp32), Set(TARGET_SET, 448, 16, 0, bf16)]
    return model[:1] + [Set("uniform", n, 16, 4096, d) for d, n in product((fp32, bf16), (64, 224, 448))] + model[1:]


def target_set(device: Device) -> Set:
    return next(of for of in sets(device.dry) if of.name == TARGET_SET)


def pairs(of: Set, device: Device, latched: bool) -> list[LoRAPair]:
    """Return pairs with gradients. B is zero, or so large that all pairs latch at the first step."""
    scale = 64 if device.dry else 1
    block = [(of.width, of.width)] if of.width else [(n // scale, k // scale) for n, k in BLOCK]
    sizes = block * (of.tensors // 2 // len(block))
    assert len(sizes) * 2 == of.tensors
    return [make_pair(f"layer{i}", of.r, n, k, device, of.dtype, latched, i) for i, (n, k) in enumerate(sizes)]


def make_pair(
    name: str, r: int, n: int, k: int, device: Device, dtype: torch.dtype, latched: bool, seed: int
) -> LoRAPair:
    """Draw a pair on the device: the host would take seconds for an 8B model's."""
    generator = torch.Generator(device=device.device).manual_seed(seed)
    drawn, grad_a, grad_b = (
        torch.randn(size, generator=generator, device=device.device) for size in ((r, k), (r, k), (n, r))
    )
    a = (drawn / k**0.5).to(dtype).requires_grad_()
    b = torch.full((n, r), 1.0 if latched else 0.0, device=device.device, dtype=dtype).requires_grad_()
    a.grad, b.grad = (grad_a * 1e-3).to(dtype), (grad_b * 1e-3).to(dtype)
    return LoRAPair(name, a, b)


def measure(device: Device, of: Set, latched: bool) -> Iterator[Row]:
    def fresh() -> list[LoRAPair]:
        """Each arm has its own parameters, gradients and moments."""
        return pairs(of, device, latched)

    built = {arm: optimizers.build(name, fresh(), lr=LR) for arm, name in ARMS.items()}
    ours, steps = built["ours"], {arm: optimizer.step for arm, optimizer in built.items()}
    # In its first step ours measures each pair's norms. The others create their moments.
    for step in steps.values():
        step()
    device.synchronize()
    host = {name: round(device.host_seconds(step) * 1e6, 3) for name, step in steps.items()}
    timings = device.time(steps, SECONDS, queued=False)
    if {pair.stable for pair in ours.stability()} != {latched}:
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
    found = []
    for of, latched in product(sets(device.dry), (False, True)):
        key: Row = {"set": of.name, "tensors": of.tensors, "dtype": str(of.dtype).removeprefix("torch.")}
        key["state"] = "latched" if latched else "shrinking"
        found.append(Unit(key, partial(measure, device, of, latched), 4.0))
    return found


if __name__ == "__main__":
    section.main(COLUMNS, units)
