"""``optimizer.state`` cleared or replaced, whole or in part: noticed at the next step, as torch.optim.AdamW notices it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import all_equal, halves, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import latches, take_step

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "float32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "bfloat16 moments": (torch.bfloat16, {"moments_dtype": torch.bfloat16}),
    "8 bits": (torch.float32, {"moments_dtype": torch.uint8}),
}


@pytest.fixture(params=KINDS)
def optimizer(request: pytest.FixtureRequest) -> StableLoRAAdamW:
    dtype, options = KINDS[request.param]
    return StableLoRAAdamW(make_pairs(dtype=dtype), lr=4e-2, shrink_ratio=1e-2, seed=3, **options)


def twin_of(optimizer: StableLoRAAdamW) -> StableLoRAAdamW:
    """A fresh optimizer with the options of ``optimizer``, of parameters with its values."""
    pairs = make_pairs(dtype=optimizer.pairs[0].A.dtype)
    with torch.no_grad():
        for p, q in zip(halves(pairs), params_of(optimizer), strict=True):
            p.copy_(q)
    amsgrad = optimizer.param_groups[0]["amsgrad"]
    storage = optimizer.storage._asdict()
    return StableLoRAAdamW(pairs, lr=4e-2, shrink_ratio=1e-2, seed=3, amsgrad=amsgrad, **storage)


def clear(optimizer: StableLoRAAdamW) -> None:
    optimizer.state.clear()


def new_dict(optimizer: StableLoRAAdamW) -> None:
    optimizer.state = {}


def pop_each(optimizer: StableLoRAAdamW) -> None:
    for p in params_of(optimizer):
        optimizer.state.pop(p)


def clear_each(optimizer: StableLoRAAdamW) -> None:
    for entry in optimizer.state.values():
        entry.clear()


@pytest.mark.covering(1)
@pytest.mark.parametrize("forget", [clear, new_dict, pop_each, clear_each])
def test_a_cleared_state_starts_afresh(
    path: str, optimizer: StableLoRAAdamW, forget: Callable[[StableLoRAAdamW], None]
) -> None:
    for step in range(8):
        take_step(step, optimizer)
    assert any(latches(optimizer).values())
    forget(optimizer)
    fresh = twin_of(optimizer)
    for step in range(8, 11):
        take_step(step, optimizer, fresh)
        assert all_equal(snapshot(optimizer), snapshot(fresh))
    assert latches(optimizer) == latches(fresh)
    saved = optimizer.state_dict()["state"]
    assert len(saved) == 8 and all(entry["step"].item() == 3 for entry in saved.values())


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


def test_a_replaced_tensor_is_used(path: str, optimizer: StableLoRAAdamW) -> None:
    """Every tensor of the state, replaced by one that another optimizer made: from then on they take the same steps."""
    other = twin_of(optimizer)
    for step in range(6):
        take_step(step, optimizer)
        take_step(step + 20, other)
    names = {name for entry in optimizer.state.values() for name in entry}
    with torch.no_grad():
        for p, q in zip(params_of(optimizer), params_of(other), strict=True):
            p.copy_(q)
    take_step(50, optimizer, other)
    assert not all_equal(snapshot(optimizer), snapshot(other))
    with torch.no_grad():
        for p, q in zip(params_of(optimizer), params_of(other), strict=True):
            p.copy_(q)
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        for name in names & set(optimizer.state[p]):
            optimizer.state[p][name] = other.state[q][name].clone()
    take_step(51, optimizer, other)
    assert all_equal(snapshot(optimizer), snapshot(other))


def test_an_equal_tensor_in_the_place_of_another_counts_on(path: str) -> None:
    """Equal values do not make two tensors one: the state must hold the tensors that the step writes to."""
    pairs = make_pairs([(1, 1, 1)])
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    for entry in optimizer.state.values():
        for name in entry:
            entry[name] = entry[name].clone()
    take_step(1, optimizer)
    assert [entry["step"].item() for entry in optimizer.state.values()] == [2, 2]


def test_a_number_in_the_place_of_a_counter(path: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    optimizer.state[pairs[0].A].update(step=7, latched_at=3)
    take_step(1, optimizer)
    assert optimizer.state[pairs[0].A]["step"].item() == 8
    assert latches(optimizer)["layer0"] == 3


def test_other_strides_are_taken_over(path: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=1e-2), StableLoRAAdamW(twins, lr=1e-2)
    take_step(0, optimizer, other)
    entry = optimizer.state[pairs[0].A]
    entry["exp_avg"] = entry["exp_avg"].t().contiguous().t()
    take_step(1, optimizer, other)
    assert all_equal(snapshot(optimizer), snapshot(other))


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


def test_a_step_whose_state_is_its_own_builds_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = StableLoRAAdamW(make_pairs())
    take_step(0, optimizer)
    engines = optimizer._engines
    take_step(1, optimizer)
    optimizer.state_dict()
    optimizer.stability()
    take_step(2, optimizer)
    assert optimizer._engines is engines


def test_a_state_that_moves_to_another_optimizers_dict(path: str) -> None:
    """As trainers do that keep the state of many adapters and put one in at a time."""
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, lr=1e-2)
    take_step(0, optimizer)
    kept = {p: {name: t.clone() for name, t in entry.items()} for p, entry in optimizer.state.items()}
    values = [p.detach().clone() for p in halves(pairs)]
    take_step(1, optimizer)
    expected = snapshot(optimizer)
    for step in range(2, 4):
        take_step(step, optimizer)
    optimizer.state = kept
    with torch.no_grad():
        for p, value in zip(halves(pairs), values, strict=True):
            p.copy_(value)
    take_step(1, optimizer)
    assert all_equal(snapshot(optimizer), expected)


def test_the_backends_agree_after_a_replacement() -> None:
    results = []
    for name in ("torch", "triton"):
        pairs = make_pairs()
        optimizer = StableLoRAAdamW(pairs, lr=1e-2)
        with use_backend(name):
            take_step(0, optimizer)
            optimizer.state[pairs[1].B]["exp_avg"] = torch.full_like(pairs[1].B, 0.5).detach()
            take_step(1, optimizer)
        results.append(halves(pairs))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
