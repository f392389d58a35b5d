"""States of other optimizers and versions, and states that do not fit. Resuming and AdamW's states are in test_contract."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import SHAPES, all_equal, halves, make_pairs, snapshot
from tests.helpers.small_models import Model, lora_config
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def state(changed: Any = None, pairs: Any = None, **options: Any) -> dict[str, Any]:
    """The state of an optimizer after a step, with a change."""
    optimizer = StableLoRAAdamW(make_pairs() if pairs is None else pairs, **options)
    take_step(0, optimizer)
    found = optimizer.state_dict()
    if changed is not None:
        changed(found)
    return found


def torchs(kind: str, *groups: slice, **options: Any) -> dict[str, Any]:
    params = halves(make_pairs())
    return getattr(torch.optim, kind)(
        [{"params": params[part]} for part in groups or (slice(8),)], **options
    ).state_dict()


RENAMED = [LoRAPair(f"other{i}", pair.A, pair.B) for i, pair in enumerate(make_pairs())]
WIDER = make_pairs([(8, 24, 41), *SHAPES[1:]])
# By name a state, and the message.
UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "SGD": (lambda: torchs("SGD"), "not StableLoRAAdamW's: its group 0 has no 'betas'"),
    "Adam": (lambda: torchs("Adam", weight_decay=0.1), "the weight decay of its group 0, 0.1, is not decoupled"),
    "AdamW of two groups": (
        lambda: torchs("AdamW", slice(4), slice(4, 8)),
        "torch.optim.AdamW's with 2 parameter groups, this optimizer has 1. Hugging Face's Trainer makes two",
    ),
    "AdamW of half": (lambda: torchs("AdamW", slice(4)), "has 4 parameters, the optimizer's 8"),
    "other names": (lambda: state(pairs=RENAMED), "has 'other0.lora_A' where the optimizer has 'layer0.lora_A'"),
    "wider": (lambda: state(pairs=WIDER), "'exp_avg' of 'layer0.lora_A' must be [8, 40], got [8, 41]"),
    "no latch": (
        lambda: state(lambda s: s["state"][0].pop("latched_at")),
        "has no 'latched_at' tensor for 'layer0.lora_A'",
    ),
    "no scales": (
        lambda: state(lambda s: s["state"][0].pop("exp_avg_scale"), moments_dtype=torch.uint8),
        "'exp_avg' is in 8 bits, so 'exp_avg_scale' must be [2]",
    ),
    "a lr that is NaN": (
        lambda: state(lambda s: s["param_groups"][0].update(lr=math.nan)),
        "state_dict's group 0: lr must be a finite number in [0, inf), got nan",
    ),
    "nothing": (dict, "must be a dict with 'state' and 'param_groups'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_state_that_does_not_fit_changes_nothing(name):
    make, message = UNFIT[name]
    optimizer = StableLoRAAdamW(make_pairs())
    take_step(1, optimizer)
    before, groups, given = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"]), make()
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(given)
    assert all_equal(snapshot(optimizer), before) and optimizer.state_dict()["param_groups"] == groups


def test_adam_without_decay_is_adamw():
    optimizer = StableLoRAAdamW(make_pairs())
    optimizer.load_state_dict(torchs("Adam", weight_decay=0.0))
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_wrappers_around_a_model_do_not_matter():
    """A state saved with one wrapper around the model loads with another, and without; pairs have one name in all."""
    model = Model()
    apply_lora(model, lora_config())
    plain = StableLoRAAdamW.from_model(model, lr=0.25)
    take_step(0, plain)
    wrapped = torch.nn.DataParallel(torch.compile(model, backend="eager"))
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert "module._orig_mod.layers.0._orig_mod.q_proj.lora_A" in dict(wrapped.named_parameters())
    by_model, by_name = StableLoRAAdamW.from_model(wrapped), StableLoRAAdamW(wrapped.named_parameters())
    assert [pair.name for pair in by_model.pairs] == [pair.name for pair in plain.pairs]
    for given, optimizer in ((plain, by_model), (plain, by_name), (by_name, plain)):
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.load_state_dict(given.state_dict())
        assert all_equal(snapshot(optimizer), snapshot(plain)) and optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_from_before_these_options_keeps_the_optimizers_own():
    options = {"lr_ratio_B": 2.0, "shrink_pattern": {"layer0": 0.1}, "stop_condition": "never", "max_grad_norm": 1.0}
    old = state()
    for key in ("amsgrad", *options):
        del old["param_groups"][0][key]
    optimizer = StableLoRAAdamW(make_pairs(), **options)
    optimizer.load_state_dict(old)
    assert options.items() <= optimizer.param_groups[0].items() and optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("saved", [None, 2.0])
def test_a_clip_that_a_state_replaces_is_told(saved):
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=1.0)
    with pytest.warns(UserWarning, match=f"max_grad_norm was 1.0 and is {saved} now"):
        optimizer.load_state_dict(state(max_grad_norm=saved))
    assert optimizer.max_grad_norm == saved
    # A new group takes the norm that all groups have now.
    optimizer.add_param_group({"params": [("head", torch.ones(1, requires_grad=True))]})
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [saved, saved]
    optimizer.max_grad_norm = 0.5
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [0.5, 0.5]
