"""Writes to parameters from outside between two steps: which are noticed by themselves, and which after ``refresh()``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import all_equal, halves, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import latches, take_step

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = torch.bfloat16


def trained(master_weights: bool) -> tuple[list[LoRAPair], StableLoRAAdamW]:
    pairs = make_pairs(dtype=LOW if master_weights else torch.float32)
    optimizer = StableLoRAAdamW(pairs, lr=1e-3, shrink_ratio=0.1, master_weights=master_weights)
    for step in range(3):
        take_step(step, optimizer)
    assert not any(latches(optimizer).values())
    return pairs, optimizer


def in_place(p: torch.Tensor) -> None:
    with torch.no_grad():
        p.fill_(100)


def through_detach(p: torch.Tensor) -> None:
    p.detach().fill_(100)


def other_memory(p: torch.Tensor) -> None:
    p.data = torch.full_like(p, 100).detach()


def loaded(p: torch.Tensor) -> None:
    module = torch.nn.Module()
    module.p = p
    module.load_state_dict({"p": torch.full_like(p, 100)})


def as_one_vector(p: torch.Tensor) -> None:
    torch.nn.utils.vector_to_parameters(torch.full((p.numel(),), 100, dtype=p.dtype), [p])


def through_data(p: torch.Tensor) -> None:
    p.data.fill_(100)


def step_after(write: Callable[[torch.Tensor], None], master_weights: bool, refresh: bool) -> list[torch.Tensor]:
    """Everything after a step that follows a write to the first B: it makes the pair latch at that step."""
    pairs, optimizer = trained(master_weights)
    write(pairs[0].B)
    if refresh:
        optimizer.refresh()
    set_grads(halves(pairs), 9)
    optimizer.step()
    assert latches(optimizer)["layer0"] == 4
    assert (pairs[0].B > 99).all()
    return snapshot(optimizer)


@pytest.mark.covering
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("write", [in_place, through_detach, other_memory, as_one_vector])
def test_what_is_noticed_by_itself(path: str, write: Callable[[torch.Tensor], None], master_weights: bool) -> None:
    assert all_equal(step_after(write, master_weights, False), step_after(in_place, master_weights, True))


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_module_that_is_loaded_is_noticed(path: str, master_weights: bool) -> None:
    pairs = make_pairs(dtype=LOW if master_weights else torch.float32)
    pairs[0] = LoRAPair(pairs[0].name, *(torch.nn.Parameter(p.detach()) for p in (pairs[0].A, pairs[0].B)))
    optimizer = StableLoRAAdamW(pairs, lr=1e-3, shrink_ratio=0.1, master_weights=master_weights)
    for step in range(3):
        take_step(step, optimizer)
    loaded(pairs[0].B)
    take_step(9, optimizer)
    assert latches(optimizer)["layer0"] == 4 and (pairs[0].B > 99).all()


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_write_through_data_is_noticed_after_refresh(path: str, master_weights: bool) -> None:
    assert all_equal(step_after(through_data, master_weights, True), step_after(in_place, master_weights, True))


def test_a_write_through_data_without_masters_is_used_by_itself(path: str) -> None:
    """Only the norms that Triton's step compares are those of the step before: A shrinks once more, then its pair latches."""
    pairs, optimizer = trained(master_weights=False)
    pairs[0].B.data.fill_(100)
    take_step(9, optimizer)
    assert (pairs[0].B > 99).all()
    assert latches(optimizer)["layer0"] == (None if path == "triton" else 4)
    take_step(10, optimizer)
    assert latches(optimizer)["layer0"] == (5 if path == "triton" else 4)


def test_refresh_before_the_first_step_and_twice(path: str) -> None:
    optimizer, other = StableLoRAAdamW(make_pairs()), StableLoRAAdamW(make_pairs())
    for step in range(3):
        optimizer.refresh()
        optimizer.refresh()
        take_step(step, optimizer, other)
    # The norms are measured anew, in another order: their last bit may differ, no decision does.
    assert all_equal([p.detach() for p in params_of(optimizer)], [p.detach() for p in params_of(other)])


def test_refresh_costs_one_launch_once() -> None:
    pytest.importorskip("triton")
    from stablelora_kernels.dispatch.settings import use_backend

    optimizer = StableLoRAAdamW(make_pairs())
    with use_backend("triton"):
        take_step(0, optimizer)
        optimizer.refresh()
        made = []
        for step in (1, 2):
            with count_launches() as counted:
                take_step(step, optimizer)
            made.append(dict(counted))
    assert made == [{"_square_sums_kernel": 1, "_stable_adamw_kernel": 1}, {"_stable_adamw_kernel": 1}]
