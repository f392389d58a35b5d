"""Clipping within the step: no step without a finite norm. Its result is in test_reference, its launches in test_contract."""

from __future__ import annotations

import math
import re
import warnings

import pytest

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from tests.helpers.optimizers import SHAPES, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.covering
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_step_without_a_finite_norm_is_not_taken(path: str, value: float, place: int) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = (StableLoRAAdamW(p, lr=0.3, max_grad_norm=1.0, shrink_ratio=0.1) for p in (pairs, twins))
    for step in range(6):
        if step in (0, 3, 4):
            before = snapshot(optimizer) if step else [p.detach().clone() for p in halves(pairs)]
            set_grads(halves(pairs), step)
            halves(pairs)[place].grad.view(-1)[-1] = value
            optimizer.step()
            after = snapshot(optimizer) if step else [p.detach() for p in halves(pairs)]
            assert all_equal(before, after)
        else:
            take_step(step, optimizer, other)
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


def test_an_infinite_bound_clips_nothing_but_skips(path: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = StableLoRAAdamW(pairs, lr=1e-2, max_grad_norm=math.inf), StableLoRAAdamW(twins, lr=1e-2)
    take_step(0, optimizer, other, scale=100.0)
    assert all_equal(snapshot(optimizer), snapshot(other))
    pairs[1].B.grad.fill_(math.nan)
    optimizer.step()
    assert all_equal(snapshot(optimizer), snapshot(other))
    assert optimizer.nonfinite_steps == 1


def test_without_clipping_a_bad_gradient_ends_its_pairs_decisions(path: str) -> None:
    """Nobody looks at the gradients before the step: it is AdamW's, and the pair's norms are not finite from then on."""
    good, bad = make_pairs(SHAPES[:2])
    optimizer = StableLoRAAdamW([good, bad], lr=1e-3, shrink_ratio=0.5)
    set_grads(halves([good, bad]), 0)
    bad.B.grad[0, 0] = math.nan
    optimizer.step()
    assert bad.B.isnan().sum().item() == 1 and good.B.isfinite().all()
    norm = bad.A.detach().norm().item()
    take_step(1, optimizer)
    assert bad.A.detach().norm().item() > 0.9 * norm
    assert optimizer.state[bad.A]["latched_at"].item() == 0
    with pytest.raises(RuntimeError, match="pair 'layer1' holds values that are not finite"):
        optimizer.stability()
