"""StableLoRAAdamW's own options against the float64 reference: LoRA+, patterns, a schedule, no stop condition."""

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
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import DEVICE, all_equal, halves, in_float64, make_pairs, set_grads, snapshot
from tests.helpers.steps import assert_all_close, assert_close_to, saved_and_loaded, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


def schedule(step: int) -> float:
    return 0.05 / step if step < 6 else 0.0


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora-plus": ({"lr_ratio_B": 16.0}, {"lr_ratio_B": 16.0}),
    "lora-plus-below-one": ({"lr_ratio_B": 0.25}, {"lr_ratio_B": 0.25}),
    "lora-plus-tensor-lr": ({"lr_ratio_B": 4.0, "lr": torch.tensor(2e-3)}, {"lr_ratio_B": 4.0, "lr": 2e-3}),
    "pattern": (
        {"shrink_pattern": {"layer[02]": 0.03, "layer0": 0.9, "layer1": 0.0}},
        {"shrink_ratios": {"layer0": 0.03, "layer2": 0.03, "layer1": 0.0}},
    ),
    "schedule": ({"shrink_schedule": schedule}, {"shrink_ratio": schedule}),
    "schedule-and-pattern": (
        {"shrink_schedule": schedule, "shrink_pattern": {"layer3": 0.02}},
        {"shrink_ratio": schedule, "shrink_ratios": {"layer3": 0.02}},
    ),
    "never": ({"stop_condition": "never"}, {"stop_condition": "never"}),
    "ratio-as-a-tensor": ({"shrink_ratio": torch.tensor(0.02)}, {"shrink_ratio": 0.02}),
    "all": (
        {"lr_ratio_B": 8.0, "shrink_pattern": {"layer1": 0.1}, "stop_condition": "never", "amsgrad": True},
        {"lr_ratio_B": 8.0, "shrink_ratios": {"layer1": 0.1}, "stop_condition": "never", "amsgrad": True},
    ),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_the_references(path: str, name: str) -> None:
    given, meant = OPTIONS[name]
    common = {"lr": 2e-2, "shrink_ratio": 0.01, "weight_decay": 0.1}
    pairs = make_pairs()
    oracle = StableAdamWRef(in_float64(pairs), **{**common, **meant})
    optimizer = StableLoRAAdamW(pairs, **{**common, **copy.deepcopy(given)})
    for step in range(14):
        take_step_with(oracle, optimizer, step)
    assert_close_to(oracle, optimizer, rtol=4e-5, atol=4e-6)


def test_never_stopping_spares_a_norm_that_is_not_finite(path: str) -> None:
    good, bad = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([good, bad], lr=0.0, shrink_ratio=0.5, weight_decay=0.0, stop_condition="never")
    with torch.no_grad():
        good.B.fill_(100.0)
        bad.B[0, 0] = math.inf
    before = [pair.A.detach().clone() for pair in (good, bad)]
    take_step(0, optimizer)
    torch.testing.assert_close(good.A.detach(), before[0] / 2, rtol=1e-6, atol=0)
    assert torch.equal(bad.A, before[1])
    assert optimizer.state[good.A]["latched_at"].item() == 0


