"""``GraphedStep`` without a GPU: its captures are recorded, its replays run what was recorded. On a GPU: tests/gpu."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels import graphed_step
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.recorded_graphs import RecordedGraphs
from tests.helpers.steps import latches

pytestmark = [
    pytest.mark.usefixtures("one_thread", "on_triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has real graphs: tests/gpu/test_graphed_step.py"),
]
STEPS = 9
Step = Callable[[Any], Tensor]


@pytest.fixture
def on_triton():
    with slk.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    recorded = RecordedGraphs(monkeypatch)
    monkeypatch.setattr(graphed_step, "make_graphs", lambda device: recorded)
    return recorded


def make(dropout: float = 0.0, **options: Any) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    """A model of two LoRA layers, of which one latches at once, and its optimizer."""
    torch.manual_seed(0)
    layers = [slk.LoRALinear(n, k, r=2, lora_dropout=dropout) for n, k in ((12, 20), (20, 5))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    nn.init.ones_(model[2].lora_B)
    settings = {"lr": 1e-2, "shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
    return model, slk.StableLoRAAdamW.from_model(model, **settings)


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, goal = batch
    return (model(x) - goal).square().mean()


def batches(count: int = STEPS, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    return [
        (torch.randn(rows, 12, generator=generator), torch.randn(rows, 5, generator=generator)) for _ in range(count)
    ]


def eager(model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, scaler: Any = None) -> Step:
    """What a call stands for."""

    def step(batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def graphed(model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, **options: Any) -> slk.GraphedStep:
    return slk.GraphedStep(model, optimizer, loss_fn, **{"num_warmup_iters": 2} | options)


def captured(**options: Any) -> tuple[slk.GraphedStep, nn.Module, slk.StableLoRAAdamW]:
    """A step whose graph has been replayed."""
    model, optimizer = make()
    step = graphed(model, optimizer, **options)
    for batch in batches(4):
        step(batch)
    assert len(step.captured) == 1
    return step, model, optimizer


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "clipped": {"max_grad_norm": 0.05},
    "LoRA+": {"lr_ratio_B": 4.0},
    "8 bits": {"moments_dtype": torch.uint8},
    "amsgrad": {"amsgrad": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_calls_are_eager_steps(name: str, graphs: RecordedGraphs) -> None:
    """Losses, parameters, moments and latches have the bits of eager steps. The lr is a number that changes at each step."""
    twins = [make(**OPTIONS[name]) for _ in range(2)]
    losses = []
    for (model, optimizer), make_step in zip(twins, (eager, graphed), strict=True):
        step = make_step(model, optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
        torch.manual_seed(5)
        found = []
        for batch in batches():
            found.append(step(batch))
            schedule.step()
        losses.append(found)
    assert (graphs.captures, graphs.replays) == (1, STEPS - 2)
    assert len({float(loss) for loss in losses[1]}) == STEPS
    if name == "LoRA+":
        # A number is multiplied by the ratio in float64 on the host, a tensor in float32 on the device.
        for (_, *ones), (_, *others) in zip(*([snapshot(o)] for _, o in twins), strict=True):
            assert all(torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6) for a, b in zip(ones, others, strict=True))
    else:
        assert all_equal(*losses)
        assert all_equal(*(snapshot(optimizer) for _, optimizer in twins))
    eager_latches, graphed_latches = (latches(optimizer) for _, optimizer in twins)
    assert eager_latches == graphed_latches and 1 in graphed_latches.values()
    assert type(twins[1][1].param_groups[0]["lr"]) is float
