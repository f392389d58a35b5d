"""The dispatch tables' choices against the best kernel: every one that can do a call is forced and timed in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stablelora_kernels as slk
from benchmarks.common.measure import summarize
from benchmarks.lab.cost_model import predict
from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu.device import Arms, Device
from benchmarks.lab.gpu.layer import SECONDS, P, _rank, known_gpu, shapes
from benchmarks.lab.gpu.section import FAILED, Clock, Row, Unit, note_of
from stablelora_kernels.dispatch.problem import Call, device_of
from stablelora_kernels.dispatch.rules import choose

COLUMNS = (
    "m", "n", "k", "r", "dropout", "direction", "kernel", "chosen", "fastest", "status", "us", "q1_us", "q3_us", "samples",
    "regret", "predicted_us", "error_pct", "note", "dry",
)  # fmt: skip
SCALING = 2.0


def forced(kernel: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def with_kernel() -> Any:
        with slk.use_kernel(kernel):
            return run()

    return with_kernel


def table_choice(s: Shape, direction: str, device: torch.device) -> str:
    """The kernel that the table takes for this call on this device."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    call = Call(direction, s.m, *sizes, s.r, torch.bfloat16, torch.bfloat16, s.dropout)
    return choose(device_of(device), call, "auto").kernel


def runs(s: Shape, direction: str, device: Device) -> Callable[[], Any]:
    make: dict[str, Any] = {"device": device.device, "dtype": torch.bfloat16}
    x, weight = torch.randn(s.m, s.k, **make).requires_grad_(), torch.randn(s.n, s.k, **make) * s.k**-0.5
    a, b = torch.randn(s.r, s.k, **make).requires_grad_(), torch.randn(s.n, s.r, **make).requires_grad_()
    grad = torch.randn(s.m, s.n, **make)
    p = P if s.dropout else 0.0

    def forward() -> Tensor:
        return slk.functional.lora_linear(x, weight, None, a, b, SCALING, p)

    if direction == "forward":
        return lambda: forward().detach()
    y = forward()
    return lambda: torch.autograd.grad(y, (x, a, b), grad, retain_graph=True)


def predicted(gpu: predict.Gpu | None, s: Shape, direction: str) -> dict[str, float]:
    """Seconds by kernel; nothing where the model knows no such GPU or can't do it: what was measured is kept."""
    try:
        return {} if gpu is None else predict.best(gpu, s, direction)
    except Exception as error:
        print(f"no prediction: {error!r}")
        return {}


def measure(device: Device, s: Shape, direction: str, gpu: predict.Gpu | None) -> Iterator[Row]:
    run, chosen = runs(s, direction, device), table_choice(s, direction, device.device)
    arms: Arms = {}
    for kernel in predict.possible(s, direction):
        try:
            arms[kernel] = device.capture(forced(kernel, run)).replay
        except Exception as error:
            yield {"kernel": kernel, "chosen": chosen, "status": FAILED, "note": note_of(error)}
    samples = device.time(arms, SECONDS, queued=True)
    times = {name: summarize(values) for name, values in samples.items()}
    fastest = min(times, key=lambda name: times[name]["median"])
    expected = predicted(gpu, s, direction)
    for kernel, time in times.items():
        row: Row = {"kernel": kernel, "chosen": chosen, "fastest": fastest, "samples": len(samples[kernel])}
        row |= {f"{name}us": round(time[key] * 1e6, 3) for name, key in (("", "median"), ("q1_", "q1"), ("q3_", "q3"))}
        row["regret"] = round(time["median"] / times[fastest]["median"] - 1, 4)
        if kernel in expected:
            error = expected[kernel] / time["median"] - 1
            row |= {"predicted_us": round(expected[kernel] * 1e6, 3), "error_pct": round(100 * error, 1)}
        yield row


def units(device: Device, clock: Clock, part: tuple[int, int]) -> list[Unit]:
    """The layer's shapes in their order, but ranks before sizes: the tables' edges are in M and r."""
    gpu, found = known_gpu(device), []
    ordered = sorted(shapes(device.dry), key=lambda s: (max(s.n, s.k) > 4096 or s.n < 4096, *_rank(s)))
    for s in ordered:
        for direction in ("forward", "backward"):
            key: Row = {
                "m": s.m,
                "n": s.n,
                "k": s.k,
                "r": s.r,
                "dropout": P if s.dropout else 0.0,
                "direction": direction,
            }
            found.append(Unit(key, partial(measure, device, s, direction, gpu), 2.0))
    return found