def test_the_stop_condition_may_change_and_a_latch_stays(path: str) -> None:
    latched, live = make_pairs([(4, 8, 8), (4, 8, 8)])
    with torch.no_grad():
        latched.B.fill_(100.0)
    optimizer = StableLoRAAdamW([latched, live], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    take_step(0, optimizer)
    optimizer.param_groups[0]["stop_condition"] = "never"
    with torch.no_grad():
        live.B.fill_(100.0)
    before = [pair.A.detach().clone() for pair in (latched, live)]
    optimizer.step()
    assert torch.equal(latched.A, before[0])
    torch.testing.assert_close(live.A.detach(), before[1] / 2, rtol=1e-6, atol=0)


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


def test_the_schedule_counts_steps_and_resumes(path: str) -> None:
    seen: list[int] = []

    def noted(step: int) -> float:
        seen.append(step)
        return schedule(step)

    whole, cut = make_pairs(), make_pairs()
    straight = StableLoRAAdamW(whole, lr=1e-2, shrink_schedule=schedule, seed=1)
    optimizer = StableLoRAAdamW(cut, lr=1e-2, shrink_schedule=noted, seed=1)
    # No gradient: no step.
    optimizer.step()
    for step in range(8):
        take_step(step, straight, optimizer)
        if step == 2:
            state = saved_and_loaded(optimizer.state_dict())
            optimizer = StableLoRAAdamW(cut, lr=0.5, shrink_schedule=noted)
            optimizer.load_state_dict(state)
    assert seen == list(range(1, 9))
    assert optimizer.param_groups[0]["shrink_ratio"] == schedule(8)
    assert all_equal(snapshot(straight), snapshot(optimizer))
    copied = pickle.loads(pickle.dumps(straight))
    assert copied.shrink_schedule is schedule and copied.param_groups[0]["shrink_step"] == 8


def test_options_are_in_the_state(path: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    options = {"lr_ratio_B": 4.0, "shrink_pattern": {"layer0": 0.1}, "stop_condition": "never"}
    optimizer = StableLoRAAdamW(pairs, seed=1, **options)
    resumed = StableLoRAAdamW(twins, seed=2)
    resumed.load_state_dict(optimizer.state_dict())
    assert {key: resumed.param_groups[0][key] for key in options} == options
    take_step(0, optimizer, resumed)
    assert all_equal(snapshot(optimizer), snapshot(resumed))
    # A state from before these options keeps the optimizer's own.
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("amsgrad", *options):
        del old["param_groups"][0][key]
    plain = StableLoRAAdamW(make_pairs(), lr_ratio_B=2.0)
    plain.load_state_dict(old)
    assert plain.param_groups[0]["lr_ratio_B"] == 2.0 and plain.param_groups[0]["shrink_pattern"] == {}


def test_a_ratio_as_a_tensor_changes_in_place(path: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    ratio = torch.tensor(0.5, device=DEVICE)
    optimizer = StableLoRAAdamW([pair], lr=0.0, weight_decay=0.0, shrink_ratio=ratio)
    start = pair.A.detach().clone()
    take_step(0, optimizer)
    ratio.fill_(0.25)
    optimizer.step()
    torch.testing.assert_close(pair.A.detach(), start * 0.375, rtol=1e-6, atol=0)


def test_a_schedule_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, shrink_schedule=schedule)
    set_grads(halves(pairs), 0)
    monkeypatch.setattr(graph_capture, "capturing", lambda: True)
    before = [p.detach().clone() for p in halves(pairs)]
    with pytest.raises(RuntimeError, match="a CUDA graph would not call again: give shrink_ratio as a tensor"):
        optimizer.step()
    assert all_equal(before, [p.detach() for p in halves(pairs)])


def test_a_schedule_out_of_range_changes_nothing(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, shrink_schedule=lambda step: 0.1 if step == 1 else 1.5)
    take_step(0, optimizer)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=re.escape("shrink_schedule(2) must be a finite number in [0, 1), got 1.5")):
        optimizer.step()
    assert all_equal(before, snapshot(optimizer))
    assert optimizer.param_groups[0]["shrink_ratio"] == 0.1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lr_ratio_B": 0.0}, ValueError, "lr_ratio_B must be a finite number in (0, inf), got 0.0"),
        ({"lr_ratio_B": "16"}, TypeError, "lr_ratio_B must be a number, got '16' of type str"),
        ({"stop_condition": "norms"}, ValueError, "stop_condition must be one of 'norm', 'never', got 'norms'"),
        ({"stop_condition": []}, ValueError, "stop_condition must be one of 'norm', 'never', got []"),
        ({"shrink_pattern": {"layer9": 0.1}}, ValueError, "shrink_pattern 'layer9' matches none of the 4 pairs ('layer0', "),
        ({"shrink_pattern": {"layer0": 1.0}}, ValueError, "shrink_pattern['layer0'] must be a finite number in [0, 1), got 1.0"),
        ({"shrink_pattern": {"(": 0.1}}, ValueError, "shrink_pattern must be a regular expression, got '('"),
        ({"shrink_pattern": [("layer0", 0.1)]}, TypeError, "shrink_pattern must be a dict of name patterns, got [("),
        ({"shrink_pattern": {0: 0.1}}, TypeError, "shrink_pattern must be a dict of name patterns, got {0"),
        ({"shrink_schedule": 0.1}, TypeError, "shrink_schedule must be a function of the step, got 0.1"),
        ({"shrink_ratio": torch.tensor(1.0)}, ValueError, "shrink_ratio must be a finite number in [0, 1), got 1.0"),
        ({"amsgrad": 1}, TypeError, "amsgrad must be a bool, got 1 of type int"),
        ({"weight_decay": torch.zeros(2)}, ValueError, "weight_decay as a tensor must be a 0-d floating-point one, got [2]"),
        ({"betas": (0.9, torch.zeros(2))}, ValueError, "betas[1] as a tensor must be a 0-d floating-point one on the CPU"),
    ],
)  # fmt: skip
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StableLoRAAdamW(make_pairs(), **change)


def test_a_group_whose_pattern_matches_nothing_is_refused() -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first], shrink_pattern={"layer0": 0.1})
    with pytest.raises(ValueError, match="shrink_pattern 'layer7' matches none of the 2 pairs"):
        optimizer.add_param_group({"params": [second], "shrink_pattern": {"layer7": 0.1}})
    assert len(optimizer.param_groups) == 1
    # The first group's pattern need not match in the second.
    optimizer.add_param_group({"params": [LoRAPair("other", second.A, second.B)]})
    assert len(optimizer.param_groups) == 2


def test_amsgrads_maximum_keeps_a_nan(path: str) -> None:
    pairs = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, amsgrad=True)
    take_step(0, optimizer)
    set_grads(halves(pairs), 1)
    pairs[0].A.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.state[pairs[0].A]["max_exp_avg_sq"][0, 0].isnan()
