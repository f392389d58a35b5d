"""What the profiler and other tools count: launches, synchronizations, peak memory, bytes from memory, bad accesses and races."""

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
from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu import layer, step, tools
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.section import DRY, NEEDS_GPU, SKIPPED, Clock, Row, Unit

COLUMNS = ("check", "what", "subject", "status", "figure", "expected", "note", "dry")
NO_GPU: Row = {"status": DRY, "note": NEEDS_GPU}
# Kernels' names in a note, at most.
NAMES = 6


def counts_of(trace: dict[str, Any]) -> dict[str, Counter[str]]:
    """Kernels, copies and fills on the device, and calls in which the host waits, by name, from a profiler's trace."""
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
    """What one call of ``run`` launches and waits for. The profiler's own waits are in it too."""
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
def nothing(device: Device) -> dict[str, Counter[str]]:
    """What a trace of nothing has: the profiler's own waits."""
    # The first one also initializes the profiler.
    trace(device, lambda: None)
    return trace(device, lambda: None)


def profiled(device: Device, run: Callable[[], Any]) -> dict[str, Counter[str]]:
    """As :func:`trace`, less what a trace of nothing has."""
    less = nothing(device)
    found = trace(device, run)
    return {kind: found[kind] - less[kind] for kind in found}


def named(counter: Counter[str]) -> str:
    return "; ".join(f"{count}x {name[:60]}" for name, count in counter.most_common(NAMES))


def check_launches(device: Device, s: Shape, direction: str) -> Iterator[Row]:
    """Kernels that ran, against the launches that explain() lists, and what launch_counts counted, against the same."""
    from stablelora_kernels.launch.base import launch_counts

    x, grad, arms, _ = layer.build(s, device)
    run = layer.runs(arms["ours"], x, grad, direction)
    run()
    p = layer.P if s.dropout else 0.0
    said = slk.explain(s.m, s.n, s.k, s.r, torch.bfloat16, p, lora_dtype=torch.bfloat16, device=device.device)
    listed = getattr(said, direction)
    own = sum(one.kernel != "vendor" for one in listed)
    before = launch_counts.copy()
    found = profiled(device, run)
    made = sum((launch_counts - before).values())
    yield _expect({"what": "launch_counts"}, made, own, "Triton launches; expected: those that explain() lists")
    # One more is the draw of dropout's seed.
    more = 1 if s.dropout and direction == "forward" else 0
    kernels, copies, syncs = (found[kind] for kind in ("kernels", "copies", "syncs"))
    if device.dry:
        yield {"what": "kernels", "expected": len(listed) + more, **NO_GPU}
        yield {"what": "syncs", "expected": 0, **NO_GPU}
        return
    yield _expect({"what": "kernels"}, kernels.total(), len(listed) + more, named(kernels))
    yield {"what": "copies", "figure": copies.total(), "note": named(copies)}
    yield _expect({"what": "syncs"}, syncs.total(), 0, named(syncs))


def _expect(row: Row, figure: int, expected: int, note: str) -> Row:
    return {
        **row,
        "figure": figure,
        "expected": expected,
        "status": "ok" if figure == expected else "failed",
        "note": note,
    }


def check_step(device: Device) -> Iterator[Row]:
    """One launch, no copy and no wait in a step of the target's 448 tensors, while every pair shrinks."""
    of = step.sets(device.dry)[1 if device.dry else 0]
    mine = step.pairs(of, device, False)
    optimizer = slk.StableLoRAAdamW(mine, lr=step.LR, shrink_ratio=step.SHRINK_RATIO)
    for _ in range(2):
        optimizer.step()
    from stablelora_kernels.launch.base import launch_counts

    before = launch_counts.copy()
    found = profiled(device, optimizer.step)
    yield _expect({"what": "launch_counts"}, (launch_counts - before).total(), 1, named(launch_counts - before))
    for kind, expected in (("kernels", 1), ("copies", 0), ("syncs", 0)):
        if device.dry:
            yield {"what": kind, "expected": expected, **NO_GPU}
        else:
            yield _expect({"what": kind}, found[kind].total(), expected, named(found[kind]))


def without_waiting(device: Device, run: Callable[[], Any]) -> Row:
    """``run`` in a mode in which PyTorch raises where the host would wait for the device."""
    run()
    device.synchronize()
    if device.dry:
        run()
        return {"figure": None, "expected": 0, **NO_GPU}
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"figure": 0, "expected": 0, "note": "nothing waited for the device (torch.cuda.set_sync_debug_mode)"}


def check_waiting(device: Device, s: Shape) -> Iterator[Row]:
    x, grad, arms, _ = layer.build(s, device)
    yield {"what": "layer", **without_waiting(device, layer.runs(arms["ours"], x, grad, "both"))}
    of = step.sets(device.dry)[1 if device.dry else 0]
    optimizer = slk.StableLoRAAdamW(step.pairs(of, device, False), lr=step.LR, shrink_ratio=step.SHRINK_RATIO)
    yield {"what": "step", **without_waiting(device, optimizer.step)}


def check_memory(device: Device, s: Shape) -> Iterator[Row]:
    """The most memory that each arm holds in forward and backward, beyond inputs and parameters."""
    x, grad, arms, missing = layer.build(s, device)
    for name, arm in arms.items():
        peak = device.peak_bytes(layer.runs(arm, x, grad, "both"))
        row = NO_GPU if peak is None else {"figure": round(peak / 2**20, 2), "note": "MiB, forward and backward"}
        yield {"what": name, **row}
    for name, why in missing.items():
        yield {"what": name, "status": SKIPPED, "note": why}


def units(device: Device, clock: Clock, part: tuple[int, int]) -> list[Unit]:
    found: list[Unit] = []

    def add(check: str, subject: object, run: Callable[[], Iterator[Row]], seconds: float) -> None:
        found.append(Unit({"check": check, "subject": str(subject)}, run, seconds))

    def label(s: Shape) -> str:
        return f"{s.m}x{s.n}x{s.k} r{s.r} p{layer.P if s.dropout else 0:g}"

    size = (32, 32, 8) if device.dry else (*layer.TARGET_SIZE, layer.TARGET_R)
    large = Shape(70 if device.dry else 8192, *size, True)
    shapes = [Shape(16 if device.dry else 64, *size, False), large]
    if not device.dry:
        shapes += [
            Shape(1, *size, False),
            Shape(16, *size, False),
            Shape(64, *size, True),
            large._replace(dropout=False),
        ]
    for s, direction in product(shapes, ("forward", "backward")):
        name = f"{direction} {label(s)}"
        add("launches", name, partial(check_launches, device, s, direction), 3.0)
    add("launches", "step of 448 tensors", partial(check_step, device), 3.0)
    add("waiting", label(large), partial(check_waiting, device, large), 3.0)
    add("dram", label(large), partial(tools.check_dram, device, large, clock), 25.0)
    add("memory", label(large), partial(check_memory, device, large), 2.0)
    for tool in ("memcheck", "racecheck"):
        add("sanitizer", tool, partial(tools.check_sanitizer, device, tool, clock), 20.0)
    return found
