"""Forms of the product and the plans of its kernels."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES, Call

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_forms(device):
    few, many = (Call("forward", m, 4096, 4096, 16, BF16, FP32, False) for m in (64, 4096))
    for described in (False, True):
        assert rules.choose_form(device, few, described) == "split_k"
    assert rules.choose_form(device, many, described=False) == "pointers"
    assert rules.choose_form(device, many, described=True) == ("tma" if device.tma else "pointers")
    assert rules.choose_form(device, many._replace(dtype=FP32), described=True) == "pointers"


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_65_to_400_rows_fill_the_gpu(arch, direction):
    """At 4096 x 4096: programs share sums, or tiles of 128 x 128 fill as much as any tiles that read no more."""
    device = DEVICES[arch]
    for m in range(65, 401):
        call = Call(direction, m, 4096, 4096, 16, BF16, FP32, False)
        if rules.choose_form(device, call, described=True) == "split_k":
            plan = tiles.linear_split_k_plan(device, call, load_s=True)
            assert plan.splits > 1 and tiles.filled(device, plan.tiles * plan.splits) >= 0.7
        elif device.tma:
            assert tiles.linear_tma_plan(device, call, True).programs >= 0.7 * device.processors
        else:
            assert tiles.filled(device, tiles.linear_plan(device, call, True).tiles) >= 0.7
    if arch == "sm_90":
        # As many programs as powers of two allow.
        for m in (65, 128, 129, 256):
            plan = tiles.linear_split_k_plan(device, call._replace(m=m), load_s=True)
            assert plan.tiles * plan.splits == 128


def test_programs_for_a_tile_are_the_fewest_that_keep_the_gpu_busy():
    device = DEVICES["sm_90"]
    assert [tiles.fill_split_k(device, count, 64) for count in (16, 32, 64, 96, 128, 132)] == [6, 3, 2, 1, 1, 1]
    # A part has at least 4 steps, and none is empty.
    assert tiles.fill_split_k(device, 8, 8) == 2 and tiles.fill_split_k(device, 8, 3) == 1
    assert tiles.fill_split_k(device, tiles.MAX_SHARED_SUMS + 1, 64) == 1


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


@pytest.mark.parametrize("stage", [60_000, 70_000, 110_000])
def test_stages_of_any_size_fit_on_every_gpu(stage):
    for device in DEVICES.values():
        stages = tiles.fit(tiles.Tile(128, 256, 64, 8, 4), device, stage).num_stages
        assert stages == 2 or (stages - (0 if device.tma else 1)) * stage <= device.shared_limit
