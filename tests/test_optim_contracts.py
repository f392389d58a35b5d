"""What PyTorch promises of its optimizers, kept by StableLoRAAdamW: GradScaler, schedulers, hooks, groups, casts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stablelora_kernels.backend import use_backend
from stablelora_kernels.optim import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference_optim import StableAdamWRef
from tests.optimizers import DEVICE, all_equal, halves, in_float64, make_pairs, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


# Automatic mixed precision


def test_found_inf_changes_nothing(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=0.1)
    for step in range(2):
        set_grads(halves(pairs), step)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    pairs[0].A.grad[0, 0] = math.inf
    optimizer.step()
    assert all_equal(snapshot(optimizer), before)
    # The step after it is the one that would have come, from the same sums of squares.
    optimizer.found_inf.zero_()
    twins = copy.deepcopy(optimizer)
    for o, scale in ((optimizer, 4.0), (twins, 1.0)):
        params = [p for group in o.param_groups for p in group["params"]]
        set_grads(params, 7, scale=1e-2 * scale)
        o.step()
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
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


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
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    model.bfloat16()
    set_grads(list(model.parameters()), 1)
    optimizer.step()
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
    set_grads(halves([first]), 0)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.0, "weight_decay": 0.0, "shrink_ratio": 0.5})
    before = second.A.detach().clone()
    set_grads(halves([first, second]), 1)
    optimizer.step()
    torch.testing.assert_close(second.A.detach(), before / 2, rtol=1e-6, atol=0)
    assert optimizer.state[first.A]["step"].item() == 2
    assert [s.name for s in optimizer.stability()] == ["layer0", "layer1"]
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
    pairs = [
        LoRAPair(p.name, p.A.detach().double().requires_grad_(), p.B.detach().double().requires_grad_())
        for p in make_pairs()
    ]
    oracle = StableAdamWRef(in_float64(pairs), lr=1e-2)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    for step in range(5):
        set_grads(halves(pairs), step)
        oracle.step({q: p.grad for p, q in zip(halves(pairs), halves(oracle.pairs), strict=True)})
        optimizer.step()
    for p, q in zip(halves(pairs), halves(oracle.pairs), strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-14)
    with use_backend("triton"), pytest.raises(TypeError, match="no float64 optimizer step"):
        optimizer.step()
