"""What holds for every row of the options' table: resuming, copies, lost and foreign state, AdamW's state, skipped steps."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import decode8
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import DEVICE, all_equal, halves, params_of, set_grads, snapshot
from tests.helpers.steps import latches, saved_and_loaded, take_step
from tests.optim.options import FP32, OPTIONS, STORED, Row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=OPTIONS)
def option(request: pytest.FixtureRequest) -> Row:
    return OPTIONS[request.param]


@pytest.fixture(params=STORED)
def row(request: pytest.FixtureRequest) -> Row:
    return OPTIONS[request.param]


def twin_of(row: Row, optimizer: StableLoRAAdamW, seed: int = 0, **change: Any) -> StableLoRAAdamW:
    """A fresh optimizer of parameters with the values that those of ``optimizer`` have."""
    pairs = row.pairs(seed=seed)
    with torch.no_grad():
        for p, q in zip(halves(pairs), params_of(optimizer), strict=True):
            p.copy_(q)
    return row.optimizer(pairs, **change)


@pytest.mark.covering(1)
def test_resumed_and_copied_it_goes_on_to_the_bit(path: str, option: Row) -> None:
    """All options are in the state but storage and the schedule, which a function cannot be."""
    straight, cut = option.optimizer(), option.optimizer()
    for step in range(4):
        take_step(step, straight, cut)
    kept = {
        key: option.options[key]
        for key in ("moments_dtype", "master_weights", "shrink_schedule")
        if key in option.options
    }
    pairs = option.pairs(seed=9)
    state, values = saved_and_loaded([cut.state_dict(), [p.detach() for p in params_of(cut)]])
    with torch.no_grad():
        for p, value in zip(halves(pairs), values, strict=True):
            p.copy_(value)
    resumed = StableLoRAAdamW(pairs, lr=1.0, shrink_ratio=0.5, seed=6, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
    others = [resumed, copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))]
    for other in others:
        assert other.max_grad_norm == straight.max_grad_norm and other.storage == straight.storage
        assert other.state.keys().isdisjoint(cut.state)
    for step in range(4, 6):
        take_step(step, straight, *others)
    for other in others:
        assert all_equal(snapshot(straight), snapshot(other)) and latches(straight) == latches(other)


@pytest.mark.covering(1)
@pytest.mark.parametrize("found_inf", [1.0, 2.0])
def test_found_inf_changes_nothing(path: str, row: Row, found_inf: float) -> None:
    """GradScaler adds up the verdicts of several devices, so it may be more than 1."""
    optimizer = row.optimizer()
    for step in range(2):
        take_step(step, optimizer)
    before = snapshot(optimizer)
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
    # A schedule counts a call of step().
    twin = None if optimizer.shrink_schedule else copy.deepcopy(optimizer)
    set_grads(params_of(optimizer), 2)
    params_of(optimizer)[0].grad.view(-1)[0] = math.inf
    optimizer.step()
    assert all_equal(snapshot(optimizer), before) and optimizer.nonfinite_steps == 0
    if twin is not None:
        # The step after it is the one that would have come. The scale is a power of two.
        optimizer.found_inf.zero_()
        take_step(7, optimizer, scale=4e-2)
        take_step(7, twin)
        assert all_equal(snapshot(optimizer), snapshot(twin))


def test_a_step_on_triton_is_one_launch(option: Row) -> None:
    """Two if it clips, or if the parameters' norms have to be measured."""
    step, sums = {"_stable_adamw_kernel": 1}, {"_square_sums_kernel": 1}
    optimizer, found = option.optimizer(), []
    with use_backend("triton"):
        for seed in range(3):
            if seed == 2:
                optimizer.refresh()
            with count_launches() as made:
                take_step(seed, optimizer)
            found.append(dict(made))
    clipped = option.options.get("max_grad_norm") is not None
    assert found == [step | sums, step | sums if clipped else step, step | sums]


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
def test_a_cleared_state_starts_afresh(path: str, row: Row, forget: Callable[[StableLoRAAdamW], None]) -> None:
    optimizer = row.optimizer(shrink_schedule=None)
    for step in range(5):
        take_step(step, optimizer)
    forget(optimizer)
    fresh = twin_of(row, optimizer, shrink_schedule=None)
    for step in range(2):
        take_step(step, optimizer, fresh)
    assert all_equal(snapshot(optimizer), snapshot(fresh)) and latches(optimizer) == latches(fresh)
    saved = optimizer.state_dict()["state"]
    assert len(saved) == 8 and all(entry["step"].item() == 2 for entry in saved.values())


