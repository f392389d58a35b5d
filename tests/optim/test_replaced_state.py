"""``optimizer.state`` replaced in part, noticed at the next step. All of it cleared or replaced: test_contract, the fuzz."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import all_equal, halves, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import latches, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_parameters_state_that_is_gone_starts_afresh(path: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, steady = StableLoRAAdamW(pairs, lr=1e-2), StableLoRAAdamW(twins, lr=1e-2)
    for step in range(3):
        take_step(step, optimizer, steady)
    del optimizer.state[pairs[0].A]
    take_step(3, optimizer, steady)
    assert optimizer.state[pairs[0].A]["step"].item() == 1
    assert all(optimizer.state[p]["step"].item() == 4 for p in halves(pairs)[1:])
    assert not torch.equal(optimizer.state[pairs[0].A]["exp_avg"], steady.state[twins[0].A]["exp_avg"])
    for p, q in zip(halves(pairs)[1:], halves(twins)[1:], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], steady.state[q]["exp_avg"]) and torch.equal(p, q)


def test_equal_tensors_numbers_and_other_strides_are_taken_over(path: str) -> None:
    """Equal values do not make two tensors one: the state must hold the tensors that the step writes to."""
    optimizer, other = (StableLoRAAdamW(make_pairs([(1, 1, 1), (8, 24, 40)]), lr=1e-2) for _ in range(2))
    take_step(0, optimizer, other)
    small, *_, wide = (optimizer.state[p] for p in params_of(optimizer))
    for name in small:
        small[name] = small[name].clone()
    wide.update(step=1, exp_avg=wide["exp_avg"].t().contiguous().t())
    take_step(1, optimizer, other)
    assert all_equal(snapshot(optimizer), snapshot(other))
    optimizer.state[params_of(optimizer)[2]].update(step=7, latched_at=3)
    take_step(2, optimizer)
    assert optimizer.state[params_of(optimizer)[2]]["step"].item() == 8 and latches(optimizer)["layer1"] == 3


@pytest.mark.parametrize(
    ("options", "name", "value", "message"),
    [
        ({}, "exp_avg", torch.zeros(8, 41), "'exp_avg' must be torch.float32 [8, 40] on cpu, got torch.float32 [8, 41]"),
        ({}, "exp_avg_sq", torch.zeros(8, 40).double(), "'exp_avg_sq' must be torch.float32 [8, 40] on cpu, got torch.float64"),
        ({}, "exp_avg", torch.zeros(8, 40, device="meta"), "[8, 40] on cpu, got torch.float32 [8, 40] on meta"),
        ({}, "exp_avg", 0.0, "'exp_avg' must be torch.float32 [8, 40] on cpu, got 0.0"),
        ({}, "exp_avg", None, "got None"),
        ({}, "step", torch.zeros(2), "'step' must be a number or a 0-d tensor, got"),
        ({}, "latched_at", "never", "'latched_at' must be a number or a 0-d tensor, got 'never'"),
        ({"moments_dtype": torch.uint8}, "exp_avg_scale", torch.zeros(1), "'exp_avg_scale' must be torch.float32 [2] on cpu"),
        ({"moments_dtype": torch.uint8}, "exp_avg", torch.zeros(40, 8, dtype=torch.uint8).t(), "strides (40, 1), got (1, 8)"),
        ({"master_weights": True}, "master", torch.zeros(8), "'master' must be torch.float32 [8, 40] on cpu, got"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(
    backend: str, options: dict[str, Any], name: str, value: Any, message: str
) -> None:
    pairs = make_pairs(dtype=torch.bfloat16)
    optimizer = StableLoRAAdamW(pairs, **options)
    take_step(0, optimizer)
    before = snapshot(optimizer)
    kept, optimizer.state[pairs[0].A][name] = optimizer.state[pairs[0].A][name], value
    set_grads(halves(pairs), 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape("the state of 'layer0.lora_A': ") + ".*" + re.escape(message)):
            optimizer.step()
    optimizer.state[pairs[0].A][name] = kept
    assert all_equal(snapshot(optimizer), before)
    optimizer.step()
    assert optimizer.state[pairs[0].A]["step"].item() == 2


def test_a_further_entry_of_someone_elses_is_kept(backend: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs)
    take_step(0, optimizer)
    optimizer.state[pairs[0].A]["note"] = torch.ones(3)
    take_step(1, optimizer)
    assert optimizer.state[pairs[0].A]["step"].item() == 2
    assert torch.equal(optimizer.state_dict()["state"][0]["note"], torch.ones(3))


def test_a_state_that_moves_to_another_dict(path: str) -> None:
    """As trainers do that keep the state of many adapters and put one in at a time."""
    optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2)
    take_step(0, optimizer)
    kept = {p: {name: t.clone() for name, t in entry.items()} for p, entry in optimizer.state.items()}
    values = [p.detach().clone() for p in params_of(optimizer)]
    take_step(1, optimizer)
    expected = snapshot(optimizer)
    optimizer.state = kept
    with torch.no_grad():
        for p, value in zip(params_of(optimizer), values, strict=True):
            p.copy_(value)
    take_step(1, optimizer)
    assert all_equal(snapshot(optimizer), expected)
