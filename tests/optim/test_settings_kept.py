"""No setting is lost silently: in repr, in copies, in a state dict and by the trainer's factory."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reprs_are_short() -> None:
    """Of the optimizer, a pair and a report, as a notebook shows them; print(report) has all."""
    model = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(40, 24) for i in range(30)})
    report = slk.apply_lora(model, slk.LoRAConfig(target_modules="all-linear"))
    optimizer = StableLoRAAdamW.from_model(model, lr=3e-4, master_weights=True)
    shown = repr(optimizer)
    assert shown.startswith(
        "StableLoRAAdamW (30 LoRA pairs)\nParameter Group 0 (60 parameters): amsgrad: False, betas: "
    )
    assert len(shown.splitlines()) == 2 and len(shown) < 500
    assert repr(optimizer.pairs[0]) == "LoRAPair('layer0', A [8, 40], B [24, 8], torch.float32, cpu)"
    first = "LoRA on 30 modules; 15,360 of 44,880 parameters train (34.22%)"
    assert repr(report) == f"<LoRAReport: {first}>" and str(report).startswith(f"{first}\n  1 x layer0: 40 -> 24")
    assert repr(slk.merge_lora(model)) == "<MergeReport: 30 modules merged>"


@pytest.mark.parametrize("saved", [None, 2.0])
def test_a_clip_that_a_state_replaces_is_told(saved: float | None) -> None:
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=1.0)
    state = StableLoRAAdamW(make_pairs(), max_grad_norm=saved).state_dict()
    with pytest.warns(UserWarning, match=f"max_grad_norm was 1.0 and is {saved} now"):
        optimizer.load_state_dict(state)
    assert optimizer.max_grad_norm == saved
    optimizer.max_grad_norm = 1.0
    assert all(group["max_grad_norm"] == 1.0 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"moments_dtype": torch.uint8}, {}, "saved with moments_dtype=torch.float32; it was converted, since this"),
        ({}, {"moments_dtype": torch.bfloat16}, "optimizer has moments_dtype=torch.float32"),
        ({"master_weights": True}, {}, "saved with master_weights=False"),
    ],
)
def test_a_state_of_another_storage_is_converted_and_told(ours: dict, theirs: dict, message: str) -> None:
    optimizer, other = StableLoRAAdamW(make_pairs(), **ours), StableLoRAAdamW(make_pairs(), **theirs)
    take_step(0, other)
    with pytest.warns(UserWarning, match=re.escape(message)):
        optimizer.load_state_dict(other.state_dict())


def test_the_clip_may_be_changed_between_steps(backend: str) -> None:
    optimizer, other = StableLoRAAdamW(make_pairs(), seed=1), StableLoRAAdamW(make_pairs(), seed=1, max_grad_norm=0.1)
    optimizer.max_grad_norm = 5.0
    take_step(0, optimizer, other)
    assert not all_equal(snapshot(optimizer), snapshot(other))
    fresh = StableLoRAAdamW(make_pairs(), seed=1)
    fresh.max_grad_norm = 5.0
    take_step(0, fresh)
    fresh.max_grad_norm = optimizer.max_grad_norm = None
    take_step(1, fresh, optimizer)
    assert all_equal(snapshot(fresh), snapshot(optimizer))
    with pytest.raises(ValueError, match="max_grad_norm must be a finite number"):
        optimizer.max_grad_norm = -1.0


@pytest.mark.parametrize("how", ["set", "loaded"])
def test_a_new_group_takes_the_norm_that_all_groups_have_now(how: str, backend: str) -> None:
    """It took the one that the optimizer was built with, which raised."""
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first])
    if how == "set":
        optimizer.max_grad_norm = 0.5
    else:
        optimizer.load_state_dict(StableLoRAAdamW([first], max_grad_norm=0.5).state_dict())
    optimizer.add_param_group({"params": [second]})
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [0.5, 0.5]
    take_step(0, optimizer)


def test_values_that_all_groups_share(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    groups = [{"params": [first], "max_grad_norm": 1.0}, {"params": [second]}]
    with pytest.raises(ValueError, match=r"max_grad_norm must be one value for all groups, got 1.0 and None"):
        StableLoRAAdamW(groups)
    with pytest.raises(
        ValueError, match=r"a group's moments_dtype must be the optimizer's, torch.float32, got torch.uint8"
    ):
        StableLoRAAdamW([{"params": [first], "moments_dtype": torch.uint8}])
    optimizer = StableLoRAAdamW([first], max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm must be one value for all groups, got 1.0 and 2.0"):
        optimizer.add_param_group({"params": [second], "max_grad_norm": 2.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})
    take_step(0, optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    with pytest.raises(ValueError, match="one value for all groups"):
        optimizer.step()
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    optimizer.param_groups[0]["moments_dtype"] = torch.bfloat16
    with pytest.raises(ValueError, match="a group's moments_dtype must be the optimizer's"):
        optimizer.step()
    assert all_equal(snapshot(optimizer), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_count_of_steps_that_were_not_taken(path: str, copied) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, max_grad_norm=1.0)
    take_step(0, optimizer)
    set_grads(halves(pairs), 1)
    pairs[0].A.grad[0, 0] = math.inf
    optimizer.step()
    other = copied(optimizer)
    assert (optimizer.nonfinite_steps, other.nonfinite_steps, other.max_grad_norm) == (1, 1, 1.0)
    with pytest.warns(RuntimeWarning, match="1 step was skipped because the norm of its gradients was not finite"):
        other.stability()
    for p in halves(other.pairs):
        p.grad = torch.full_like(p, math.nan)
    other.step()
    assert (optimizer.nonfinite_steps, other.nonfinite_steps) == (1, 2)
    again = copied(other)
    with pytest.warns(RuntimeWarning, match="1 step was skipped"):
        again.stability()


def test_the_factory_tells_which_of_the_trainers_arguments_it_was_not_given() -> None:
    model = Model()
    slk.apply_lora(model, lora_config())
    told = "uses lr=0.0001, betas=(0.9, 0.999), eps=1e-08, the optimizer's defaults"
    with pytest.warns(UserWarning, match=re.escape(told)) as caught:
        optimizer = slk.StableLoRAAdamWFactory()(model, shrink_ratio=0.1, weight_decay=0.3)
    assert caught[0].filename == __file__ and "StableLoRAAdamWFactory.from_args(args" in str(caught[0].message)
    assert optimizer.param_groups[0]["lr"] == 1e-4
    given = {"lr": 3e-4, "weight_decay": 0.0, "betas": (0.9, 0.99), "eps": 1e-7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (group,) = slk.StableLoRAAdamWFactory()(model, **given).param_groups
    assert given.items() <= group.items()
