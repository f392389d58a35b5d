"""Each call of a ``GraphedStep`` is one eager step to the bit: it warms up, captures, or replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.helpers.graphed_steps import STEPS, batches, captured, eager, graphed, llama_with, make, mse
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.recorded_graphs import RecordedGraphs
from tests.helpers.steps import latches

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "clipped": {"max_grad_norm": 0.05},
    "8 bits": {"moments_dtype": torch.uint8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_calls_are_eager_steps(name: str, graphs: RecordedGraphs) -> None:
    """Losses, parameters, moments and latches have the bits of eager steps. The lr is a number that changes at each step."""
    twins = [make(**OPTIONS[name]) for _ in range(2)]
    losses = []
    for (model, optimizer), make_step in zip(twins, (eager, graphed), strict=True):
        step = make_step(model, optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i / 4))
        torch.manual_seed(5)
        found = []
        for batch in batches():
            found.append(step(batch))
            schedule.step()
        losses.append(found)
    assert (graphs.captures, graphs.replays) == (1, STEPS - 2)
    assert len({float(loss) for loss in losses[1]}) == STEPS
    assert all_equal(*losses)
    assert all_equal(*(snapshot(optimizer) for _, optimizer in twins))
    eager_latches, graphed_latches = (latches(optimizer) for _, optimizer in twins)
    assert eager_latches == graphed_latches
    assert graphed_latches["2"] == 1 and 2 < graphed_latches["0"] <= STEPS
    assert type(twins[1][1].param_groups[0]["lr"]) is float


def test_each_replay_draws_its_own_masks() -> None:
    model, optimizer = make(dropout=0.5, lr=0.0, shrink_ratio=0.0)
    step = graphed(model, optimizer)
    (batch,) = batches(1)
    losses = [float(step(batch)) for _ in range(6)]
    assert len(set(losses)) == 6 and len(step.captured) == 1


def test_numbers_and_tensors_change_between_replays() -> None:
    """lr is a tensor that its owner writes to; the others are numbers that he replaces."""
    results = []
    for make_step in (eager, graphed):
        lr = torch.tensor(2e-2)
        model, optimizer = make(lr=lr)
        step = make_step(model, optimizer)
        for turn, batch in enumerate(batches(6)):
            if turn == 4:
                lr.fill_(0.1)
                optimizer.param_groups[0].update(weight_decay=0.5, shrink_ratio=0.25)
            step(batch)
        results.append(snapshot(optimizer))
        assert optimizer.param_groups[0]["lr"].data_ptr() == lr.data_ptr()
    assert all_equal(*results)


def test_a_replaced_lr_tensor_is_noticed_and_after_reset_used(graphs: RecordedGraphs) -> None:
    step, _, optimizer = captured()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.0)
    with pytest.raises(
        RuntimeError, match=r"param_groups\[0\]\['lr'\] was 'a number' and is a tensor of shape \[\], which"
    ):
        step(batches(1)[0])
    optimizer.param_groups[0].update(weight_decay=0.0, shrink_ratio=0.0)
    step.reset()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for batch in batches(3):
        step(batch)
    assert graphs.captures == 2 and optimizer.param_groups[0]["lr"] is lr
    assert all_equal(before, [p.detach() for p in optimizer.param_groups[0]["params"]])


def test_an_lr_tensor_that_comes_while_it_warms_up_is_used() -> None:
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        step = make_step(model, optimizer)
        for turn, batch in enumerate(batches(6)):
            if turn == 1:
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
            step(batch)
        results.append(snapshot(optimizer))
    assert all_equal(*results)


def test_a_grad_scaler_is_part_of_the_graph(graphs: RecordedGraphs) -> None:
    """The sixth batch overflows: its step is skipped and the scale halves, in a replay. Later the scale grows."""
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        step = make_step(model, optimizer, **{"scaler" if make_step is eager else "grad_scaler": scaler})
        scales = []
        for turn, (x, goal) in enumerate(batches()):
            step((x, goal * 1e38 if turn == 5 else goal))
            scales.append(scaler.get_scale())
        results.append([*snapshot(optimizer), torch.tensor(scales)])
    assert all_equal(*results) and graphs.replays == STEPS - 2
    assert scales[5] == scales[4] / 2 and scales[8] == scales[5] * 2


def test_two_shapes_take_turns(graphs: RecordedGraphs) -> None:
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make()
        step = make_step(model, optimizer)
        order = [batch for pair in zip(batches(5), batches(5, rows=3), strict=True) for batch in pair]
        losses = torch.stack([step(batch) for batch in order])
        results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results)
    assert (graphs.captures, graphs.replays) == (2, 6)
    assert step.captured == ["(float32 [6, 64], float32 [6, 5])", "(float32 [3, 64], float32 [3, 5])"]


def write(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    with torch.no_grad():
        model[0].lora_B.mul_(100)


def write_unseen(model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
    model[0].lora_B.data.mul_(100)
    optimizer.refresh()


@pytest.mark.parametrize("change", [write, write_unseen])
@pytest.mark.parametrize("turn", [2, 4], ids=["before the capture", "between replays"])
def test_after_a_write_to_a_parameter_one_step_is_eager(change: Any, turn: int, graphs: RecordedGraphs) -> None:
    """The write makes B large enough to latch, which a replay, with the norms of the step before it, would not see."""
    results = []
    for make_step in (eager, graphed):
        model, optimizer = make(lr=1e-3)
        step = make_step(model, optimizer)
        for i, batch in enumerate(batches(6)):
            if i == turn:
                change(model, optimizer)
            step(batch)
        results.append(snapshot(optimizer))
        assert latches(optimizer)["0"] == turn + 1
    assert all_equal(*results) and graphs.replays == 3


def test_a_backward_pass_through_what_a_replay_overwrote_is_refused() -> None:
    step, model, _ = captured()
    x, goal = batches(1)[0]
    loss = mse(model, (x, goal))
    step((x, goal))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_not_enabled_every_step_is_eager(backend: str, graphs: RecordedGraphs) -> None:
    results = []
    with slk.use_backend(backend):
        for make_step in (eager, lambda *args: graphed(*args, enabled=False)):
            model, optimizer = make(capturable=False, shrink_schedule=lambda step: 0.1 / step)
            step = make_step(model, optimizer)
            losses = torch.stack([step(batch) for batch in batches(4)])
            results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results) and graphs.captures == 0


def test_not_enabled_gradients_are_those_of_a_plain_step() -> None:
    """Those from before are added to, and those that another optimizer steps on stay for it."""
    results = []
    for make_step in (eager, lambda *args: graphed(*args, enabled=False)):
        model, optimizer = make()
        head = model[2].weight.requires_grad_()
        step, other = make_step(model, optimizer), torch.optim.SGD([head], lr=0.1)
        for batch in batches(3):
            mse(model, batch).backward()
            with torch.autocast("cpu", torch.bfloat16):
                step(batch)
            assert model[0].lora_A.grad is None
            other.step()
            other.zero_grad()
        results.append([head.detach(), *snapshot(optimizer)])
    assert all_equal(*results)


def test_not_enabled_an_exception_leaves_gradients_as_they_were() -> None:
    model, optimizer = make()
    mse(model, batches(1)[0]).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(TypeError, match="loss_fn must return a 0-d tensor"):
        graphed(model, optimizer, lambda model, batch: 1, enabled=False)(batches(1)[0])
    assert before and all_equal(before, [p.grad for p in model.parameters() if p.grad is not None])


def test_gradients_that_the_step_did_not_make_stay() -> None:
    model, optimizer = make()
    model[2].weight.grad = kept = torch.ones_like(model[2].weight)
    step = graphed(model, optimizer)
    for batch in batches(5):
        step(batch)
    assert step.captured and model[2].weight.grad is kept


@pytest.mark.parametrize("kind", ["PEFT's layers", "our layers"])
def test_a_hugging_face_model_takes_its_batch_as_a_dict(kind: str, graphs: RecordedGraphs) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(32, (2, 5), generator=generator) for _ in range(5)]
    results = []
    for make_step in (eager, graphed):
        model, optimizer = llama_with(kind)
        step = make_step(model, optimizer, None if make_step is graphed else lambda model, batch: model(**batch).loss)
        torch.manual_seed(1)
        losses = torch.stack([step({"input_ids": ids, "labels": ids}) for ids in rows])
        results.append([losses, *snapshot(optimizer)])
    assert all_equal(*results) and (graphs.captures, graphs.replays) == (1, 3)
    assert step.captured == ["(input_ids int64 [2, 5], labels int64 [2, 5])"]
