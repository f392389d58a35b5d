"""What PyTorch promises of its optimizers, kept by StableLoRAAdamW: GradScaler, schedulers, hooks, groups, casts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import DEVICE, all_equal, halves, in_float64, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import assert_all_close, assert_close_to, decide_on_device, latches, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


# Automatic mixed precision


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_found_inf_changes_nothing(path: str, found_inf: float) -> None:
    """GradScaler adds up the verdicts of several devices, so it may be more than 1."""
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.1)
    for step in range(2):
        take_step(step, optimizer)
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
    pairs[0].A.grad[0, 0] = math.inf
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)
    # The step after it is the one that would have come, from the same sums of squares.
    optimizer.found_inf.zero_()
    twins = copy.deepcopy(optimizer)
    take_step(7, optimizer, scale=4e-2)
    take_step(7, twins)
    # The scale is a power of two.
    assert all_equal(snapshot(optimizer), snapshot(twins))


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


def test_gradients_of_a_step_that_failed_are_looked_at_again(backend: str) -> None:
    """The engines' tables still hold those of the step before."""
    ratios = {1: 0.1, 2: 2.0, 3: 0.1}
    optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_schedule=lambda step: ratios[step])
    steady = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_ratio=0.1)
    params = [params_of(each) for each in (optimizer, steady)]
    kept = []
    for seed in (0, 1):
        for each in params:
            set_grads(each, seed)
            kept += [p.grad for p in each]
        steady.step()
        if seed == 0:
            optimizer.step()
    with pytest.raises(ValueError, match=r"shrink_schedule\(2\) must be"):
        optimizer.step()
    ratios[2] = 0.1
    optimizer.step()
    assert all_equal(snapshot(optimizer), snapshot(steady)) and kept


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


def test_float64_parameters_take_float64_steps() -> None:
    pairs = make_pairs(dtype=torch.float64)
    oracle = StableAdamWRef(in_float64(pairs), lr=1e-2)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    for step in range(5):
        take_step_with(oracle, optimizer, step)
    assert_close_to(oracle, optimizer, rtol=1e-12, atol=1e-14)
    with use_backend("triton"), pytest.raises(TypeError, match="no float64 optimizer step"):
        optimizer.step()


@pytest.mark.covering
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyper_parameters_as_tensors_change_in_place(
    backend: str, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pairs, twins = make_pairs(), make_pairs()
    value = torch.full(shape, 0.1, dtype=dtype, device=DEVICE)
    optimizer = StableLoRAAdamW(pairs, shrink_ratio=0.01, **{"lr": 1e-2, name: value})
    other = StableLoRAAdamW(twins, shrink_ratio=0.01, **{"lr": 1e-2, name: 0.1})
    for step in range(4):
        take_step(step, optimizer, other)
        value.mul_(0.5)
        other.param_groups[0][name] *= 0.5
    assert_all_close(halves(pairs), halves(twins), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_a_weight_decay_that_stays_on_the_device(monkeypatch: pytest.MonkeyPatch, found_inf: float | None) -> None:
    """What the PyTorch path does on a GPU, which its fused operator does not."""
    decide_on_device(monkeypatch)
    pairs, twins = make_pairs(), make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, weight_decay=torch.tensor(0.25, device=DEVICE))
    other = StableLoRAAdamW(twins, lr=1e-2, weight_decay=0.25)
    before = [p.detach().clone() for p in halves(pairs)]
    with use_backend("torch"):
        for each in (optimizer, other):
            if found_inf is not None:
                each.grad_scale = torch.tensor(1.0, device=DEVICE)
                each.found_inf = torch.tensor(found_inf, device=DEVICE)
            take_step(0, each)
    assert_all_close(halves(pairs), halves(twins), rtol=1e-6, atol=1e-8)
    assert all_equal(before, [p.detach() for p in halves(pairs)]) == bool(found_inf)


def test_amsgrad_switched_on_later_and_in_one_group(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    groups = [{"params": [first], "amsgrad": True}, {"params": [second]}]
    optimizer = StableLoRAAdamW(groups, lr=1e-2)
    take_step(0, optimizer)
    assert "max_exp_avg_sq" in optimizer.state[first.A] and "max_exp_avg_sq" not in optimizer.state[second.A]
    optimizer.param_groups[1]["amsgrad"] = True
    take_step(1, optimizer, scale=1e-5)
    state = optimizer.state[first.A]
    assert (state["max_exp_avg_sq"] > state["exp_avg_sq"]).all()
    # It had no maximum before: the one of the step itself.
    assert torch.equal(optimizer.state[second.A]["max_exp_avg_sq"], optimizer.state[second.A]["exp_avg_sq"])


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
    pairs, twins = make_pairs(), make_pairs()
    optimizers = [StableLoRAAdamW(p, lr=1e-2, seed=1) for p in (pairs, twins)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=12) for o in optimizers]
    seen = set()
    for step in range(8):
        take_step(step, *optimizers)
        for scheduler in schedulers:
            scheduler.step()
        seen.add(optimizers[0].param_groups[0]["betas"])
        if step == 3:
            saved = copy.deepcopy((optimizers[1].state_dict(), schedulers[1].state_dict()))
            optimizers[1] = StableLoRAAdamW(twins, lr=1.0)
            schedulers[1] = torch.optim.lr_scheduler.OneCycleLR(optimizers[1], max_lr=1.0, total_steps=12)
            optimizers[1].load_state_dict(saved[0])
            schedulers[1].load_state_dict(saved[1])
    assert len(seen) == 8
    assert all_equal(snapshot(optimizers[0]), snapshot(optimizers[1]))


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


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_state_of_another_device_loads() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    moved = [LoRAPair(p.name, *(t.detach().cpu().requires_grad_() for t in (p.A, p.B))) for p in pairs]
    other = StableLoRAAdamW(moved)
    other.load_state_dict(optimizer.state_dict())
    take_step(1, other)
    assert other.state[moved[0].A]["step"].item() == 2


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
