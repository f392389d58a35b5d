"""The dispatch tables' choices against the best kernel: each kernel that can do a call is forced, and timed in CUDA graphs.

Beside forwards, the parts that decide what may still be gained: the product alone by our kernel and by the vendor's, and S alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import stablelora_kernels as slk
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.layer import SECONDS, Layers, key_of, priority, shapes
from benchmarks.lab.gpu.load import LOAD
from benchmarks.lab.gpu.report import PRODUCT, S_ALONE, VENDOR
from benchmarks.lab.gpu.section import Calls, Clock, Row, Unit, capture_all, time_columns
from benchmarks.lab.predict.layer_time import call_of
from benchmarks.lab.predict.rivals import BF16, Shape
from stablelora_kernels.dispatch.problem import device_of
from stablelora_kernels.dispatch.rules import Choice, choose, possible_kernels
from stablelora_kernels.launch.lora_common import forward_product, shrink
from stablelora_kernels.launch.lora_linear import product_launches

COLUMNS = (
    "m", "n", "k", "r", "dropout", "direction", "kernel", "chosen", "fastest", "status", "us", "q1_us", "q3_us", "samples",
    *LOAD, "regret", "note", "dry",
)  # fmt: skip


def forced(kernel: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def with_kernel() -> Any:
        with slk.use_kernel(kernel):
            return run()

    return with_kernel


def parts(device: Device, s: Shape) -> Calls:
    """Return the calls of a forward's parts, by name, each with as many weights as are larger than L2."""
    own = device_of(device.device)
    make: dict[str, Any] = {"device": device.device, "dtype": BF16}
    x, y, store = (torch.randn(s.m, size, **make) for size in (s.k, s.n, s.r))
    seed = torch.zeros(1, dtype=torch.int64, device=device.device)
    found: Calls = {PRODUCT: [], VENDOR: [], S_ALONE: []}
    for _ in range(device.rotation(s.n * s.k * BF16.itemsize)):
        w, a, b = (torch.randn(*size, **make) for size in ((s.n, s.k), (s.r, s.k), (s.n, s.r)))
        bare = forward_product(x, w, None, a[:0], b[:, :0], None, y, None, 1.0, 0.0)
        branch = forward_product(x, w, None, a, b, store, y, seed, 1.0, s.p)
        for name, kernel in ((PRODUCT, "split"), (VENDOR, "vendor")):
            (launch,) = product_launches(own, bare, Choice(kernel, ""))
            found[name].append(partial(launch.run, device.device))
        found[S_ALONE].append(partial(shrink(own, branch).run, device.device))
    return found


def measure(device: Device, s: Shape, direction: str) -> Iterator[Row]:
    runs = Layers(s, device, rivals=False).calls("ours", direction)
    call = call_of(s, direction)
    chosen = choose(device_of(device.device), call, "auto").kernel
    calls = {kernel: [forced(kernel, run) for run in runs] for kernel in possible_kernels(call)}
    kernels = list(calls)
    if direction == "forward":
        calls |= parts(device, s)
    arms, failed = capture_all(device, calls, "kernel")
    yield from ({**row, "chosen": chosen} for row in failed)
    columns = {name: time_columns(timing) for name, timing in device.time(arms, SECONDS, queued=True).items()}
    fastest = min((name for name in kernels if name in columns), key=lambda name: columns[name]["us"])
    for name, times in columns.items():
        row: Row = {"kernel": name, "chosen": chosen, "fastest": fastest, **times}
        if name in kernels:
            row["regret"] = round(times["us"] / columns[fastest]["us"] - 1, 4)
        yield row


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
