"""A training step of a few layers, eager and by GraphedStep: forward, backward, and the step of Stable-LoRA's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from benchmarks.common.optimizers import LR
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import WARMUP, Arms, Device
from benchmarks.lab.gpu.load import LOAD
from benchmarks.lab.gpu.section import FAILED, Clock, Row, Unit, note_of, time_arms
from stablelora_kernels import GraphedStep, LoRALinear, StableLoRAAdamW

COLUMNS = (
    "rows", "width", "layers", "dropout", "arm", "status", "us", "q1_us", "q3_us", "samples", *LOAD, "host_us",
    "eager_over", "note", "dry",
)  # fmt: skip
SECONDS = 0.4
LAYERS, R = 4, 16


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def make(device: Device, rows: int, width: int, p: float) -> tuple[nn.Module, StableLoRAAdamW, Tensor]:
    """LAYERS layers in bfloat16 with float32 A and B, their optimizer and a batch."""
    torch.manual_seed(0)
    options = {"r": R, "lora_dropout": p, "dtype": torch.bfloat16, "lora_dtype": torch.float32, "device": device.device}
    model = nn.Sequential(*(LoRALinear(width, width, **options) for _ in range(LAYERS)))
    optimizer = StableLoRAAdamW.from_model(model, lr=LR, shrink_ratio=0.01, capturable=not device.dry)
    return model, optimizer, torch.randn(rows, width, device=device.device, dtype=torch.bfloat16)


def trained(device: Device, rows: int, width: int, p: float, graphed: bool) -> Callable[[], object]:
    """A training step, captured already if ``graphed``."""
    model, optimizer, x = make(device, rows, width, p)
    step = GraphedStep(model, optimizer, loss_of, num_warmup_iters=WARMUP, enabled=graphed and not device.dry)
    for _ in range(0 if device.dry else WARMUP + 1):
        step(x)
    return partial(step, x)


def measure(device: Device, rows: int, width: int, p: float) -> Iterator[Row]:
    arms: Arms = {"eager": trained(device, rows, width, p, graphed=False)}
    try:
        arms["captured"] = trained(device, rows, width, p, graphed=True)
    except Exception as error:
        yield {"arm": "captured", "status": FAILED, "note": note_of(error)}
    for name, row in time_arms(device, arms, SECONDS, queued=False).items():
        yield {"arm": name, **row, "host_us": round(device.host_seconds(arms[name]) * 1e6, 3)}


def units(device: Device, clock: Clock) -> list[Unit]:
    dropout = (0.1,) if device.dry else (0.0, 0.1)
    sizes = [(9, 48)] if device.dry else [(512, 4096), (64, 4096), (4096, 4096), (16, 4096)]
    return [
        Unit(
            {"rows": rows, "width": width, "layers": LAYERS, "dropout": p},
            partial(measure, device, rows, width, p),
            4.0,
        )
        for (rows, width), p in product(sizes, dropout)
    ]


if __name__ == "__main__":
    section.main(COLUMNS, units)
