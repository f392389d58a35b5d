"""Counts by the profiler and by ncu: launches, synchronizations, bytes from memory."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.lab.gpu import section, step, tools
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.layer import TARGET_R, TARGET_SIZE, Layers
from benchmarks.lab.gpu.section import FAILED, NO_GPU, OK, Clock, Row, Unit
from benchmarks.lab.predict.rivals import BF16, Shape
from stablelora_kernels.launch.base import launch_counts

COLUMNS = ("check", "what", "subject", "status", "figure", "expected", "note", "dry")
# A note lists at most this many kernels.
NAMES = 6


def counts_of(trace: dict[str, Any]) -> dict[str, Counter[str]]:
    """Count a trace's kernels, copies and fills on the device, and calls in which the host waits, by name."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("kernels", "copies", "syncs")}
    for event in trace.get("traceEvents", ()):
        category, name = event.get("cat"), str(event.get("name", ""))
        if category == "kernel":
            found["kernels"][name] += 1
        elif category in ("gpu_memcpy", "gpu_memset"):
            found["copies"][name] += 1
        elif category in ("cuda_runtime", "cuda_driver") and ("Synchronize" in name or name == "cudaMemcpy"):
            found["syncs"][name] += 1
    return found


def trace(device: Device, run: Callable[[], Any]) -> dict[str, Counter[str]]:
    """Count what one call of ``run`` launches and waits for, including the profiler's own waits."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not device.dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    device.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        device.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return counts_of(json.loads(path.read_text()))


@cache
def empty_trace(device: Device) -> dict[str, Counter[str]]:
    """Count the profiler's own waits."""
    # The first trace also initializes the profiler.
    trace(device, lambda: None)
    return trace(device, lambda: None)


def profiled(device: Device, run: Callable[[], Any]) -> dict[str, Counter[str]]:
    """Return :func:`trace` without the profiler's own waits."""
    own = empty_trace(device)
    found = trace(device, run)
    return {kind: found[kind] - own[kind] for kind in found}


def listed(counter: Counter[str]) -> str:
    return "; ".join(f"{count}x {name[:60]}" for name, count in counter.most_common(NAMES))


def expect(what: str, figure: int, expected: int, note: str) -> Row:
    status = OK if figure == expected else FAILED
    return {"what": what, "figure": figure, "expected": expected, "status": status, "note": note}


def compare(device: Device, run: Callable[[], Any], launches: int, kernels: int) -> Iterator[Row]:
    """Compare what a call of ``run`` launches, our own count and the profiler's, with what is expected, and its waits with 0."""
    before = launch_counts.copy()
    found = profiled(device, run)
    made = launch_counts - before
    yield expect("launch_counts", made.total(), launches, listed(made))
    for kind, expected in (("kernels", kernels), ("syncs", 0)):
        if device.dry:
            yield {"what": kind, "expected": expected, **NO_GPU}
        else:
            yield expect(kind, found[kind].total(), expected, listed(found[kind]))
    yield {"what": "copies", "figure": found["copies"].total(), "note": listed(found["copies"])}


def check_launches(device: Device, s: Shape, direction: str) -> Iterator[Row]:
    """A call launches what explain() lists."""
    run = Layers(s, device, rivals=False).calls("ours", direction)[0]
    run()
    explained = slk.explain(s.m, s.n, s.k, s.r, BF16, s.p, lora_dtype=BF16, device=device.device)
    launches = getattr(explained, direction)
    # Forward with dropout also draws a seed.
    seeds = 1 if s.dropout and direction == "forward" else 0
    yield from compare(device, run, sum(one.kernel != "vendor" for one in launches), len(launches) + seeds)


def check_step(device: Device) -> Iterator[Row]:
    """A step of the target's 448 tensors, all shrinking, is one launch."""
    pairs = step.pairs(device, torch.float32, latched=False)
    optimizer = optimizers.build(optimizers.OURS, pairs, lr=optimizers.LR)
    for _ in range(2):
        optimizer.step()
    yield from compare(device, optimizer.step, 1, 1)


def label(s: Shape) -> str:
    return f"{s.m}x{s.n}x{s.k} r{s.r} p{s.p:g}"


def units(device: Device, clock: Clock) -> list[Unit]:
    size = (32, 32, 8) if device.dry else (*TARGET_SIZE, TARGET_R)
    large = Shape(70 if device.dry else 8192, *size, True)
    shapes = [Shape(16 if device.dry else 64, *size, False), large]
    if not device.dry:
        shapes += [Shape(m, *size, dropout) for m, dropout in ((1, False), (16, False), (64, True), (8192, False))]

    def unit(check: str, subject: str, run: Callable[[], Iterator[Row]], seconds: float) -> Unit:
        return Unit({"check": check, "subject": subject}, run, seconds)

    return [
        *(
            unit("launches", f"{direction} {label(s)}", partial(check_launches, device, s, direction), 3.0)
            for s, direction in product(shapes, ("forward", "backward"))
        ),
        unit("launches", "step of 448 tensors", partial(check_step, device), 3.0),
        unit("dram", label(large), partial(tools.check_dram, device, large, clock), 25.0),
    ]


if __name__ == "__main__":
    section.main(COLUMNS, units)
