"""Algorithm 1: when A shrinks, when its pair latches, and norms that decide nothing. No clipped
step without a finite norm.
"""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import (
    DEVICE,
    all_equal,
    halves,
    in_float64,
    make_pairs,
    params_of,
    set_grads,
    snapshot,
)
from tests.helpers.steps import assert_close_to, latches, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(a: float | None = None, b: float | None = None) -> LoRAPair:
    (pair,) = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        for p, value in ((pair.A, a), (pair.B, b)):
            if value is not None:
                p.fill_(value)
    return pair


def test_a_latch_holds_for_good(backend):
    """Also when B becomes the smaller, and when the stop condition becomes "never", which shrinks
    the other pair.
    """
    latched, live = filled(b=100.0), filled()
    optimizer = StableLoRAAdamW(
        [latched, LoRAPair("live", live.A, live.B)], lr=0.0, shrink_ratio=0.5, weight_decay=0.0
    )
    before = [pair.A.detach().clone() for pair in (latched, live)]
    take_step(0, optimizer)
    with torch.no_grad():
        latched.B.zero_()
        live.B.fill_(100.0)
    optimizer.param_groups[0]["stop_condition"] = "never"
    optimizer.step()
    assert torch.equal(latched.A, before[0]) and latches(optimizer) == {"layer0": 1, "live": None}
    torch.testing.assert_close(live.A.detach(), before[1] / 4, rtol=1e-6, atol=0)
    # "stable" goes by the norms of now, "latched" by what the optimizer has decided.
    first, second = optimizer.stability()
    assert (first.stable, first.latched) == (False, True)
    assert (second.stable, second.latched) == (True, False)


def test_equal_norms_latch(backend):
    optimizer = StableLoRAAdamW([filled(a=0.0)], lr=0.0, shrink_ratio=0.5)
    take_step(0, optimizer)
    assert latches(optimizer) == {"layer0": 1}


def test_an_a_without_a_gradient_does_not_latch(backend):
    """B's norm is the larger from the start, so the pair latches in the first step in which A has a
    gradient.
    """
    pair = filled(b=100.0)
    optimizer = StableLoRAAdamW([pair], lr=1e-2, shrink_ratio=0.5)
    a = pair.A.detach().clone()
    set_grads([pair.B], 0)
    for _ in range(2):
        optimizer.step()
        assert latches(optimizer) == {"layer0": None} and torch.equal(pair.A, a)
    take_step(1, optimizer)
    assert latches(optimizer) == {"layer0": 1}
    assert [optimizer.state[p]["step"].item() for p in halves([pair])] == [1, 3]


def test_a_b_without_a_gradient_keeps_its_norm(backend):
    pair = filled(1.0, 0.999)
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    for step in range(3):
        set_grads([pair.A], step)
        optimizer.step()
    # One shrink, then A is smaller than B.
    assert latches(optimizer) == {"layer0": 2}
    assert pair.A.eq(0.5).all() and pair.B.eq(0.999).all()


@pytest.mark.parametrize("lr", [0.0, 1e-310, 1e-13])
def test_a_shrinks_at_any_rate(backend, lr):
    pair = filled()
    before = pair.A.detach().clone()
    take_step(0, StableLoRAAdamW([pair], lr=lr, shrink_ratio=0.5))
    torch.testing.assert_close(pair.A.detach(), before / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("stop_condition", ["norm", "never"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_decides_nothing_and_is_reported(backend, stop_condition, value):
    good, bad = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW(
        [good, bad], lr=0.0, shrink_ratio=0.5, weight_decay=0.0, stop_condition=stop_condition
    )
    with torch.no_grad():
        bad.B[0, 0] = value
    before = [pair.A.detach().clone() for pair in (good, bad)]
    take_step(0, optimizer)
    torch.testing.assert_close(good.A.detach(), before[0] / 2, rtol=1e-6, atol=0)
    assert torch.equal(bad.A, before[1]) and optimizer.state[bad.A]["latched_at"].item() == 0
    for sync in (optimizer.stability, optimizer.state_dict):
        with pytest.raises(
            RuntimeError, match=r"pair 'layer1' holds values that are not finite.*\|\|B\|\|_F = "
        ):
            sync()


# Norms whose squares float32 does not hold: exact on a CPU's own path, told on the paths of a GPU


def scaled_pairs(a: float, b: float) -> list[LoRAPair]:
    pairs = make_pairs()
    with torch.no_grad():
        for pair in pairs:
            pair.B.normal_(generator=torch.Generator(DEVICE).manual_seed(1)).mul_(b)
            pair.A.mul_(a)
    return pairs


# Of B's elements on those of A, so that A is larger than B over their widths, or smaller, by 1 %
# and by much.
@pytest.mark.covering
@pytest.mark.parametrize("b", [0.0, 1e-3, 0.5, 50.0])
@pytest.mark.parametrize("a", [1e30, 1e19, 1e-17, 1e-25, 1e-35])
@pytest.mark.parametrize("stop_condition", ["norm", "never"])
def test_the_reference_decides_alike(a, b, stop_condition):
    pairs = scaled_pairs(a, a * b)
    options = {"lr": 0.0, "shrink_ratio": 0.25, "stop_condition": stop_condition}
    oracle = StableAdamWRef(in_float64(pairs), **options)
    optimizer = StableLoRAAdamW(pairs, **options)
    with settings(backend="torch"):
        for step in range(3):
            take_step_with(oracle, optimizer, step)
    assert_close_to(oracle, optimizer, atol=0.0)


@pytest.mark.parametrize(("a", "told"), [(1e30, True), (1e-25, True), (1.0, False), (1e-8, False)])
def test_a_gpus_limits_are_told(backend, a, told, recwarn):
    pairs = scaled_pairs(a, 0.0)
    optimizer = StableLoRAAdamW(pairs, lr=0.0, shrink_ratio=0.25)
    take_step(0, optimizer)
    for read in (optimizer.stability, optimizer.state_dict):
        recwarn.clear()
        read()
        messages = [
            str(w.message) for w in recwarn if "are outside 1e-15 to 1e+19" in str(w.message)
        ]
        assert len(messages) == (len(pairs) if told and backend != "torch" else 0)
    if backend == "torch" or not told:
        assert set(latches(optimizer).values()) == {None}


# Clipping


@pytest.mark.covering
@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_step_without_a_finite_norm_is_not_taken(backend, value, place, max_grad_norm):
    options = {"lr": 0.3, "shrink_ratio": 0.1}
    optimizer = StableLoRAAdamW(make_pairs(), max_grad_norm=max_grad_norm, **options)
    # An infinite bound clips nothing.
    other = StableLoRAAdamW(
        make_pairs(), max_grad_norm=None if max_grad_norm == math.inf else max_grad_norm, **options
    )
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
        RuntimeWarning,
        match=re.escape("3 steps were skipped because the norm of their gradients was not finite"),
    ):
        assert any(s.latched_at for s in optimizer.stability())
    # Reported once.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
