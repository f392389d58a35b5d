"""A small model with its optimizer and batches, and the eager and the graphed training step of it.

The graphs are real on a GPU, where sizes are larger, and recorded elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import stablelora_kernels as slk
from stablelora_kernels import graphed_step
from tests.helpers.optimizers import DEVICE, all_equal, snapshot
from tests.helpers.recorded_graphs import RecordedGraphs
from tests.helpers.small_models import llama

SMALL = DEVICE == "cpu"
SIZES, ROWS, STEPS = ((64, 8, 5), 6, 9) if SMALL else ((512, 384, 256), 96, 40)
Step = Callable[[Any], Tensor]


class CountedGraphs(graphed_step.Graphs):
    captures = replays = 0

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, output = super().capture(function)
        self.captures += 1
        return partial(self.count, replay), output

    def count(self, replay: Callable[[], None]) -> None:
        self.replays += 1
        replay()


def use_graphs(patch: pytest.MonkeyPatch) -> Any:
    """The graphs of every GraphedStep while ``patch`` lasts, whose ``captures`` and ``replays``
    count.
    """
    graphs = (
        RecordedGraphs(patch)
        if SMALL
        else CountedGraphs(torch.device("cuda", torch.cuda.current_device()))
    )
    patch.setattr(graphed_step, "Graphs", lambda device: graphs)
    return graphs


def make(
    dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    """A model of two LoRA layers, and its optimizer. The second latches at once, the first during
    the replays.
    """
    torch.manual_seed(0)
    settings = {"r": 2, "lora_dropout": dropout, "dtype": dtype, "device": DEVICE}
    model = nn.Sequential(
        slk.LoRALinear(*SIZES[:2], **settings), nn.Tanh(), slk.LoRALinear(*SIZES[1:], **settings)
    )
    nn.init.ones_(model[2].lora_B)
    options = {"lr": 2e-2, "shrink_ratio": 0.05, "seed": 3, "capturable": True, **options}
    return model, slk.StableLoRAAdamW.from_model(model, **options)


def mse(model: nn.Module, batch: Any) -> Tensor:
    x, goal = batch
    return (model(x) - goal).float().square().mean()


def batches(
    count: int = STEPS, rows: int = ROWS, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, ...]]:
    """On the host, as a loader gives them."""
    generator = torch.Generator().manual_seed(rows)
    return [
        tuple(
            torch.randn(rows, width, generator=generator).to(dtype)
            for width in (SIZES[0], SIZES[2])
        )
        for _ in range(count)
    ]


def eager(
    model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, grad_scaler: Any = None
) -> Step:
    """What a call stands for."""
    scaler = grad_scaler or torch.amp.GradScaler(DEVICE, enabled=False)
    loss_of = loss_fn or (lambda model, batch: model(**batch).loss)

    def step(batch: Any) -> Tensor:
        loss = loss_of(model, tree_map(lambda tensor: tensor.to(DEVICE), batch))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def graphed(
    model: nn.Module, optimizer: slk.StableLoRAAdamW, loss_fn: Any = mse, **options: Any
) -> slk.GraphedStep:
    return slk.GraphedStep(model, optimizer, loss_fn, **{"num_warmup_iters": 2} | options)


def assert_eager_steps(
    given: Sequence[Any],
    change: Callable[[int, nn.Module, slk.StableLoRAAdamW], Any] = lambda *args: None,
    made: Callable[[], tuple[nn.Module, slk.StableLoRAAdamW]] = make,
    loss_fn: Any = mse,
    scaler: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[Any, slk.StableLoRAAdamW, list[Tensor]]:
    """The same losses, parameters, moments and latches of eager and of graphed steps on these
    batches, to the bit.

    ``change`` is called before each step with its place. Return the graphed step, its optimizer and
    the losses.
    """
    results = []
    for make_step in (eager, partial(graphed, **options)):
        (model, optimizer), scaled = made(), scaler()
        step = make_step(model, optimizer, loss_fn, grad_scaler=scaled)
        torch.manual_seed(5)
        losses = []
        for turn, batch in enumerate(given):
            change(turn, model, optimizer)
            losses.append(step(batch))
        facts = [pair.latched_at or 0 for pair in optimizer.stability()] + (
            [scaled.get_scale()] if scaled else []
        )
        results.append([*losses, *snapshot(optimizer), torch.tensor(facts)])
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


def llama_with(kind: str, attention: str = "eager") -> tuple[nn.Module, slk.StableLoRAAdamW]:
    """In "eager" attention, since the backward pass of SDPA's flash kernel adds in any order on a
    GPU.
    """
    torch.manual_seed(0)
    model: Any = llama(attn_implementation=attention).to(DEVICE)
    config: dict[str, Any] = {
        "r": 2,
        "lora_dropout": 0.1 if SMALL else 0.0,
        "target_modules": ["q_proj", "v_proj"],
    }
    if kind == "PEFT's layers":
        peft = pytest.importorskip(
            "peft", reason="runs where peft is installed: pip install .[test]"
        )
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
        slk.accelerate_peft(model)
    else:
        config["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
        report = slk.apply_lora(
            model, slk.LoRAConfig(**config), fuse_projections=True, fuse_mlp=True
        )
        assert report.mlps[0].reason is None
    return model, slk.StableLoRAAdamW.from_model(model, lr=1e-2, seed=3, capturable=True)


X, GOAL = batches(1)[0]
