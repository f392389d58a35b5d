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

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.helpers.graphed_steps import GOAL, X, batches, captured, eager, graphed, make, mse
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.recorded_graphs import RecordedGraphs


def with_pre_hook(model: nn.Module, optimizer: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


def with_backward_hook(model: nn.Module, optimizer: Any) -> None:
    model[2].register_full_backward_hook(lambda module, grads, outputs: None)


def with_accumulate_hook(model: nn.Module, optimizer: Any) -> None:
    model[2].lora_A.register_post_accumulate_grad_hook(lambda p: None)


def with_step_hook(model: nn.Module, optimizer: Any) -> None:
    optimizer.register_step_post_hook(print)


def with_schedule(model: nn.Module, optimizer: Any) -> None:
    optimizer.shrink_schedule = float


def with_buffer_elsewhere(model: nn.Module, optimizer: Any) -> None:
    model.register_buffer("elsewhere", torch.zeros(1, device="meta"))


def with_another_trainable(model: nn.Module, optimizer: Any) -> None:
    model[2].weight.requires_grad_()


def not_capturable(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["capturable"] = False


REFUSED = {
    with_pre_hook: r"model must have no hooks, .* got hooks on '0'",
    with_backward_hook: r"model must have no hooks, .* got hooks on '2'",
    with_accumulate_hook: r"model must have no hooks, .* got hooks on '2.lora_A'",
    with_step_hook: "optimizer must have no step hooks, .* got <built-in function print>",
    with_schedule: "optimizer must have no shrink_schedule, .* got <class 'float'>: write its value",
    with_buffer_elsewhere: "model and optimizer must be on one GPU, got tensors on cpu, meta",
    with_another_trainable: r"optimizer must have every trainable parameter of model, .* got none of the name '2\.weight'",
    not_capturable: "optimizer must be built with capturable=True, got capturable=False",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_cannot_be_captured_is_refused(change: Callable[..., None]) -> None:
    model, optimizer = make()
    change(model, optimizer)
    with pytest.raises(ValueError, match=REFUSED[change]):
        graphed(model, optimizer)


@pytest.mark.parametrize("change", [with_pre_hook, with_step_hook], ids=lambda change: change.__name__)
def test_it_is_refused_also_if_it_comes_after_the_construction(change: Callable[..., None]) -> None:
    model, optimizer = make()
    step = graphed(model, optimizer)
    change(model, optimizer)
    step(batches(1)[0])
    step(batches(1)[0])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=REFUSED[change]):
        step(batches(1)[0])
    assert all_equal(before, snapshot(optimizer))


def test_data_parallelism_is_refused(mesh: Any) -> None:
    model, optimizer = make()
    for wrapper in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        with pytest.raises(ValueError, match=f"model must not be in {wrapper.__name__}, .* got it in one"):
            graphed(wrapper(model), optimizer)


def test_shards_are_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model, _ = make()
    fully_shard(model, mesh=mesh)
    optimizer = slk.StableLoRAAdamW.from_model(model, capturable=True)
    with pytest.raises(ValueError, match=r"model must be whole on one GPU, got the DTensor '0\.weight'"):
        graphed(model, optimizer)


def test_global_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.raises(ValueError, match=r"model must have no hooks, .* got global module hooks"):
            graphed(*make())
    finally:
        handle.remove()


def test_an_optimizer_on_pytorch_operators_is_refused() -> None:
    with slk.use_backend("torch"), pytest.raises(ValueError, match=r"must step on Triton's kernels .* backend 'torch'"):
        graphed(*make())


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model must be on a GPU to be captured, got it on cpu; enabled=False runs"):
        graphed(*make())


WRONG = {
    "model": (TypeError, "model must be an nn.Module, got int"),
    "optimizer": (TypeError, "optimizer must be a StableLoRAAdamW, got int"),
    "loss_fn": (TypeError, "loss_fn must be a function of the model and a batch, got 1"),
    "grad_scaler": (TypeError, "grad_scaler must be a torch.amp.GradScaler, got int"),
    "max_graphs": (ValueError, "max_graphs must be at least 1, got 0"),
    "num_warmup_iters": (ValueError, "num_warmup_iters must be at least 1, got 0"),
    "enabled": (TypeError, "enabled must be a bool, got 1"),
    "sample_batches": (ValueError, "sample_batches must be 1 to max_graphs=8 batches, got 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    model, optimizer = make()
    value = {"max_graphs": 0, "num_warmup_iters": 0, "sample_batches": []}.get(name, 1)
    error, match = WRONG[name]
    with pytest.raises(error, match=match):
        slk.GraphedStep(**{"model": model, "optimizer": optimizer, "loss_fn": mse, name: value})


WRONG_BATCHES = {
    "a number": (3, TypeError, "batch must be a dense tensor, got int; a batch is a tensor, or"),
    "a number in a tuple": ((X, 3), TypeError, r"batch\[1\] must be a dense tensor, got int"),
    "a list in a dict": ({"x": [X]}, TypeError, r"batch\['x'\] must be a dense tensor, got list"),
    "a sparse tensor": (X.to_sparse(), TypeError, "batch must be a dense tensor, got layout torch.sparse_coo"),
    "a parameter": (nn.Parameter(X), TypeError, "batch must be a dense tensor, got Parameter"),
    "with a gradient": ((X, GOAL.clone().requires_grad_()), ValueError, r"batch\[1\] must need no gradient, got"),
}


@pytest.mark.parametrize("name", WRONG_BATCHES)
def test_wrong_batches(name: str) -> None:
    step = graphed(*make())
    batch, error, match = WRONG_BATCHES[name]
    with pytest.raises(error, match=match):
        step(batch)


def test_without_a_loss_function_a_batch_is_a_dict() -> None:
    with pytest.raises(TypeError, match="batch must be a dict unless loss_fn is given, got tuple"):
        graphed(*make(), loss_fn=None)((X, GOAL))


@pytest.mark.parametrize("batch", [X, [X, GOAL], (X, GOAL), {"x": X, "goal": GOAL}], ids=lambda b: type(b).__name__)
def test_loss_fn_gets_the_batch_as_it_came(batch: Any) -> None:
    kinds = []

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        kinds.append(type(given))
        x = given if isinstance(given, Tensor) else next(iter(given.values() if isinstance(given, dict) else given))
        return model(x).square().mean()

    graphed(*make(), loss_fn=loss_fn)(batch)
    assert kinds == [type(batch)]


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "a number": (lambda model, batch: 1.0, "got float"),
    "a vector": (lambda model, batch: model(batch[0]).sum(0), r"got one of shape \[5\]"),
    "no gradient": (lambda model, batch: model(batch[0]).sum().detach(), r"got one of shape \[\]"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_wrong_losses(name: str) -> None:
    loss_fn, got = LOSSES[name]
    with pytest.raises(TypeError, match=f"loss_fn must return a 0-d tensor with a gradient, {got}"):
        graphed(*make(), loss_fn=loss_fn)((X, GOAL))


def reads_the_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = mse(model, batch)
    return loss if loss.item() < 1e9 else 2 * loss


def draws_on_the_host(model: nn.Module, batch: Any) -> Tensor:
    return mse(model, batch) * random.random()


def draws_from_numpy(model: nn.Module, batch: Any) -> Tensor:
    return mse(model, batch) * numpy.random.rand()


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (reads_the_loss, r"a CUDA graph cannot hold this step: operation not permitted .* may not read from the GPU"),
        *(
            (draws, "a CUDA graph cannot hold this step: the model or loss_fn draws random numbers on the host")
            for draws in (draws_on_the_host, draws_from_numpy)
        ),
    ],
)
def test_a_step_that_a_graph_cannot_hold_is_refused(loss_fn: Any, match: str, graphs: RecordedGraphs) -> None:
    """It is not taken, now or at the next call, and eager steps go on from where they were."""
    model, optimizer = make()
    step = graphed(model, optimizer, loss_fn)
    step((X, GOAL))
    step((X, GOAL))
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            step((X, GOAL))
    assert all_equal(before, snapshot(optimizer)) and graphs.replays == 0 and step.captured == []
    assert all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2
    twin = copy.deepcopy((model, optimizer))
    losses = [eager(*twin)((X, GOAL)), graphed(model, optimizer, enabled=False)((X, GOAL))]
    assert torch.equal(*losses) and all_equal(snapshot(twin[1]), snapshot(optimizer))


def test_gradients_from_outside_are_refused() -> None:
    step, model, optimizer = captured()
    mse(model, (X, GOAL)).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"gradients must be None before a step, .* got some: .*zero_grad\(\) first"):
        step((X, GOAL))
    assert all_equal(before, snapshot(optimizer)) and model[0].lora_A.grad is not None
    optimizer.zero_grad()
    step((X, GOAL))


def test_autocast_around_the_step_is_refused() -> None:
    step, *_ = captured()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast must be inside of loss_fn"):
        step((X, GOAL))


def test_an_exception_of_the_model_leaves_no_gradient() -> None:
    def fails(model: nn.Module, batch: Any) -> Tensor:
        mse(model, batch).backward()
        raise KeyError("mine")

    model, optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="mine"):
        graphed(model, optimizer, fails)((X, GOAL))
    assert all_equal(before, [p.detach() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 2e-2


@pytest.mark.parametrize("options", [{"max_graphs": 1}, {"sample_batches": [batches(1)[0]]}])
def test_a_further_shape_is_refused(options: dict[str, Any]) -> None:
    step, _, optimizer = captured(**options)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"one of the 1 shapes .* got \(float32 \[3, 64\], .* instead of \(float32 \[6, 64\]"
    ):
        step(batches(1, rows=3)[0])
    assert all_equal(before, snapshot(optimizer))
    step(batches(1)[0])
