"""The dispatch tables' choices against the best kernel: each kernel that can do a call is forced, and timed in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import stablelora_kernels as slk
from benchmarks.lab.cost_model.predict import Shape, call_of
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Arms, Device
from benchmarks.lab.gpu.layer import SECONDS, Layers, key_of, priority, shapes
from benchmarks.lab.gpu.section import FAILED, Clock, Row, Unit, note_of, time_columns
from stablelora_kernels.dispatch.problem import device_of
from stablelora_kernels.dispatch.rules import choose, possible_kernels

COLUMNS = (
    "m", "n", "k", "r", "dropout", "direction", "kernel", "chosen", "fastest", "status", "us", "q1_us", "q3_us", "samples",
    "regret", "note", "dry",
)  # fmt: skip


def forced(kernel: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def with_kernel() -> Any:
        with slk.use_kernel(kernel):
            return run()

    return with_kernel


def measure(device: Device, s: Shape, direction: str) -> Iterator[Row]:
    run = Layers(s, device, rivals=False).call("ours", direction)
    call = call_of(s, direction)
    chosen = choose(device_of(device.device), call, "auto").kernel
    arms: Arms = {}
    for kernel in possible_kernels(call):
        try:
            arms[kernel] = device.capture(forced(kernel, run))
        except Exception as error:
            yield {"kernel": kernel, "chosen": chosen, "status": FAILED, "note": note_of(error)}
    columns = {name: time_columns(values) for name, values in device.time(arms, SECONDS, queued=True).items()}
    fastest = min(columns, key=lambda name: columns[name]["us"])
    for kernel, times in columns.items():
        ratio = round(times["us"] / columns[fastest]["us"] - 1, 4)
        yield {"kernel": kernel, "chosen": chosen, "fastest": fastest, **times, "regret": ratio}


# What the cost model cannot decide: one launch, two or the vendor's product for many rows; S beside a product of few rows at
# ranks of 32 and 64; split-K from 65 rows up; long sums.
DOUBTS = (
    *(Shape(m, 4096, 4096, 16, True, False) for m in (2048, 4096, 8192, 16384)),
    *(Shape(m, n, 4096, r, False, False) for m, r, n in product((16, 64), (32, 64), (4096, 14336))),
    *(Shape(m, 4096, 4096, 16, False, False) for m in (128, 256, 384)),
    *(Shape(m, 4096, 14336, 16, True, False) for m in (512, 4096)),
)


def units(device: Device, clock: Clock) -> list[Unit]:
    """Return what is in doubt, then the layer's shapes, ranks before sizes: the tables' edges are in M and r."""
    ordered = sorted(shapes(device.dry), key=lambda s: (max(s.n, s.k) > 4096 or s.n < 4096, *priority(s)))
    if not device.dry:
        ordered = [*DOUBTS, *(s for s in ordered if s not in DOUBTS)]
    return [
        Unit({**key_of(s), "direction": direction}, partial(measure, device, s, direction), 2.0)
        for s, direction in product(ordered, ("forward", "backward"))
    ]


if __name__ == "__main__":
    section.main(COLUMNS, units)
