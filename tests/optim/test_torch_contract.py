"""What PyTorch promises of its optimizers, kept by StableLoRAAdamW: GradScaler, schedulers, hooks, groups, casts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import DEVICE, all_equal, halves, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import assert_all_close, latches, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


# Automatic mixed precision


def test_grad_scaler_hands_over_scale_and_verdict(backend: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=1e-2), StableLoRAAdamW(twins, lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    for poisoned in (False, True, False):
        loss = sum((p * torch.arange(p.numel(), device=DEVICE).view_as(p)).sum() for p in halves(pairs))
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


# PyTorch's contracts


def test_closure_scheduler_hooks_and_zero_grad(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p - 1).square().sum() for p in halves(pairs))
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[2] < losses[1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)
    assert seen == ["before", "after"] * 3
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)


def test_a_module_cast_after_construction(backend: str) -> None:
    model = nn.Module()
    (pair,) = make_pairs([(4, 8, 8)])
    model.lora_A, model.lora_B = nn.Parameter(pair.A.detach()), nn.Parameter(pair.B.detach())
    optimizer = StableLoRAAdamW.from_model(model, lr=1e-2)
    take_step(0, optimizer)
    model.bfloat16()
    take_step(1, optimizer)
    assert model.lora_A.dtype is torch.bfloat16
    assert optimizer.state[model.lora_A]["step"].item() == 2
    assert optimizer.state[model.lora_A]["exp_avg"].dtype is torch.float32


def test_backward_through_overwritten_parameters_is_noticed(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair])
    loss = (pair.A.square().sum() + pair.B.square().sum()).square()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_add_param_group_pairs_anew(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first], lr=1e-2)
    take_step(0, optimizer)
    optimizer.add_param_group({"params": [second], "lr": 0.0, "weight_decay": 0.0, "shrink_ratio": 0.5})
    before = second.A.detach().clone()
    take_step(1, optimizer)
    torch.testing.assert_close(second.A.detach(), before / 2, rtol=1e-6, atol=0)
    assert optimizer.state[first.A]["step"].item() == 2
    assert list(latches(optimizer)) == ["layer0", "layer1"]
    with pytest.raises(ValueError, match=r"pair 'z' has lora_A .* but no lora_B"):
        optimizer.add_param_group({"params": [("z.lora_A", torch.zeros(2, 3, requires_grad=True))]})
    assert len(optimizer.param_groups) == 2


def test_frozen_parameters_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[0].lora_A, model[0].lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.zeros(4, 2))
    # An inactive adapter, as PEFT freezes it.
    model[1].lora_A, model[1].lora_B = (nn.Parameter(torch.ones(s), requires_grad=False) for s in ((2, 4), (4, 2)))
    optimizer = StableLoRAAdamW.from_model(model)
    assert optimizer.param_groups[0]["param_names"] == ["0.lora_A", "0.lora_B"]
    assert [pair.name for pair in optimizer.pairs] == ["0"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(backend: str, set_to_none: bool) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in halves(pairs))
    before = [p.detach().clone() for p in halves(pairs)]
    optimizer.step()
    # Zeros are gradients: the moments still move the parameters.
    assert all_equal(before, [p.detach() for p in halves(pairs)]) == set_to_none
    assert optimizer.state[pairs[0].A]["step"].item() == (1 if set_to_none else 2)


def test_a_schedule_of_betas_and_a_restart(backend: str) -> None:
    """OneCycleLR moves lr and betas; schedulers' own state resumes beside ours."""

    def begin(max_lr: float) -> list[Any]:
        optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, seed=1)
        return [optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=12)]

    steady, cut, seen = begin(2e-2), begin(2e-2), set()
    for step in range(6):
        for optimizer, scheduler in (steady, cut):
            take_step(step, optimizer)
            scheduler.step()
        seen.add(cut[0].param_groups[0]["betas"])
        if step == 2:
            saved, values = copy.deepcopy([each.state_dict() for each in cut]), params_of(cut[0])
            cut = begin(1.0)
            for each, state in zip(cut, saved, strict=True):
                each.load_state_dict(state)
            with torch.no_grad():
                for p, value in zip(params_of(cut[0]), values, strict=True):
                    p.copy_(value)
    assert len(seen) == 6 and all_equal(snapshot(steady[0]), snapshot(cut[0]))


def test_hooks_of_state_dicts(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(f"load {state['extra']}"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    take_step(0, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "load 1", "loaded"]


def test_there_is_no_float64_step_on_triton() -> None:
    optimizer = StableLoRAAdamW(make_pairs(dtype=torch.float64))
    with use_backend("triton"), pytest.raises(TypeError, match="no float64 optimizer step"):
        take_step(0, optimizer)


def test_a_state_of_other_dtypes_loads(backend: str) -> None:
    """A run in float32 goes on in bfloat16, and a checkpoint of half the size in float32."""
    pairs, low = make_pairs(), make_pairs(dtype=torch.bfloat16)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    other = StableLoRAAdamW(low)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(halves(pairs), halves(low), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
    halved = copy.deepcopy(optimizer.state_dict())
    for entry in halved["state"].values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
        entry["step"] = entry["step"].double()
    optimizer.load_state_dict(halved)
    take_step(1, optimizer)
    assert optimizer.state[pairs[0].A]["exp_avg"].dtype is torch.float32
    assert optimizer.state[pairs[0].A]["step"].item() == 2


def test_a_compiled_step_runs_as_it_is(backend: str) -> None:
    """torch.compile leaves the step out of its graph: it is one launch already."""
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=1e-2), StableLoRAAdamW(twins, lr=1e-2)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(2):
        set_grads(halves(pairs), step)
        compiled()
        take_step(step, other)
    assert all_equal(snapshot(optimizer), snapshot(other))
