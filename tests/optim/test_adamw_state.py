"""Training that began with torch.optim.AdamW goes on with StableLoRAAdamW, and what of AdamW's arguments is taken."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import latches, saved_and_loaded, take_step

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
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, **tolerance)
        assert optimizer.state[p]["step"].item() == adamw.state[q]["step"].item() == 10


def test_no_pair_has_latched_in_adamws_state(backend: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    adamw, optimizer = torch.optim.AdamW(halves(twins)), StableLoRAAdamW(pairs, shrink_ratio=0.25)
    set_grads(halves(twins), 0)
    adamw.step()
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["shrink_ratio"] == 0.25
    before = pairs[0].A.detach().clone()
    take_step(1, optimizer)
    assert set(latches(optimizer).values()) == {None}
    assert pairs[0].A.norm() < 0.76 * before.norm()


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


def test_a_state_dict_without_params_is_named() -> None:
    optimizer = StableLoRAAdamW(make_pairs())
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["params"]
    with pytest.raises(
        ValueError, match=r"group 0 of state_dict must be a dict with 'params', got the keys \['amsgrad'"
    ):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="group 0 of state_dict must be a dict with 'params', got 3"):
        optimizer.load_state_dict({"state": {}, "param_groups": [3]})


def test_the_learning_rate_by_position() -> None:
    assert StableLoRAAdamW(make_pairs(), 0.25).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("betas", [(0.9, torch.tensor(0.99)), (torch.tensor(0.9), 0.99)])
@pytest.mark.parametrize("later", [False, True])
def test_a_float_beside_a_tensor_in_betas(path: str, betas: tuple, later: bool) -> None:
    pairs, twins = make_pairs(), make_pairs()
    plain = tuple(float(beta) for beta in betas)
    optimizer = StableLoRAAdamW(pairs, seed=1, **({} if later else {"betas": betas}))
    other = StableLoRAAdamW(twins, betas=plain, seed=1)
    if later:
        optimizer.param_groups[0]["betas"] = betas
    for step in range(3):
        take_step(step, optimizer, other)
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("argument", ["foreach", "fused", "differentiable"])
def test_what_is_refused(argument: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        StableLoRAAdamW(make_pairs(), **{argument: True})
