"""What ``GraphedStep`` refuses, before anything has changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.helpers.graphed_steps import DEVICE, GOAL, ROWS, SIZES, X, batches, captured, eager, graphed, make, mse
from tests.helpers.optimizers import all_equal, snapshot


def on_pytorchs_operators(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with slk.use_backend("torch"):
        graphed(model, optimizer)


def of_shards(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    model = fully_shard(copy.deepcopy(model))
    graphed(model, slk.StableLoRAAdamW.from_model(model, capturable=True))


def in_a_global_hook(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with nn.modules.module.register_module_forward_hook(nothing):
        graphed(model, optimizer)


def nothing(*args: Any) -> None:
    pass


# By its message, a change after which a model and its optimizer are refused.
CHANGED: dict[str, Callable[[Any, slk.StableLoRAAdamW], Any]] = {
    r"model must have no hooks, .* got hooks on '0'": lambda m, o: m[0].register_forward_pre_hook(nothing),
    r"model must have no hooks, .* got hooks on '2'": lambda m, o: m[2].register_full_backward_hook(nothing),
    r"optimizer must have no step hooks, .* got <built-in": lambda m, o: o.register_step_post_hook(print),
    r"no shrink_schedule, .* got <class 'float'>: write its": lambda m, o: setattr(o, "shrink_schedule", float),
    r"must be on one GPU, got tensors on .*meta": lambda m, o: m.register_buffer("b", torch.zeros(1, device="meta")),
    r"every trainable parameter of model, .* name '2\.weight'": lambda m, o: m[2].weight.requires_grad_(),
    r"built with capturable=True, got capturable=False": lambda m, o: o.param_groups[0].update(capturable=False),
}
# Of a model or a place in which it is refused.
PLACES: dict[str, Callable[[nn.Module, slk.StableLoRAAdamW], Any]] = {
    r"model must not be in DataParallel, .* got it in one": lambda m, o: graphed(nn.DataParallel(m), o),
    r"model must be whole on one GPU, got the DTensor '0\.weight'": of_shards,
    r"must step on Triton's kernels .* backend 'torch'": on_pytorchs_operators,
    r"model must have no hooks, .* got global module hooks": in_a_global_hook,
}


@pytest.mark.parametrize("message", [*CHANGED, *PLACES])
def test_a_model_that_cannot_be_captured_is_refused(message, mesh):
    model, optimizer = make()
    CHANGED.get(message, nothing)(model, optimizer)
    with pytest.raises(ValueError, match=message):
        PLACES.get(message, graphed)(model, optimizer)


def test_hooks_that_come_after_the_construction_are_refused():
    model, optimizer = make()
    step = graphed(model, optimizer)
    model[0].register_forward_pre_hook(nothing)
    for batch in batches(2):
        step(batch)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="model must have no hooks"):
        step((X, GOAL))
    assert all_equal(before, snapshot(optimizer))


# By its message, a wrong argument.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "TypeError: optimizer must be a StableLoRAAdamW, got int": {"optimizer": 1},
    "TypeError: grad_scaler must be a torch.amp.GradScaler, got int": {"grad_scaler": 1},
    "ValueError: max_graphs must be at least 1, got 0": {"max_graphs": 0},
    "ValueError: sample_batches must be 1 to max_graphs=8 batches, got 0": {"sample_batches": []},
}
# A batch, or one and a loss_fn.
BATCHES: dict[str, tuple[Any, ...]] = {
    "TypeError: batch[1] must be a dense tensor, got int": ((X, 3),),
    "TypeError: batch must be a dense tensor, got layout torch.sparse_coo": (X.to_sparse(),),
    "ValueError: batch[1] must need no gradient, got": ((X, GOAL.clone().requires_grad_()),),
    "TypeError: batch must be a dict unless loss_fn is given, got tuple": ((X, GOAL), None),
    "TypeError: loss_fn must return a 0-d tensor with a gradient, got float": (X, lambda m, x: 1.0),
    "TypeError: loss_fn must return a 0-d tensor with a gradient, got one of shape [5]": (X, lambda m, x: m(x).sum(0)),
}


@pytest.mark.parametrize("message", [*ARGUMENTS, *BATCHES])
def test_wrong_arguments_are_refused(message):
    model, optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError)) as caught:
        if message in ARGUMENTS:
            slk.GraphedStep(**{"model": model, "optimizer": optimizer, "loss_fn": mse, **ARGUMENTS[message]})
        else:
            batch, *loss_fn = BATCHES[message]
            graphed(model, optimizer, *loss_fn)(batch)
    assert f"{caught.type.__name__}: {caught.value}".startswith(message)
    assert all_equal(before, [p.detach() for p in model.parameters()])


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model must be on a GPU to be captured, got it on cpu; enabled=False runs"):
        graphed(*make())


RANDOM = "the model or loss_fn draws random numbers on the host"
NOT_HELD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "reads the loss": (lambda loss: loss * (loss.item() < 1e9), ".* may not read from the GPU"),
    "draws on the host": (lambda loss: loss * random.random(), RANDOM),
    "draws from NumPy": (lambda loss: loss * numpy.random.rand(), RANDOM),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_a_step_that_a_graph_cannot_hold_is_refused(name, graphs):
    """It is not taken, now or at the next call. Eager steps go on from where they were, and other graphs are captured."""
    model, optimizer = make()
    change, message = NOT_HELD[name]
    step = graphed(model, optimizer, lambda model, batch: change(mse(model, batch)))
    step((X, GOAL))
    step((X, GOAL))
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"a CUDA graph cannot hold this step: {message}"):
            step((X, GOAL))
    assert all_equal(before, snapshot(optimizer)) and graphs.replays == 0 and step.captured == []
    assert all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2
    twin = copy.deepcopy((model, optimizer))
    losses = [eager(*twin)((X, GOAL)), graphed(model, optimizer, enabled=False)((X, GOAL))]
    assert torch.equal(*losses) and all_equal(snapshot(twin[1]), snapshot(optimizer))
    captured()


def backward(step: slk.GraphedStep, model: nn.Module) -> None:
    mse(model, (X.to(DEVICE), GOAL.to(DEVICE))).backward()
    step((X, GOAL))


def under_autocast(step: slk.GraphedStep, model: nn.Module) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        step((X, GOAL))


def another_shape(step: slk.GraphedStep, model: nn.Module) -> None:
    step(batches(1, rows=3)[0])


SHAPES = rf"one of the 1 shapes .* got \(float32 \[3, {SIZES[0]}\], .* instead of \(float32 \[{ROWS}, {SIZES[0]}\]"
# Of a step that has a graph: options, what is refused, the error and its message.
CALLS: list[tuple[dict[str, Any], Callable[..., None], type[Exception], str]] = [
    ({}, backward, RuntimeError, "gradients must be None before a step, .* got some"),
    ({}, under_autocast, RuntimeError, "autocast must be inside of loss_fn"),
    ({"max_graphs": 1}, another_shape, ValueError, SHAPES),
    ({"sample_batches": [(X, GOAL)]}, another_shape, ValueError, SHAPES),
]


@pytest.mark.parametrize(
    ("options", "call", "error", "message"), CALLS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_refused_call_takes_no_step(options, call, error, message):
    step, model, optimizer = captured(**options)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        call(step, model)
    assert all_equal(before, snapshot(optimizer))
    assert call is not backward or model[0].lora_A.grad is not None
    optimizer.zero_grad()
    step((X, GOAL))
    assert not all_equal(before, snapshot(optimizer))
