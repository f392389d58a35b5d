"""Forms of the product and the plans of its kernels."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_forms(device):
    few, many = (Call("forward", m, 4096, 4096, 16, BF16, FP32, False) for m in (64, 65))
    for described in (False, True):
        assert rules.choose_form(device, few, described) == "split_k"
    assert rules.choose_form(device, many, described=False) == "pointers"
    assert rules.choose_form(device, many, described=True) == ("tma" if device.tma else "pointers")
    for change in ({"dtype": FP32}, {"k": 0}):
        assert rules.choose_form(device, many._replace(**change), described=True) == "pointers"
    assert all(len(rule.reason) > 20 for rule in rules.FORM_RULES)


@pytest.mark.parametrize("n", [4096, 131_072, 262_144])
@pytest.mark.parametrize("r", [16, 128, 512])
@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_programs_share_no_more_sums_than_there_are_counters(device, r, n):
    """The widest layers are vocabularies, whose dB has thousands of tiles."""
    call = Call("backward", 16_384, 4096, n, r, BF16, FP32, True)
    plans = [tiles.co_scheduled_grad_plan(device, call, of_b, warps) for of_b in (False, True) for warps in (4, 8)]
    plans += [tiles.shrink_plan(device, call), tiles.weight_grads_plan(device, call, True, True)[0]]
    assert all(plan.splits == 1 or plan.tiles <= tiles.MAX_SHARED_SUMS for plan in plans)
    assert n > 4096 or plans[2].splits > 1
