"""A gated MLP of Llama 3.1 8B with LoRA, forward and backward: PyTorch's operators, three of our layers, and one op.

The op is timed with dispatch's kernels, and with gate, up and the activation forced into one kernel ("in one kernel") or into
separate products ("vendor's products").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import stablelora_kernels as slk
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.load import LOAD
from benchmarks.lab.gpu.section import Clock, Row, Unit, capture_all, time_arms
from stablelora_kernels.functional import LoRAWeights, lora_linear, lora_mlp

COLUMNS = (
    "m", "k", "f", "r", "dropout", "arm", "status", "us", "q1_us", "q3_us", "samples", *LOAD, "eager_over",
    "peak_bytes", "note", "dry",
)  # fmt: skip
SECONDS = 0.5
FORCED = {"one op, in one kernel": "split", "one op, vendor's products": "vendor"}


def projections(device: Device, k: int, f: int, r: int) -> list[LoRAWeights]:
    """Gate, up and down in bfloat16 with float32 A and B; A and B require gradients."""
    generator = torch.Generator(device=device.device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device.device)
        return (drawn / size[1] ** 0.5).to(dtype)

    made = []
    for rows, columns in ((f, k), (f, k), (k, f)):
        a, b = normal(r, columns, dtype=torch.float32), normal(rows, r, dtype=torch.float32)
        weight = normal(rows, columns, dtype=torch.bfloat16)
        made.append(LoRAWeights(weight, None, a.requires_grad_(), b.requires_grad_(), 2.0))
    return made


def eager(x: Tensor, p: LoRAWeights, dropout: float) -> Tensor:
    """A LoRA layer on PyTorch's operators, without casts of the activations."""
    assert isinstance(p.weight, Tensor) and p.lora_A is not None and p.lora_B is not None
    dropped = torch.nn.functional.dropout(x, dropout)
    s = torch.nn.functional.linear(dropped, p.lora_A.to(x.dtype))
    return torch.nn.functional.linear(x, p.weight) + p.scaling * torch.nn.functional.linear(s, p.lora_B.to(x.dtype))


def by_layers(layer: Callable[..., Tensor], x: Tensor, mlp: list[LoRAWeights], dropout: float) -> Tensor:
    gate, up, down = (partial(layer, p=p, dropout=dropout) for p in mlp)
    return down(torch.nn.functional.silu(gate(x)) * up(x))


def ours(x: Tensor, p: LoRAWeights, dropout: float) -> Tensor:
    return lora_linear(x, *p, dropout)  # type: ignore[arg-type]


def measure(device: Device, m: int, k: int, f: int, r: int, dropout: float) -> Iterator[Row]:
    mlp = projections(device, k, f, r)
    x, grad = (torch.randn(m, k, device=device.device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    wanted = [x, *(t for p in mlp for t in (p.lora_A, p.lora_B) if t is not None)]
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: by_layers(eager, x, mlp, dropout),
        "three layers": lambda: by_layers(ours, x, mlp, dropout),
        "one op": lambda: lora_mlp(x, *mlp, "silu", dropout),
    }

    def both(call: Callable[[], Tensor], kernel: str = "auto") -> Callable[[], Any]:
        def run() -> Any:
            with slk.use_kernel(kernel):
                return torch.autograd.grad(call(), wanted, grad)

        return run

    runs = {name: both(call) for name, call in calls.items()}
    runs |= {name: both(calls["one op"], kernel) for name, kernel in FORCED.items()}
    arms, failed = capture_all(device, {name: [run] for name, run in runs.items()}, "arm")
    yield from failed
    for name, row in time_arms(device, arms, SECONDS, queued=True).items():
        yield {"arm": name, **row, "peak_bytes": device.peak_bytes(runs[name])}


def units(device: Device, clock: Clock) -> list[Unit]:
    sizes = [(70, 48, 72)] if device.dry else [(m, 4096, 14336) for m in (8192, 2048, 16384, 512)]
    dropout = (0.1,) if device.dry else (0.0, 0.1)
    ranks = (4,) if device.dry else (16, 64)
    return [
        Unit({"m": m, "k": k, "f": f, "r": r, "dropout": p}, partial(measure, device, m, k, f, r, p), 5.0)
        for r, (m, k, f), p in product(ranks, sizes, dropout)
    ]


if __name__ == "__main__":
    section.main(COLUMNS, units)
