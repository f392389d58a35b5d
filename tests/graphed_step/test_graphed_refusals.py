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


def after(change: Callable[[nn.Module, slk.StableLoRAAdamW], Any]) -> Callable[..., Any]:
    """A graphed step that is made after a change."""
    return lambda model, optimizer: (change(model, optimizer), graphed(model, optimizer))


def given(**options: Any) -> Callable[..., Any]:
    return lambda model, optimizer: slk.GraphedStep(
        **{"model": model, "optimizer": optimizer, "loss_fn": mse, **options}
    )


def called(batch: Any, **options: Any) -> Callable[..., Any]:
    return lambda model, optimizer: graphed(model, optimizer, **options)(batch)


def pre_hook(model: nn.Module, optimizer: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, args: None)


def step_hook(model: nn.Module, optimizer: Any) -> None:
    optimizer.register_step_post_hook(print)


HOOKS = r"model must have no hooks, .* got hooks on"
STEP_HOOKS = "optimizer must have no step hooks, .* got <built-in function print>"
DENSE, LOSS = "must be a dense tensor, got", "loss_fn must return a 0-d tensor with a gradient, got"
# By name: what is refused, the error and its message.
REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "pre-hook": (after(pre_hook), ValueError, f"{HOOKS} '0'"),
    "backward hook": (
        after(lambda m, o: m[2].register_full_backward_hook(lambda module, grads, outputs: None)),
        ValueError,
        f"{HOOKS} '2'",
    ),
    "accumulate hook": (
        after(lambda m, o: m[2].lora_A.register_post_accumulate_grad_hook(lambda p: None)),
        ValueError,
        f"{HOOKS} '2.lora_A'",
    ),
    "step hook": (after(step_hook), ValueError, STEP_HOOKS),
    "schedule": (
        after(lambda m, o: setattr(o, "shrink_schedule", float)),
        ValueError,
        "optimizer must have no shrink_schedule, .* got <class 'float'>: write its value",
    ),
    "buffer elsewhere": (
        after(lambda m, o: m.register_buffer("elsewhere", torch.zeros(1, device="meta"))),
        ValueError,
        "model and optimizer must be on one GPU, got tensors on cpu, meta",
    ),
    "another trainable parameter": (
        after(lambda m, o: m[2].weight.requires_grad_()),
        ValueError,
        r"optimizer must have every trainable parameter of model, .* got none of the name '2\.weight'",
    ),
    "not capturable": (
        after(lambda m, o: o.param_groups[0].update(capturable=False)),
        ValueError,
        "optimizer must be built with capturable=True, got capturable=False",
    ),
    # Arguments
    "model": (given(model=1), TypeError, "model must be an nn.Module, got int"),
    "optimizer": (given(optimizer=1), TypeError, "optimizer must be a StableLoRAAdamW, got int"),
    "loss_fn": (given(loss_fn=1), TypeError, "loss_fn must be a function of the model and a batch, got 1"),
    "grad_scaler": (given(grad_scaler=1), TypeError, "grad_scaler must be a torch.amp.GradScaler, got int"),
    "max_graphs": (given(max_graphs=0), ValueError, "max_graphs must be at least 1, got 0"),
    "num_warmup_iters": (given(num_warmup_iters=0), ValueError, "num_warmup_iters must be at least 1, got 0"),
    "enabled": (given(enabled=1), TypeError, "enabled must be a bool, got 1"),
    "no sample batch": (
        given(sample_batches=[]),
        ValueError,
        "sample_batches must be 1 to max_graphs=8 batches, got 0",
    ),
    # Batches
    "a number": (called(3), TypeError, f"batch {DENSE} int; a batch is a tensor, or"),
    "a number in a tuple": (called((X, 3)), TypeError, rf"batch\[1\] {DENSE} int"),
    "a list in a dict": (called({"x": [X]}), TypeError, rf"batch\['x'\] {DENSE} list"),
    "a sparse tensor": (called(X.to_sparse()), TypeError, f"batch {DENSE} layout torch.sparse_coo"),
    "a parameter": (called(nn.Parameter(X)), TypeError, f"batch {DENSE} Parameter"),
    "a batch with a gradient": (
        called((X, GOAL.clone().requires_grad_())),
        ValueError,
        r"batch\[1\] must need no gradient, got",
    ),
    "no dict": (called((X, GOAL), loss_fn=None), TypeError, "batch must be a dict unless loss_fn is given, got tuple"),
    # Losses
    "a loss that is a number": (called((X, GOAL), loss_fn=lambda m, b: 1.0), TypeError, f"{LOSS} float"),
    "a vector": (called((X, GOAL), loss_fn=lambda m, b: m(b[0]).sum(0)), TypeError, rf"{LOSS} one of shape \[5\]"),
    "a loss without a gradient": (
        called((X, GOAL), loss_fn=lambda m, b: m(b[0]).sum().detach()),
        TypeError,
        rf"{LOSS} one of shape \[\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    model, optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    action, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        action(model, optimizer)
    assert all_equal(before, [p.detach() for p in model.parameters()])


@pytest.mark.parametrize(("change", "message"), [(pre_hook, f"{HOOKS} '0'"), (step_hook, STEP_HOOKS)])
def test_it_is_refused_also_if_it_comes_after_the_construction(change: Callable[..., None], message: str) -> None:
    model, optimizer = make()
    step = graphed(model, optimizer)
    change(model, optimizer)
    for batch in batches(2):
        step(batch)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
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


@pytest.mark.parametrize("batch", [X, [X, GOAL], (X, GOAL), {"x": X, "goal": GOAL}], ids=lambda b: type(b).__name__)
def test_loss_fn_gets_the_batch_as_it_came(batch: Any) -> None:
    kinds = []

    def loss_fn(model: nn.Module, given: Any) -> Tensor:
        kinds.append(type(given))
        x = given if isinstance(given, Tensor) else next(iter(given.values() if isinstance(given, dict) else given))
        return model(x).square().mean()

    graphed(*make(), loss_fn=loss_fn)(batch)
    assert kinds == [type(batch)]


RANDOM = "the model or loss_fn draws random numbers on the host"
NOT_HELD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "reads the loss": (lambda loss: loss * (loss.item() < 1e9), "operation not permitted .* may not read from the GPU"),
    "draws on the host": (lambda loss: loss * random.random(), RANDOM),
    "draws from NumPy": (lambda loss: loss * numpy.random.rand(), RANDOM),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_a_step_that_a_graph_cannot_hold_is_refused(name: str, graphs: RecordedGraphs) -> None:
    """It is not taken, now or at the next call, and eager steps go on from where they were."""
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
