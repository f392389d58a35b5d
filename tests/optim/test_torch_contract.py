"""What PyTorch promises of its optimizers: GradScaler, schedulers, hooks, closures, compiled steps
and copies.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import (
    DEVICE,
    all_equal,
    halves,
    make_pairs,
    params_of,
    set_grads,
    snapshot,
)
from tests.helpers.steps import assert_all_close, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_grad_scaler_hands_over_scale_and_verdict(max_grad_norm, backend):
    pairs, twins = make_pairs(), make_pairs()
    options = {"lr": 1e-2, "max_grad_norm": max_grad_norm}
    optimizer, other = StableLoRAAdamW(pairs, **options), StableLoRAAdamW(twins, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    # The first gradients have a norm of less than 1, and of more than 1 once they are scaled.
    for poisoned, size in ((False, 1e-5), (True, 1.0), (False, 1.0)):
        loss = size * sum(
            (p * torch.arange(p.numel(), device=DEVICE).view_as(p)).sum() for p in halves(pairs)
        )
        scaler.scale(loss).backward()
        if poisoned:
            pairs[0].B.grad.fill_(math.inf)
        else:
            for p, q in zip(halves(pairs), halves(twins), strict=True):
                q.grad = p.grad / scaler.get_scale()
            other.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4.0
    assert_all_close(halves(pairs), halves(twins), rtol=1e-6, atol=1e-8)


def test_closure_scheduler_and_zero_grad(backend):
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in halves(pairs))
        loss.backward()
        return loss

    losses, rates = [], set()
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
        rates.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]))
    assert losses[2] < losses[1] < losses[0] and len(rates) == 3
    # Zeros are gradients, None are not.
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)
    take_step(0, optimizer, scale=0.0)
    assert optimizer.state[pairs[0].A]["step"].item() == 4


def test_backward_through_overwritten_parameters_is_noticed(backend):
    pair, other = make_pairs([(4, 8, 8)] * 2)
    optimizer = StableLoRAAdamW([pair, other])
    loss = (pair.A.square().sum() + pair.B.square().sum()).square()
    loss.backward(retain_graph=True)
    # Without a gradient, nothing is written.
    of_other = other.A.square().sum()
    for _ in range(2):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    of_other.backward()


def test_hooks_of_state_dicts(backend):
    optimizer = StableLoRAAdamW(make_pairs())
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: seen.append(f"load {state['extra']}")
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    take_step(0, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "load 1", "loaded"]


def test_a_compiled_step_runs_as_it_is(backend):
    """torch.compile leaves the step out of its graph: it is one launch already."""
    optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2)
    other = StableLoRAAdamW(make_pairs(), lr=1e-2)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(2):
        set_grads(params_of(optimizer), step)
        compiled()
        take_step(step, other)
    assert all_equal(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_count_of_steps_that_were_not_taken(backend, copied):
    """And which of them were told of."""
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=1.0)
    take_step(0, optimizer)
    take_step(1, optimizer, scale=math.inf)
    other = copied(optimizer)
    with pytest.warns(
        RuntimeWarning, match="1 step was skipped because the norm of its gradients was not finite"
    ):
        other.stability()
    take_step(2, other, scale=math.nan)
    assert (optimizer.nonfinite_steps, other.nonfinite_steps, other.max_grad_norm) == (1, 2, 1.0)
    with pytest.warns(RuntimeWarning, match="1 step was skipped"):
        copied(other).stability()
