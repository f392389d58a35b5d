"""Clipping within the step: no step without a finite norm. Its result is in test_reference, its launches in test_contract."""

from __future__ import annotations

import math
import re
import warnings

import pytest

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.covering
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_step_without_a_finite_norm_is_not_taken(path: str, value: float, place: int, max_grad_norm: float) -> None:
    options = {"lr": 0.3, "shrink_ratio": 0.1}
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=max_grad_norm, **options)
    # An infinite bound clips nothing.
    other = StableLoRAAdamW(make_pairs(), max_grad_norm=None if max_grad_norm == math.inf else max_grad_norm, **options)
    for step in range(6):
        if step not in (0, 3, 4):
            take_step(step, optimizer, other)
            continue
        before = [p.detach().clone() for p in params_of(optimizer)]
        set_grads(params_of(optimizer), step)
        params_of(optimizer)[place].grad.view(-1)[-1] = value
        optimizer.step()
        assert all_equal(before, [p.detach() for p in params_of(optimizer)])
    assert optimizer.nonfinite_steps == 3 and other.nonfinite_steps == 0
    assert all_equal(snapshot(optimizer), snapshot(other))
    with pytest.warns(
        RuntimeWarning, match=re.escape("3 steps were skipped because the norm of their gradients was not finite")
    ):
        assert any(s.latched_at for s in optimizer.stability())
    # Reported once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
