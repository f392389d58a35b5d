"""A small model with its optimizer and batches, and the eager and the graphed training step of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.small_models import llama

STEPS = 9
Step = Callable[[Any], Tensor]


def make(dropout: float = 0.0, **options: Any) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    """A model of two LoRA layers, and its optimizer. The second latches at once, the first during the replays."""
    torch.manual_seed(0)
    layers = [slk.LoRALinear(n, k, r=2, lora_dropout=dropout) for n, k in ((64, 8), (8, 5))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    nn.init.ones_(model[2].lora_B)
    settings = {"lr": 2e-2, "shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
    return model, slk.StableLoRAAdamW.from_model(model, **settings)


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, goal = batch
    return (model(x) - goal).square().mean()


def batches(count: int = STEPS, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    return [
        (torch.randn(rows, 64, generator=generator), torch.randn(rows, 5, generator=generator)) for _ in range(count)
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


def assert_eager_steps(
    given: Sequence[Any],
    change: Callable[[int, nn.Module, slk.StableLoRAAdamW], Any] = lambda *args: None,
    made: Callable[[], tuple[nn.Module, slk.StableLoRAAdamW]] = make,
    loss_fn: Any = mse,
    scaler: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[Any, slk.StableLoRAAdamW, list[Tensor]]:
    """The same losses, parameters, moments and latches of eager and of graphed steps on these batches, to the bit.

    ``change`` is called before each step with its place. Return the graphed step, its optimizer and the losses.
    """
    results = []
    for graph in (False, True):
        model, optimizer = made()
        with_loss = loss_fn or (lambda model, batch: model(**batch).loss)
        scaled = scaler()
        step = (
            graphed(model, optimizer, loss_fn, grad_scaler=scaled, **options)
            if graph
            else eager(model, optimizer, with_loss, scaled)
        )
        torch.manual_seed(5)
        losses = []
        for turn, batch in enumerate(given):
            change(turn, model, optimizer)
            losses.append(step(batch))
        scale = [] if scaled is None else [torch.tensor(scaled.get_scale())]
        results.append(
            [
                *losses,
                *scale,
                *snapshot(optimizer),
                *(torch.tensor(each.latched_at or 0) for each in optimizer.stability()),
            ]
        )
    assert all_equal(*results)
    return step, optimizer, losses


def captured(**options: Any) -> tuple[slk.GraphedStep, nn.Module, slk.StableLoRAAdamW]:
    """A step whose graph has been replayed."""
    model, optimizer = make()
    step = graphed(model, optimizer, **options)
    for batch in batches(4):
        step(batch)
    assert len(step.captured) == 1
    return step, model, optimizer


def llama_with(kind: str) -> tuple[nn.Module, slk.StableLoRAAdamW]:
    torch.manual_seed(0)
    model: Any = llama()
    if kind == "PEFT's layers":
        peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
        slk.accelerate_peft(model)
    else:
        slk.apply_lora(
            model, slk.LoRAConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), fuse_projections=True
        )
    return model, slk.StableLoRAAdamW.from_model(model, lr=1e-2, seed=3, capturable=True)


X, GOAL = batches(1)[0]
