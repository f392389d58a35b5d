"""LoRA+, patterns, a shrink schedule, groups and hyperparameters as tensors: whom an option reaches, and when it changes."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch

from stablelora_kernels.optim import graph_capture
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import DEVICE, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import assert_all_close, saved_and_loaded, take_step
from tests.optim.options import schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lora_plus_is_for_b_alone_and_for_one_group(path: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    lone = torch.zeros(5, device=DEVICE, requires_grad=True)
    groups = [{"params": [("a.lora_A", first.A), ("a.lora_B", first.B), ("lone", lone)], "lr_ratio_B": 8.0}]
    groups.append({"params": [("b.lora_A", second.A), ("b.lora_B", second.B)]})
    optimizer = StableLoRAAdamW(groups, lr=1e-3, eps=0.0, weight_decay=0.0, shrink_ratio=0.0)
    before = [p.detach().clone() for p in (*halves([first, second]), lone)]
    take_step(0, optimizer)
    # Adam's first step moves every element by lr.
    moved = [(p.detach() - start).abs() for p, start in zip((*halves([first, second]), lone), before, strict=True)]
    expected = [torch.full_like(p, lr) for p, lr in zip(before, (1e-3, 8e-3, 1e-3, 1e-3, 1e-3), strict=True)]
    assert_all_close(moved, expected, rtol=1e-3, atol=0)
    # A scheduler's lr is followed.
    optimizer.param_groups[0]["lr"] = 0.0
    held = first.B.detach().clone()
    optimizer.step()
    assert torch.equal(first.B, held)


def test_every_group_has_its_own_hyperparameters(path: str) -> None:
    """As a trainer may put them: every A in one group, every B in another."""
    pairs = make_pairs([(4, 8, 8), (4, 8, 8)])
    groups = [
        {"params": [("x.lora_A", pairs[0].A), ("y.lora_A", pairs[1].A)], "shrink_ratio": 0.25, "weight_decay": 0.0},
        {"params": [("x.lora_B", pairs[0].B), ("y.lora_B", pairs[1].B)], "lr": 1e-2},
    ]
    optimizer = StableLoRAAdamW(groups, lr=0.0)
    before = pairs[0].A.detach().clone()
    take_step(0, optimizer)
    torch.testing.assert_close(pairs[0].A.detach(), before * 0.75, rtol=1e-6, atol=0)
    torch.testing.assert_close(pairs[1].B.detach(), -1e-2 * pairs[1].B.grad.sign(), rtol=1e-4, atol=0)
    assert [pair.name for pair in optimizer.pairs] == ["x", "y"]


def test_patterns_match_layers_of_peft_and_whole_names(path: str) -> None:
    pairs = make_pairs([(2, 4, 4)] * 4)
    names = ["m.0.q_proj", "m.0.k_proj", "m.1.q_proj", "m.1.k_proj"]
    named = [
        (f"{name}.lora_{role}.default.weight", p)
        for name, pair in zip(names, pairs, strict=True)
        for role, p in (("A", pair.A), ("B", pair.B))
    ]
    patterns = {"m.1.q_proj.default": 0.75, "q_proj": 0.5, "^m.1.k_proj": 0.25}
    optimizer = StableLoRAAdamW(named, lr=0.0, shrink_ratio=0.125, weight_decay=0.0, shrink_pattern=patterns)
    before = [pair.A.detach().clone() for pair in pairs]
    take_step(0, optimizer)
    for pair, start, kept in zip(pairs, before, (0.5, 0.875, 0.25, 0.75), strict=True):
        torch.testing.assert_close(pair.A.detach(), start * kept, rtol=1e-6, atol=0)


def test_a_group_whose_pattern_matches_nothing_is_refused() -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first], shrink_pattern={"layer0": 0.1})
    with pytest.raises(ValueError, match="shrink_pattern 'layer7' matches none of the 2 pairs"):
        optimizer.add_param_group({"params": [second], "shrink_pattern": {"layer7": 0.1}})
    assert len(optimizer.param_groups) == 1
    # The first group's pattern need not match in the second.
    optimizer.add_param_group({"params": [LoRAPair("other", second.A, second.B)]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.covering
@pytest.mark.parametrize("name", ["lr", "weight_decay", "shrink_ratio"])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_change_in_place(path: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.full(shape, 0.1, dtype=dtype, device=DEVICE)
    options = {"lr": 1e-2, "shrink_ratio": 0.01}
    optimizer, other = (StableLoRAAdamW(make_pairs(), **{**options, name: given}) for given in (value, 0.1))
    for step in range(4):
        take_step(step, optimizer, other)
        value.mul_(0.5)
        other.param_groups[0][name] *= 0.5
    assert_all_close(halves(optimizer.pairs), halves(other.pairs), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("betas", [(0.75, torch.tensor(0.96875)), (torch.tensor(0.75), 0.96875)])
def test_betas_may_become_a_float_and_a_tensor(path: str, betas: tuple[Any, Any]) -> None:
    optimizer, other = (StableLoRAAdamW(make_pairs(), lr=1e-2) for _ in range(2))
    optimizer.param_groups[0]["betas"], other.param_groups[0]["betas"] = betas, (0.75, 0.96875)
    for step in range(2):
        take_step(step, optimizer, other)
    assert_all_close(halves(optimizer.pairs), halves(other.pairs), rtol=1e-6, atol=1e-8)


def test_amsgrads_maximum_keeps_a_nan_and_may_begin_later(path: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([{"params": [first], "amsgrad": True}, {"params": [second]}], lr=1e-2)
    take_step(0, optimizer)
    assert "max_exp_avg_sq" in optimizer.state[first.A] and "max_exp_avg_sq" not in optimizer.state[second.A]
    optimizer.param_groups[1]["amsgrad"] = True
    set_grads(halves([first, second]), 1, scale=1e-5)
    first.A.grad[0, 0] = math.nan
    optimizer.step()
    state = optimizer.state[first.A]
    assert state["max_exp_avg_sq"][0, 0].isnan() and (state["max_exp_avg_sq"] > state["exp_avg_sq"])[1:].all()
    # It had no maximum before: the one of the step itself.
    assert torch.equal(optimizer.state[second.A]["max_exp_avg_sq"], optimizer.state[second.A]["exp_avg_sq"])


def test_a_state_from_before_these_options_keeps_the_optimizers_own() -> None:
    old = StableLoRAAdamW(make_pairs()).state_dict()
    for key in ("amsgrad", "lr_ratio_B", "shrink_pattern", "stop_condition", "max_grad_norm"):
        del old["param_groups"][0][key]
    options = {"lr_ratio_B": 2.0, "shrink_pattern": {"layer0": 0.1}, "stop_condition": "never", "max_grad_norm": 1.0}
    optimizer = StableLoRAAdamW(make_pairs(), **options)
    optimizer.load_state_dict(old)
    assert options.items() <= optimizer.param_groups[0].items() and optimizer.max_grad_norm == 1.0


# The schedule


def test_the_schedule_counts_steps_and_resumes(path: str) -> None:
    seen: list[int] = []

    def noted(step: int) -> float:
        seen.append(step)
        return schedule(step)

    optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_schedule=noted, seed=1)
    # No gradient: no step.
    optimizer.step()
    for step in range(4):
        take_step(step, optimizer)
        if step == 2:
            state = saved_and_loaded(optimizer.state_dict())
            optimizer = StableLoRAAdamW(optimizer.pairs, lr=0.5, shrink_schedule=noted)
            optimizer.load_state_dict(state)
    assert seen == [1, 2, 3, 4] and optimizer.param_groups[0]["shrink_ratio"] == schedule(4)


def test_a_schedule_is_copied_and_pickled_if_it_can_be() -> None:
    named, other = schedule, lambda step: 0.1 / step
    for each in (named, other):
        assert copy.deepcopy(StableLoRAAdamW(make_pairs(), shrink_schedule=each)).shrink_schedule is each
    assert pickle.loads(pickle.dumps(StableLoRAAdamW(make_pairs(), shrink_schedule=named))).shrink_schedule is named
    with pytest.raises(pickle.PicklingError, match=r"shrink_schedule <function .* cannot be pickled: make it a"):
        pickle.dumps(StableLoRAAdamW(make_pairs(), shrink_schedule=other))


class _Trainer:
    """Holds an optimizer whose schedule is its own method, so that pickling either leads to the other."""

    def __init__(self) -> None:
        self.optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_schedule=self.ratio)

    def ratio(self, step: int) -> float:
        return 0.1 / step


def test_a_schedule_that_leads_back_to_the_optimizer_is_pickled() -> None:
    again = pickle.loads(pickle.dumps(_Trainer()))
    assert again.optimizer.shrink_schedule.__self__ is again
    take_step(0, again.optimizer)
    assert again.optimizer.param_groups[0]["shrink_ratio"] == 0.1


def test_a_schedule_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, shrink_schedule=schedule)
    set_grads(halves(pairs), 0)
    monkeypatch.setattr(graph_capture, "capturing", lambda: True)
    before = [p.detach().clone() for p in halves(pairs)]
    with pytest.raises(RuntimeError, match="a CUDA graph would not call again: give shrink_ratio as a tensor"):
        optimizer.step()
    assert all_equal(before, [p.detach() for p in halves(pairs)])


def test_a_schedule_out_of_range_changes_nothing_and_the_next_step_is_whole(backend: str) -> None:
    """The engines' tables still hold the gradients of the step before."""
    ratios = {1: 0.1, 2: 1.5, 3: 0.1}
    optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_schedule=lambda step: ratios[step])
    steady = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_ratio=0.1)
    take_step(0, optimizer, steady)
    # They stay where they are, so that those of the next step lie elsewhere.
    kept = [p.grad for p in halves(optimizer.pairs)]
    for each in (optimizer, steady):
        set_grads(halves(each.pairs), 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape("shrink_schedule(2) must be a finite number in [0, 1), got 1.5")):
        optimizer.step()
    assert all_equal(before, snapshot(optimizer)) and optimizer.param_groups[0]["shrink_ratio"] == 0.1
    ratios[2] = 0.1
    for each in (optimizer, steady):
        each.step()
    assert all_equal(snapshot(optimizer), snapshot(steady)) and kept
