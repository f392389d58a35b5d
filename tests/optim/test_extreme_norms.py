"""Norms whose squares float32 does not hold: exact on a CPU's own path, told on the paths of a GPU."""

from __future__ import annotations

import pickle

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import halves, in_float64, make_pairs
from tests.helpers.steps import assert_close_to, latches, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled_pairs(a: float, b: float):
    pairs = make_pairs()
    with torch.no_grad():
        for pair in pairs:
            pair.B.normal_(generator=torch.Generator().manual_seed(1)).mul_(b)
            pair.A.mul_(a)
    return pairs


# Of B's elements on those of A, so that A is larger than B over their widths, or smaller, by 1 % and by much.
@pytest.mark.parametrize("b", [0.0, 1e-3, 0.5, 50.0])
@pytest.mark.parametrize("a", [1e30, 1e19, 1e-17, 1e-25, 1e-35])
@pytest.mark.parametrize("stop_condition", ["norm", "never"])
def test_the_reference_decides_alike(a: float, b: float, stop_condition: str) -> None:
    pairs = scaled_pairs(a, a * b)
    options = {"lr": 0.0, "shrink_ratio": 0.25, "stop_condition": stop_condition}
    oracle, optimizer = StableAdamWRef(in_float64(pairs), **options), StableLoRAAdamW(pairs, **options)
    with use_backend("torch"):
        for step in range(3):
            take_step_with(oracle, optimizer, step)
    assert_close_to(oracle, optimizer, atol=0.0)


@pytest.mark.parametrize(("a", "told"), [(1e30, True), (1e-25, True), (1.0, False), (1e-8, False)])
def test_a_gpus_limits_are_told(path: str, a: float, told: bool, recwarn: pytest.WarningsRecorder) -> None:
    pairs = scaled_pairs(a, 0.0)
    optimizer = StableLoRAAdamW(pairs, lr=0.0, shrink_ratio=0.25)
    take_step(0, optimizer)
    for read in (optimizer.stability, optimizer.state_dict):
        recwarn.clear()
        read()
        messages = [str(w.message) for w in recwarn if "are outside 1e-15 to 1e+19" in str(w.message)]
        assert len(messages) == (len(pairs) if told and path != "torch" else 0)
    if path == "torch" or not told:
        assert set(latches(optimizer).values()) == {None}


def named_schedule(step: int) -> float:
    return 0.1 / step


def test_a_schedule_is_copied_and_pickled_if_it_can_be() -> None:
    import copy

    for schedule in (named_schedule, lambda step: 0.1 / step):
        optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, seed=1, shrink_schedule=schedule)
        take_step(0, optimizer)
        copied = copy.deepcopy(optimizer)
        assert copied.shrink_schedule is schedule
        optimizer.load_state_dict(optimizer.state_dict())
        take_step(1, optimizer, copied)
        assert optimizer.param_groups[0]["shrink_ratio"] == copied.param_groups[0]["shrink_ratio"] == 0.05
        if schedule is named_schedule:
            again = pickle.loads(pickle.dumps(optimizer))
            assert again.shrink_schedule is named_schedule
            take_step(2, optimizer, again)
            for p, q in zip(halves(optimizer.pairs), halves(again.pairs), strict=True):
                assert torch.equal(p, q)
        else:
            with pytest.raises(
                pickle.PicklingError, match=r"shrink_schedule <function .* cannot be pickled: make it a"
            ):
                pickle.dumps(optimizer)


class _Trainer:
    """Holds an optimizer whose schedule is its own method, so that pickling either leads to the other."""

    def __init__(self) -> None:
        self.optimizer = StableLoRAAdamW(make_pairs(), lr=1e-2, shrink_schedule=self.ratio)

    def ratio(self, step: int) -> float:
        return 0.1 / step


def test_a_schedule_that_leads_back_to_the_optimizer_is_pickled() -> None:
    again = pickle.loads(pickle.dumps(_Trainer()))
    assert again.optimizer.shrink_schedule.__self__ is again
    take_step(0, again.optimizer)
    assert again.optimizer.param_groups[0]["shrink_ratio"] == 0.1