@pytest.mark.covering(1)
def test_replaced_tensors_are_used(path: str, row: Row) -> None:
    """Every tensor of the state, replaced by one that another optimizer made: from then on they take the same steps."""
    optimizer, other = (row.optimizer(shrink_schedule=None) for _ in range(2))
    for step in range(4):
        take_step(step, optimizer)
        take_step(step + 20, other)
    names = {name for entry in optimizer.state.values() for name in entry}
    for replaced in (False, True):
        with torch.no_grad():
            for p, q in zip(params_of(optimizer), params_of(other), strict=True):
                p.copy_(q)
                for name in names & set(optimizer.state[p]) if replaced else ():
                    optimizer.state[p][name] = other.state[q][name].clone()
        take_step(50 + replaced, optimizer, other)
        assert all_equal(snapshot(optimizer), snapshot(other)) == replaced


@pytest.mark.covering(1)
@pytest.mark.parametrize("change", ["float64", "float16", "meta"])
def test_torchs_defaults_do_not_matter(path: str, change: str, row: Row) -> None:
    optimizer, other = row.optimizer(shrink_schedule=None), row.optimizer(shrink_schedule=None)
    for step in range(3):
        take_step(step, other)
    grads = []
    for step in range(3):
        set_grads(params_of(optimizer), step)
        grads.append([p.grad for p in params_of(optimizer)])
    kept = torch.get_default_dtype()
    try:
        if change == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, change))
        for step in range(3):
            for p, g in zip(params_of(optimizer), grads[step], strict=True):
                p.grad = g
            optimizer.step()
            if step == 1:
                stability, state = optimizer.stability(), optimizer.state_dict()
                assert optimizer.nonfinite_steps == 0
                optimizer.load_state_dict(copy.deepcopy(state))
                first = optimizer.state[params_of(optimizer)[0]]
                first.update(step=int(first["step"]), latched_at=int(first["latched_at"]))
                optimizer = copy.deepcopy(optimizer)
    finally:
        torch.set_default_dtype(kept)
        torch.set_default_device(None)
    assert all_equal(snapshot(optimizer), snapshot(other))
    assert stability[0].a_norm > 0 and str(optimizer.pairs[0].A.device).startswith(DEVICE)


@pytest.mark.covering(1)
@pytest.mark.parametrize("source", ["torch's AdamW", "ours", "ours without a step"])
def test_a_plain_state_is_converted(path: str, row: Row, source: str) -> None:
    """Of AdamW, or ours in float32. The optimizer keeps its own storage, and its own options where AdamW has none."""
    twins = row.pairs()
    plain = torch.optim.AdamW(halves(twins)) if source == "torch's AdamW" else StableLoRAAdamW(twins)
    if source != "ours without a step":
        set_grads(halves(twins), 0)
        plain.step()
    optimizer = row.optimizer(max_grad_norm=None)
    storage, pattern = optimizer.storage, optimizer.param_groups[0]["shrink_pattern"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    if source == "ours":
        assert any("it was converted, since this" in str(w.message) for w in told) == (
            row.moments is not FP32 or row.masters
        )
    assert optimizer.storage == storage and optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["shrink_pattern"] == (pattern if source == "torch's AdamW" else {})
    assert set(latches(optimizer).values()) == {None}
    steps = 0 if source == "ours without a step" else 1
    for p, q in zip(params_of(optimizer), halves(twins), strict=True):
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)) if steps else ():
            found, expected = optimizer.state[p][key], plain.state[q][key].float()
            if row.moments is torch.uint8:
                # A step of the last fraction bit, rounded to nearest: half of an eighth.
                decoded = decode8(found, optimizer.state[p][f"{key}_scale"], signed)
                error, largest = (expected - decoded).abs(), decoded.abs().max()
                assert (error <= decoded.abs() / 16 + 2e-5 * largest).all()
            else:
                assert torch.equal(found, expected.to(row.moments))
    take_step(1, optimizer)
    assert all(state["step"].item() == steps + 1 for state in optimizer.state.values())


@pytest.mark.covering(1)
def test_its_state_is_converted_to_a_plain_one(path: str, row: Row) -> None:
    optimizer, plain = row.optimizer(), StableLoRAAdamW(row.pairs())
    take_step(0, optimizer)
    state = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.load_state_dict(copy.deepcopy(state))
    for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
        assert "master" not in plain.state[q]
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            given = optimizer.state[p][key]
            decoded = (
                decode8(given, optimizer.state[p][f"{key}_scale"], signed) if row.moments is torch.uint8 else given
            )
            assert torch.equal(plain.state[q][key], decoded.float())
    take_step(1, plain)
    assert all(state["step"].item() == 2 for state in plain.state.values())
