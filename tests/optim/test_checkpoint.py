"""Saving and resuming StableLoRAAdamW, copying it, and states that do not fit."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import SHAPES, all_equal, halves, make_pairs, snapshot
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import assert_all_close, latches, saved_and_loaded, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(backend: str, dtype: torch.dtype) -> None:
    lr, ratio = 4e-2, 5e-3
    whole, cut = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
    straight = StableLoRAAdamW(whole, lr=lr, shrink_ratio=ratio, seed=5)
    optimizer = StableLoRAAdamW(cut, lr=lr, shrink_ratio=ratio, seed=5)
    for step in range(20):
        take_step(step, straight, optimizer)
    state, values = saved_and_loaded([optimizer.state_dict(), [p.detach() for p in halves(cut)]])
    cut = make_pairs(dtype=dtype, seed=9)
    with torch.no_grad():
        for p, value in zip(halves(cut), values, strict=True):
            p.copy_(value)
    optimizer = StableLoRAAdamW(cut, lr=1.0, shrink_ratio=0.5, seed=6)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["shrink_ratio"] == ratio and optimizer.param_groups[0]["seed"] == 5
    for p in halves(cut):
        assert optimizer.state[p]["exp_avg"].dtype is torch.float32
    for step in range(20, 26):
        take_step(step, straight, optimizer)
    latched = latches(straight).values()
    assert any(latched) and None in latched
    assert all_equal(snapshot(straight), snapshot(optimizer))


def test_the_backend_can_change_between_steps() -> None:
    pairs, twins = make_pairs(), make_pairs()
    switching, steady = StableLoRAAdamW(pairs, lr=2e-2), StableLoRAAdamW(twins, lr=2e-2)
    for step in range(8):
        with use_backend("triton" if step % 4 < 2 else "torch"):
            take_step(step, switching)
        with use_backend("torch"):
            take_step(step, steady)
    assert latches(switching) == latches(steady)
    assert_all_close(halves(pairs), halves(twins), rtol=1e-5, atol=1e-7)
    assert all(state["step"].item() == 8 for state in switching.state.values())


def test_deepcopy_and_pickle_go_on_alike(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, max_grad_norm=1.0)
    take_step(0, optimizer)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for o in [optimizer, *copies]:
        assert o.max_grad_norm == 1.0
        take_step(1, o)
    for other in copies:
        assert other.state.keys().isdisjoint(optimizer.state)
        assert all_equal(snapshot(other), snapshot(optimizer))


def test_state_before_the_first_step_loads() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    optimizer.load_state_dict(StableLoRAAdamW(make_pairs(), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert list(latches(optimizer).values()) == [None] * len(pairs)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    take_step(0, optimizer)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    twins = make_pairs()
    sgd = torch.optim.SGD(halves(twins))
    renamed = StableLoRAAdamW([LoRAPair(f"other{i}", pair.A, pair.B) for i, pair in enumerate(twins)])
    fewer = StableLoRAAdamW(twins[:2])
    wider = StableLoRAAdamW(make_pairs([(8, 24, 41), *SHAPES[1:]]))
    take_step(0, wider)
    incomplete = copy.deepcopy(optimizer.state_dict())
    del incomplete["state"][0]["latched_at"]
    broken = copy.deepcopy(optimizer.state_dict())
    broken["param_groups"][0]["lr"] = math.nan
    for state, message in [
        (
            sgd.state_dict(),
            "not StableLoRAAdamW's: its group 0 has no 'betas', 'eps', 'shrink_ratio', 'capturable', 'seed'",
        ),
        (renamed.state_dict(), "has 'other0.lora_A' where the optimizer has 'layer0.lora_A'"),
        (fewer.state_dict(), "has 4 parameters, the optimizer's 8"),
        (wider.state_dict(), "'exp_avg' of 'layer0.lora_A' must be [8, 40], got [8, 41]"),
        (incomplete, "has no 'latched_at' tensor for 'layer0.lora_A'"),
        (broken, "state_dict's group 0: lr must be a finite number in [0, inf), got nan"),
        ({"state": {}, "param_groups": []}, "has 0 parameter groups, the optimizer 1"),
        ({}, "must be a dict with 'state' and 'param_groups'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.load_state_dict(state)
    assert all_equal(snapshot(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_wrappers_around_a_model_do_not_matter() -> None:
    """A state saved with one wrapper around the model loads with another, and without; pairs have one name in all."""
    model = Model()
    apply_lora(model, lora_config())
    plain = StableLoRAAdamW.from_model(model, lr=0.25)
    take_step(0, plain)
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    named = list(wrapped.named_parameters())
    assert "module._orig_mod.layers.0._orig_mod.q_proj.lora_A" in dict(named)
    by_model, by_name = StableLoRAAdamW.from_model(wrapped), StableLoRAAdamW(named)
    assert [pair.name for pair in by_model.pairs] == [pair.name for pair in plain.pairs]
    for optimizer in (by_model, by_name):
        optimizer.load_state_dict(plain.state_dict())
        assert all_equal(snapshot(optimizer), snapshot(plain))
    plain.param_groups[0]["lr"] = 0.5
    plain.load_state_dict(by_name.state_dict())
    assert plain.param_groups[0]["lr"] == 0.25
