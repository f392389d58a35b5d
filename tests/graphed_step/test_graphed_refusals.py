"""What ``GraphedStep`` refuses before anything has changed, and what it notices before a replay of
all that may change.
"""

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

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import pytest

from tests.helpers.graphed_steps import (
    DEVICE,
    GOAL,
    ROWS,
    SIZES,
    X,
    batches,
    captured,
    eager,
    graphed,
    llama_with,
    make,
    mse,
    use_graphs,
)
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.precision import switched


def on_pytorchs_operators(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with slk.settings(backend="torch"):
        graphed(model, optimizer)


def of_shards(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    model = fully_shard(copy.deepcopy(model))
    graphed(model, slk.StableLoRAAdamW.from_model(model, capturable=True))


def in_accelerates_hook(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="runs where accelerate is installed: pip install .[test]"
    )
    hooks.add_hook_to_module(model[1], hooks.ModelHook())
    graphed(model, optimizer)


def in_a_global_hook(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with nn.modules.module.register_module_forward_hook(nothing):
        graphed(model, optimizer)


def nothing(*args: Any) -> None:
    pass


# By its message, a change after which a model and its optimizer are refused.
CHANGED: dict[str, Callable[[Any, slk.StableLoRAAdamW], Any]] = {
    r"model must have no hooks, .* got hooks on '0'": lambda m, o: m[0].register_forward_pre_hook(
        nothing
    ),
    r"model must have no hooks, .* got hooks on '2'": lambda m, o: m[2].register_full_backward_hook(
        nothing
    ),
    r"model must have no hooks, .* got hooks on '0\.lora_B'": lambda m, o: m[
        0
    ].lora_B.register_hook(nothing),
    r"optimizer must have no step hooks, .* got <built-in": lambda m, o: o.register_step_post_hook(
        print
    ),
    r"no shrink_schedule, .* got <class 'float'>: write its": lambda m, o: setattr(
        o, "shrink_schedule", float
    ),
    r"must be on one GPU, got tensors on .*meta": lambda m, o: m.register_buffer(
        "b", torch.zeros(1, device="meta")
    ),
    r"every trainable parameter of model, .* name '2\.weight'": lambda m, o: m[
        2
    ].weight.requires_grad_(),
    r"built with capturable=True, got capturable=False": lambda m, o: o.param_groups[0].update(
        capturable=False
    ),
}
# Of a model or a place in which it is refused.
PLACES: dict[str, Callable[[nn.Module, slk.StableLoRAAdamW], Any]] = {
    r"model must not be in DataParallel, .* got it in one": lambda m, o: graphed(
        nn.DataParallel(m), o
    ),
    r"model must be whole on one GPU, got the DTensor '0\.weight'": of_shards,
    r"must step on Triton's kernels .* backend 'torch'": on_pytorchs_operators,
    r"model must have no hooks, .* got hooks on '1'": in_accelerates_hook,
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
    "TypeError: loss_fn must be a function of the model and a batch, got 'mse'": {"loss_fn": "mse"},
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
    "TypeError: loss_fn must return a 0-d tensor with a gradient, got one of shape [5]": (
        X,
        lambda m, x: m(x).sum(0),
    ),
}


@pytest.mark.parametrize("messages", [ARGUMENTS, BATCHES], ids=["arguments", "batches"])
def test_wrong_arguments_are_refused(messages):
    for message, given in messages.items():
        model, optimizer = make()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises((TypeError, ValueError)) as caught:
            if messages is ARGUMENTS:
                slk.GraphedStep(**{"model": model, "optimizer": optimizer, "loss_fn": mse, **given})
            else:
                batch, *loss_fn = given
                graphed(model, optimizer, *loss_fn)(batch)
        assert f"{caught.type.__name__}: {caught.value}".startswith(message)
        assert all_equal(before, [p.detach() for p in model.parameters()])


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="model must be on a GPU to be captured, got it on cpu; enabled=False runs"
    ):
        graphed(*make())


RANDOM = "the model or loss_fn draws random numbers on the host"
NOT_HELD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "reads the loss": (lambda loss: loss * (loss.item() < 1e9), ".* may not read from the GPU"),
    "draws on the host": (lambda loss: loss * random.random(), RANDOM),
    "draws from NumPy": (lambda loss: loss * numpy.random.rand(), RANDOM),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_a_step_that_a_graph_cannot_hold_is_refused(name, graphs):
    """It is not taken, now or at the next call. Eager steps go on from where they were, and other
    graphs are captured.
    """
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
    assert (
        all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2
    )
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


# What has changed since a capture


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    slk.merge_lora(model)
    yield
    slk.unmerge_lora(model)


def update(values: Any, key: Any, value: Any) -> Any:
    return mock.patch.dict(values, {key: value})


TF32 = "backends.cuda.matmul.fp32_precision = 'tf32'"
# By its words in the message, a change after the capture, until its context ends.
CHANGES: dict[str, Callable[[Any, slk.StableLoRAAdamW], AbstractContextManager[Any]]] = {
    r"model.training was True and is False": lambda m, o: changed(m, "training", False),
    r"model.0.merged was False and is True": lambda m, o: merged(m),
    r"model.0._disabled was False and is True": lambda m, o: slk.disable_lora(m),
    r"model.0.scaling was 8.0 and is 1.0": lambda m, o: changed(m[0], "scaling", 1.0),
    r"model._modules.1 was Tanh() and is ReLU()": lambda m, o: changed(m, "1", nn.ReLU()),
    r"_parameters.lora_A was a tensor of": lambda m, o: changed(
        m[0], "lora_A", nn.Parameter(m[0].lora_A.detach())
    ),
    r"model.0._forward_hooks.": lambda m, o: m[0].register_forward_hook(nothing),
    r"model.0.lora_B._backward_hooks was None and is": lambda m, o: m[0].lora_B.register_hook(
        nothing
    ),
    r"model.0.lora_A.requires_grad was True and is False": lambda m, o: changed(
        m[0].lora_A, "requires_grad", False
    ),
    r"model.0.weight has other memory than before": lambda m, o: changed(
        m[0].weight, "data", m[0].weight.data.clone()
    ),
    r"backend was 'triton' and is 'torch'": lambda m, o: slk.settings(backend="torch"),
    r"strategy was 'auto' and is 'branch_first'": lambda m, o: slk.settings(
        strategy="branch_first"
    ),
    r"first_use was 'off' and is 'on'": lambda m, o: slk.settings(first_use="on"),
    r"deterministic algorithms was False and is True": lambda m, o: deterministic(),
    r"TensorFloat-32 in float32 products was False and is True": lambda m, o: switched(TF32),
    r"global module hooks was False": lambda m, o: (
        nn.modules.module.register_module_forward_pre_hook(nothing)
    ),
    r"optimizer's step hooks was [] and is [": lambda m, o: o.register_step_pre_hook(nothing),
    r"optimizer.shrink_schedule was None and is": lambda m, o: changed(o, "shrink_schedule", float),
    r"optimizer.param_groups[0]['eps'] was 1e-08 and is 0.1": lambda m, o: update(
        o.param_groups[0], "eps", 0.1
    ),
    r"optimizer.param_groups[0]['max_grad_norm'] was None and is 1.0": lambda m, o: changed(
        o, "max_grad_norm", 1.0
    ),
    r"optimizer has other parameters or another state": lambda m, o: update(
        o.state, m[0].lora_A, {}
    ),
    r"optimizer has other parameters or": lambda m, o: update(
        o.param_groups[0], "params", [m[0].lora_A]
    ),
}


@pytest.fixture(scope="module")
def shared() -> Any:
    """One captured step for all changes, each of which is taken back."""
    with slk.settings(backend="triton"), pytest.MonkeyPatch.context() as patch:
        graphs = use_graphs(patch)
        yield captured(), graphs


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_after_the_capture_is_noticed(words, shared):
    (step, model, optimizer), graphs = shared
    before, replays = [p.detach().clone() for p in model.parameters()], graphs.replays
    message = re.escape(words) + ".*which its CUDA graph does not know: put it back, or call"
    with CHANGES[words](model, optimizer), pytest.raises(RuntimeError, match=message):
        step((X, GOAL))
    assert all_equal(before, [p.detach() for p in model.parameters()]) and graphs.replays == replays
    step((X, GOAL))
    assert graphs.replays == replays + 1


SCALERS: dict[str, Callable[[torch.amp.GradScaler], None]] = {
    "grad_scaler.get_growth_factor() was 2.0 and is 3.0": lambda scaler: scaler.set_growth_factor(
        3.0
    ),
    "grad_scaler.get_backoff_factor() was 0.5 and is 0.25": lambda scaler: (
        scaler.set_backoff_factor(0.25)
    ),
    "grad_scaler.get_growth_interval() was 2000 and is 7": lambda scaler: (
        scaler.set_growth_interval(7)
    ),
}


@pytest.mark.parametrize("words", SCALERS)
def test_a_change_of_the_grad_scaler_is_noticed(words):
    scaler = torch.amp.GradScaler(DEVICE)
    step, *_ = captured(grad_scaler=scaler)
    SCALERS[words](scaler)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        step((X, GOAL))


RESETS: dict[str, tuple[Callable[[slk.StableLoRAAdamW], Any], str]] = {
    "a state loaded": (
        lambda o: o.load_state_dict(o.state_dict()),
        r"optimizer has other parameters or another state .*load_state_dict, state\), which",
    ),
    "a tensor as lr": (
        lambda o: o.param_groups[0].update(lr=torch.tensor(0.1, device=DEVICE)),
        r"param_groups\[0\]\['lr'\] was 'a number' and is a tensor of shape \[\], which",
    ),
}


@pytest.mark.parametrize("change", RESETS)
def test_a_change_that_stays_needs_a_reset(change, graphs):
    step, model, optimizer = captured()
    RESETS[change][0](optimizer)
    with pytest.raises(RuntimeError, match=RESETS[change][1]):
        step((X, GOAL))
    twin = copy.deepcopy((model, optimizer))
    step.reset()
    losses = [[take(batch) for batch in batches(4)] for take in (step, eager(*twin))]
    assert (
        all_equal(*losses)
        and all_equal(snapshot(optimizer), snapshot(twin[1]))
        and graphs.captures == 2
    )


def test_a_change_while_it_warms_up_begins_anew(graphs):
    model, optimizer = make()
    step = graphed(model, optimizer)
    step((X, GOAL))
    model.eval()
    step((X, GOAL))
    step((X, GOAL))
    assert graphs.captures == 0
    step((X, GOAL))
    assert graphs.captures == 1


def test_a_change_of_a_peft_model_is_noticed():
    model, optimizer = llama_with("PEFT's layers")
    step = graphed(model, optimizer, None)
    batch = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "labels")}
    for _ in range(3):
        step(batch)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.set_scale("default", 3.0)
    with pytest.raises(RuntimeError, match=r"q_proj\.scaling\.default was 4\.0 and is 12\.0"):
        step(batch)
    layer.set_scale("default", 1.0)
    slk.restore_peft(model)
    with pytest.raises(RuntimeError, match=r"q_proj was 'AcceleratedLinear' and is 'Linear'"):
        step(batch)
    slk.accelerate_peft(model)
    step(batch)
