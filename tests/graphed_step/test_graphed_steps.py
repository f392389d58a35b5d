"""Each call of a ``GraphedStep`` is one eager step to the bit: it warms up, captures, or replays."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from tests.helpers.graphed_steps import (
    DEVICE,
    ROWS,
    SMALL,
    STEPS,
    assert_eager_steps,
    batches,
    captured,
    eager,
    graphed,
    llama_with,
    make,
    mse,
)
from tests.helpers.optimizers import all_equal, snapshot
from tests.helpers.steps import latches

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.05},
    "8 bits": {"moments_dtype": torch.uint8},
    "bfloat16": {"dtype": torch.bfloat16},
}
if SMALL:
    OPTIONS["dropout"] = {"dropout": 0.3}


@pytest.mark.parametrize(
    "name",
    ["plain", *(pytest.param(n, marks=pytest.mark.nightly) for n in OPTIONS if n != "plain")],
)
def test_calls_are_eager_steps(name, graphs):
    """The lr is a number that changes at each step."""
    _, optimizer, _ = assert_eager_steps(
        batches(dtype=OPTIONS[name].get("dtype", torch.float32)),
        lambda turn, model, optimizer: optimizer.param_groups[0].update(lr=2e-2 / (1 + turn / 4)),
        partial(make, **OPTIONS[name]),
    )
    assert (graphs.captures, graphs.replays) == (1, STEPS - 2)
    found = latches(optimizer)
    assert found["2"] == 1 and 2 < found["0"] <= STEPS
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_each_replay_draws_its_own_masks():
    model, optimizer = make(dropout=0.5, lr=0.0, shrink_ratio=0.0)
    nn.init.ones_(model[0].lora_B)
    step = graphed(model, optimizer)
    (batch,) = batches(1)
    losses = [float(step(batch)) for _ in range(6)]
    assert len(set(losses)) == 6 and len(step.captured) == 1


def test_autocast_in_the_loss_function():
    """Its cache must not keep casts of A and B from one replay to the next."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return mse(model, batch)

    assert_eager_steps(batches(5), loss_fn=loss_fn)


def test_numbers_and_tensors_change_between_replays():
    """lr is a tensor that comes while it warms up, and that its owner writes to; the others are
    numbers that he replaces.
    """
    tensors = []

    def change(turn: int, model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
        group = optimizer.param_groups[0]
        if turn == 1:
            tensors.append(torch.tensor(1e-3, device=DEVICE))
            group["lr"] = tensors[-1]
        elif turn == 4:
            group["lr"].fill_(0.1)
            group.update(weight_decay=0.5, shrink_ratio=0.25)

    _, optimizer, _ = assert_eager_steps(batches(6), change)
    assert optimizer.param_groups[0]["lr"] is tensors[-1]


def test_a_grad_scaler_is_part_of_the_graph(graphs):
    """The sixth batch overflows: its step is skipped and the scale halves, in a replay. Later the
    scale grows.
    """
    made: list[torch.amp.GradScaler] = []

    def scaler() -> torch.amp.GradScaler:
        made.append(torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=3))
        return made[-1]

    scales = []
    given = [(x, goal * 1e38 if turn == 5 else goal) for turn, (x, goal) in enumerate(batches(9))]
    assert_eager_steps(given, lambda *args: scales.append(made[-1].get_scale()), scaler=scaler)
    assert graphs.replays == 7 and scales[:9] == scales[9:]
    # Before each step, and after the last.
    scales = [*scales[9:], made[-1].get_scale()]
    assert scales[6] == scales[5] / 2 and scales[9] == scales[6] * 2


def test_two_shapes_take_turns(graphs):
    """Graphs share memory, and must not overwrite what another still needs."""
    half = ROWS // 2
    order = [
        batch for pair in zip(batches(5), batches(5, rows=half), strict=True) for batch in pair
    ]
    step, *_ = assert_eager_steps(order)
    assert (graphs.captures, graphs.replays) == (2, 6)
    shapes = [[[*t.shape] for t in batch] for batch in order[:2]]
    assert step.captured == [f"(float32 {x}, float32 {goal})" for x, goal in shapes]


@pytest.mark.parametrize("seen", [True, False], ids=["in place", "refresh"])
@pytest.mark.parametrize("at", [2, 4], ids=["before the capture", "between replays"])
def test_after_a_write_to_a_parameter_one_step_is_eager(seen, at, graphs):
    """The write makes B large enough to latch, which a replay, with the norms of the step before
    it, would not see.
    """

    @torch.no_grad()
    def change(turn: int, model: nn.Module, optimizer: slk.StableLoRAAdamW) -> None:
        if turn == at:
            (model[0].lora_B if seen else model[0].lora_B.data).mul_(100)
            if not seen:
                optimizer.refresh()

    _, optimizer, _ = assert_eager_steps(batches(6), change, partial(make, lr=1e-3))
    assert latches(optimizer)["0"] == at + 1 and graphs.replays == 3


def test_a_backward_pass_through_what_a_replay_overwrote_is_refused():
    step, model, _ = captured()
    x, goal = (t.to(DEVICE) for t in batches(1)[0])
    loss = mse(model, (x, goal))
    step((x, goal))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "kind", ["PEFT's layers", pytest.param("our layers", marks=pytest.mark.nightly)]
)
def test_a_hugging_face_model_takes_its_batch_as_a_dict(kind, graphs):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(32, (2, 5), generator=generator) for _ in range(5)]
    step, *_ = assert_eager_steps(
        [{"input_ids": ids, "labels": ids} for ids in rows],
        made=partial(llama_with, kind),
        loss_fn=None,
    )
    assert (graphs.captures, graphs.replays) == (1, 3)
    assert step.captured == ["(input_ids int64 [2, 5], labels int64 [2, 5])"]


# enabled=False


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_not_enabled_every_step_is_eager(backend, graphs):
    made = partial(make, capturable=False, shrink_schedule=lambda step: 0.1 / step)
    with slk.settings(backend=backend):
        assert_eager_steps(batches(4), made=made, enabled=False)
    assert graphs.captures == 0


def test_not_enabled_gradients_are_those_of_a_plain_step():
    """Those from before are added to, and those that another optimizer steps on stay for it."""
    results = []
    for make_step in (eager, partial(graphed, enabled=False)):
        model, optimizer = make()
        head = model[2].weight.requires_grad_()
        step, other = make_step(model, optimizer), torch.optim.SGD([head], lr=0.1)
        for batch in batches(3):
            mse(model, [t.to(DEVICE) for t in batch]).backward()
            with torch.autocast(DEVICE, torch.bfloat16):
                step(batch)
            assert model[0].lora_A.grad is None
            other.step()
            other.zero_grad()
        results.append([head.detach(), *snapshot(optimizer)])
    assert all_equal(*results)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_exception_leaves_parameters_and_gradients_as_they_were(enabled):
    """Those from before are there if it is not enabled, and else there are none."""

    def fails(model: nn.Module, batch: Any) -> Tensor:
        if enabled:
            mse(model, batch).backward()
        raise KeyError("mine")

    model, optimizer = make()
    if not enabled:
        mse(model, [t.to(DEVICE) for t in batches(1)[0]]).backward()
    before = [
        (p.detach().clone(), p.grad if p.grad is None else p.grad.clone())
        for p in model.parameters()
    ]
    with pytest.raises(KeyError, match="mine"):
        graphed(model, optimizer, fails, enabled=enabled)(batches(1)[0])
    for p, (value, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))
    assert optimizer.param_groups[0]["lr"] == 2e-2
