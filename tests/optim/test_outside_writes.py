"""Writes to parameters from outside between two steps: which are noticed by themselves, and which after ``refresh()``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from tests.helpers.optimizers import all_equal, make_pairs, params_of, snapshot
from tests.helpers.steps import latches, take_step

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(master_weights: bool) -> StableLoRAAdamW:
    pairs = make_pairs(dtype=torch.bfloat16 if master_weights else torch.float32)
    # A parameter of a module, which can be loaded.
    pairs[0] = LoRAPair(pairs[0].name, *(torch.nn.Parameter(p.detach()) for p in (pairs[0].A, pairs[0].B)))
    optimizer = StableLoRAAdamW(pairs, lr=1e-3, shrink_ratio=0.1, master_weights=master_weights)
    for step in range(3):
        take_step(step, optimizer)
    assert not any(latches(optimizer).values())
    return optimizer


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
    optimizer = trained(master_weights)
    write(params_of(optimizer)[1])
    if refresh:
        optimizer.refresh()
    take_step(9, optimizer)
    assert latches(optimizer)["layer0"] == 4 and (params_of(optimizer)[1] > 99).all()
    return snapshot(optimizer)


@pytest.mark.covering
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("write", [in_place, through_detach, other_memory, loaded, as_one_vector, through_data])
def test_a_write_is_noticed(path: str, write: Callable[[torch.Tensor], None], master_weights: bool) -> None:
    """By itself, or after ``refresh()`` if it goes through ``p.data``."""
    found = step_after(write, master_weights, refresh=write is through_data)
    assert all_equal(found, step_after(in_place, master_weights, refresh=True))


def test_a_write_through_data_without_masters_is_used_by_itself(path: str) -> None:
    """Only the norms that Triton's step compares are those of the step before: A shrinks once more, then its pair latches."""
    optimizer = trained(master_weights=False)
    through_data(params_of(optimizer)[1])
    take_step(9, optimizer)
    assert (params_of(optimizer)[1] > 99).all()
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
