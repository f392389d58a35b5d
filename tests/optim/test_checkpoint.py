"""States of torch's AdamW and of other optimizers, and states that do not fit. Resuming is in test_contract."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import SHAPES, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import assert_all_close, saved_and_loaded, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_going_on_from_adamw_is_adamw(path: str, dtype: torch.dtype, amsgrad: bool) -> None:
    if dtype is torch.float64 and path == "triton":
        pytest.skip("no float64 step")
    pairs, twins = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
    adamw = torch.optim.AdamW(halves(twins), lr=3e-2, betas=(0.8, 0.9), weight_decay=0.1, amsgrad=amsgrad)
    for step in range(5):
        set_grads(halves(twins), step)
        adamw.step()
    with torch.no_grad():
        for p, q in zip(halves(pairs), halves(twins), strict=True):
            p.copy_(q)
    optimizer = StableLoRAAdamW(pairs, lr=1.0, shrink_ratio=0.0)
    optimizer.load_state_dict(saved_and_loaded(adamw.state_dict()))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (3e-2, (0.8, 0.9), 0.1, amsgrad)
    assert group["shrink_ratio"] == 0.0 and not {"foreach", "fused", "differentiable"} & set(group)
    for step in range(5, 10):
        set_grads(halves(pairs), step)
        set_grads(halves(twins), step)
        optimizer.step()
        adamw.step()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    assert_all_close(halves(pairs), halves(twins), **tolerance)
    assert all(entry["step"].item() == 10 for entry in optimizer.state.values())


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
    broken, nameless = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    del nameless["param_groups"][0]["params"]
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
        (nameless, "group 0 of state_dict must be a dict with 'params', got the keys ['amsgrad'"),
        ({"state": {}, "param_groups": [3]}, "group 0 of state_dict must be a dict with 'params', got 3"),
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


def test_adam_with_coupled_decay_and_other_optimizers_are_refused() -> None:
    twins = make_pairs()
    optimizer = StableLoRAAdamW(make_pairs())
    take_step(0, optimizer)
    before = snapshot(optimizer)
    adam = torch.optim.Adam(halves(twins), weight_decay=0.1)
    if "decoupled_weight_decay" in adam.param_groups[0]:
        with pytest.raises(ValueError, match=re.escape("the weight decay of its group 0, 0.1, is not decoupled")):
            optimizer.load_state_dict(adam.state_dict())
    for other in (torch.optim.SGD(halves(twins)), torch.optim.NAdam(halves(twins)), torch.optim.RAdam(halves(twins))):
        with pytest.raises(ValueError, match="not StableLoRAAdamW's: its group 0 has no"):
            optimizer.load_state_dict(other.state_dict())
    grouped = torch.optim.AdamW([{"params": halves(twins)[:4]}, {"params": halves(twins)[4:]}])
    message = "torch.optim.AdamW's with 2 parameter groups, this optimizer has 1. Hugging Face's Trainer makes two"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(grouped.state_dict())
    half = torch.optim.AdamW(halves(twins)[:4])
    with pytest.raises(ValueError, match="has 4 parameters, the optimizer's 8"):
        optimizer.load_state_dict(half.state_dict())
    assert all_equal(snapshot(optimizer), before)
    undecayed = torch.optim.Adam(halves(twins), weight_decay=0.0)
    set_grads(halves(twins), 0)
    undecayed.step()
    optimizer.load_state_dict(undecayed.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_the_learning_rate_by_position() -> None:
    assert StableLoRAAdamW(make_pairs(), 0.25).param_groups[0]["lr"] == 0.25
