"""The optimizer's step against torch's fused and foreach AdamW and the naive Algorithm 1: the device's time and the host's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.common.measure import summarize
from benchmarks.common.optimizers import SHRINK_RATIO, NaiveStableAdamW
from benchmarks.lab.gpu.device import Arms, Device
from benchmarks.lab.gpu.section import FAILED, Clock, Row, Unit, note_of
from stablelora_kernels import LoRAPair, StableLoRAAdamW
from stablelora_kernels.testing import make_pairs

COLUMNS = (
    "set", "tensors", "dtype", "state", "arm", "status", "device_us", "q1_us", "q3_us", "samples", "host_us",
    "ours_over", "gb_s", "note", "dry",
)  # fmt: skip
# So small that no pair latches within the measurement.
LR = 1e-6
SECONDS = 0.25
# (out, in) of the seven linear layers of an 8B model's block, of which there are 32: 448 tensors, 41.9M parameters at r 16.
BLOCK = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
TARGET_SET = "8B model"


class Set(NamedTuple):
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


def pairs(of: Set, device: Device, latched: bool) -> list[LoRAPair]:
    """Pairs with gradients, whose B is zero or so large that all latch at the first step."""
    if of.name == TARGET_SET:
        scale = 64 if device.dry else 1
        found = [
            make_pair(f"layer{i}.{j}", of.r, n // scale, k // scale, device, of.dtype, latched, i * len(BLOCK) + j)
            for i in range(of.tensors // 2 // len(BLOCK))
            for j, (n, k) in enumerate(BLOCK)
        ]
        assert len(found) * 2 == of.tensors
        return found
    found = make_pairs(of.tensors // 2, of.r, of.width, str(device.device), latched)
    if of.dtype == torch.float32:
        return found
    return [pair_of(pair.name, pair.A, pair.B, pair.A.grad, pair.B.grad, of.dtype) for pair in found]


def make_pair(
    name: str, r: int, n: int, k: int, device: Device, dtype: torch.dtype, latched: bool, seed: int
) -> LoRAPair:
    """Drawn on the device: an 8B model's many numbers would take the host seconds."""
    generator = torch.Generator(device=device.device).manual_seed(seed)
    drawn = [torch.randn(size, generator=generator, device=device.device) for size in ((r, k), (r, k), (n, r))]
    b = torch.full((n, r), 1.0 if latched else 0.0, device=device.device)
    return pair_of(name, drawn[0] / k**0.5, b, drawn[1] * 1e-3, drawn[2] * 1e-3, dtype)


def pair_of(name: str, a: Any, b: Any, grad_a: Any, grad_b: Any, dtype: torch.dtype) -> LoRAPair:
    halves = [t.detach().to(dtype).requires_grad_() for t in (a, b)]
    for half, grad in zip(halves, (grad_a, grad_b), strict=True):
        half.grad = grad.to(dtype)
    return LoRAPair(name, *halves)


def parameters(own: list[LoRAPair]) -> list[Any]:
    return [p for pair in own for p in (pair.A, pair.B)]


def arms(
    of: Set, device: Device, latched: bool
) -> tuple[dict[str, Callable[[], Any]], StableLoRAAdamW, list[LoRAPair]]:
    """Every arm has parameters, gradients and moments of its own. Ours, and its parameters."""
    mine = pairs(of, device, latched)
    ours = StableLoRAAdamW(mine, lr=LR, shrink_ratio=SHRINK_RATIO)
    fused = torch.optim.AdamW(parameters(pairs(of, device, latched)), lr=LR, fused=True)
    foreach = torch.optim.AdamW(parameters(pairs(of, device, latched)), lr=LR, foreach=True)
    naive = NaiveStableAdamW(pairs(of, device, latched), LR, foreach=True)
    found = {"naive": naive.step, "foreach": foreach.step, "fused": fused.step, "ours": ours.step}
    return found, ours, mine


def floor_bytes(own: list[LoRAPair]) -> int:
    """p, g, m and v read, p, m and v written, moments in float32."""
    return sum(p.numel() * (3 * p.element_size() + 16) for p in parameters(own))


def measure(device: Device, of: Set, latched: bool) -> Iterator[Row]:
    ready, ours, mine = arms(of, device, latched)
    begun = time.perf_counter()
    # Ours measures every pair's norm in its first step; the others make their moments.
    for step in ready.values():
        step()
    device.synchronize()
    first = time.perf_counter() - begun
    host = {name: summarize(device.host_seconds(step)) for name, step in ready.items()}
    samples = device.time(ready, SECONDS, queued=False)
    stable = {pair.stable for pair in ours.stability()}
    if stable != {latched}:
        raise RuntimeError(f"every pair was to be {'latched' if latched else 'shrinking'} throughout")
    # Captured last: the graph's arms are the same optimizer, its device time without the host's part.
    graphs: Arms = {}
    try:
        graphs["ours, graph"] = device.capture(ours.step).replay
    except Exception as error:
        yield {"arm": "ours, graph", "status": FAILED, "note": note_of(error)}
    try:
        capturable = torch.optim.AdamW(
            parameters(pairs(of, device, latched)), lr=LR, fused=True, capturable=not device.dry
        )
        graphs["fused, graph"] = device.capture(capturable.step).replay
    except Exception as error:
        yield {"arm": "fused, graph", "status": "skipped", "note": note_of(error)}
    samples |= device.time(graphs, SECONDS, queued=True)
    times = {name: summarize(values) for name, values in samples.items()}
    for name, time_ in times.items():
        rival = times["ours, graph" if name.endswith("graph") and "ours, graph" in times else "ours"]["median"]
        row: Row = {"arm": name, "samples": len(samples[name])}
        row |= {
            "device_us": round(time_["median"] * 1e6, 2),
            "q1_us": round(time_["q1"] * 1e6, 2),
            "q3_us": round(time_["q3"] * 1e6, 2),
            "ours_over": round(rival / time_["median"], 4),
        }
        if name in host:
            row["host_us"] = round(host[name]["median"] * 1e6, 2)
        if name.startswith("ours"):
            row["gb_s"] = round(floor_bytes(mine) / time_["median"] / 1e9, 1)
            row["note"] = f"floor {floor_bytes(mine) / 1e6:.1f} MB; first steps of all arms {first:.2f} s"
        yield row


def units(device: Device, clock: Clock, part: tuple[int, int]) -> list[Unit]:
    found = []
    for of, latched in product(sets(device.dry), (False, True)):
        key: Row = {
            "set": of.name,
            "tensors": of.tensors,
            "dtype": str(of.dtype).removeprefix("torch."),
            "state": "latched" if latched else "shrinking",
        }
        found.append(Unit(key, partial(measure, device, of, latched), 4.0))
    return found
