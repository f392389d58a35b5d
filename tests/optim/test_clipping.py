"""Clipping within the step: one launch for the norm and the step's, clip_grad_norm_'s result, no step without a finite norm."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from stablelora_kernels.dispatch import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import DEVICE, SHAPES, all_equal, halves, in_float64, make_pairs, set_grads, snapshot
from tests.helpers.steps import assert_all_close, assert_close_to, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("chunk", [64, 4096])
def test_two_launches_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    pytest.importorskip("triton")
    from stablelora_kernels.optim.triton_engine import TritonStep

    monkeypatch.setattr(TritonStep, "CHUNK", chunk)
    pairs = make_pairs()
    oracle = StableAdamWRef(in_float64(pairs), lr=2e-2, shrink_ratio=0.01, max_grad_norm=0.1)
    optimizer = StableLoRAAdamW(pairs, lr=2e-2, shrink_ratio=0.01, max_grad_norm=0.1)
    for step in range(4):
        with use_backend("triton"), count_launches() as made:
            take_step_with(oracle, optimizer, step)
        # The first step needs the parameters' norms as well: the same launch takes them.
        assert made == {"_square_sums_kernel": 1, "_stable_adamw_kernel": 1}
    assert_close_to(oracle, optimizer)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [False, True])
def test_equal_to_clip_grad_norm_and_step(path: str, dtype: torch.dtype, missing: bool) -> None:
    pairs, twins = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, seed=3, max_grad_norm=0.25)
    other = StableLoRAAdamW(twins, lr=1e-2, seed=3)
    for step in range(5):
        for params in (halves(pairs), halves(twins)):
            set_grads(params, step, scale=1e-4 if step == 0 else 0.25 * step)
            if missing:
                params[2].grad = None
        torch.nn.utils.clip_grad_norm_(halves(twins), 0.25)
        optimizer.step()
        other.step()
    bound = {torch.float32: {"rtol": 1e-5, "atol": 1e-7}, torch.bfloat16: {"rtol": 0.05, "atol": 3e-3}}[dtype]
    assert_all_close(halves(pairs), halves(twins), **bound)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_beside_masters_the_norm_is_the_gradients(path: str, moments: torch.dtype) -> None:
    """The masters are of another norm. The first moments tell by what the gradients were multiplied."""
    pairs, twins = make_pairs(dtype=torch.bfloat16), make_pairs(dtype=torch.bfloat16)
    options = {"lr": 1e-2, "seed": 3, "master_weights": True, "eps": 1.0, "moments_dtype": moments}
    optimizer, other = StableLoRAAdamW(pairs, max_grad_norm=0.25, **options), StableLoRAAdamW(twins, **options)
    for step in range(3):
        for params in (halves(pairs), halves(twins)):
            set_grads(params, step, scale=0.25 * (step + 1))
        torch.nn.utils.clip_grad_norm_(halves(twins), 0.25)
        optimizer.step()
        other.step()
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        found, expected = optimizer.state[p]["exp_avg"].float(), other.state[q]["exp_avg"].float()
        # clip_grad_norm_ rounds gradients to bfloat16.
        assert (found - expected).norm() <= 0.03 * expected.norm()


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


def test_scaled_gradients_and_a_verdict(path: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, other = (StableLoRAAdamW(p, lr=1e-2, max_grad_norm=0.5) for p in (pairs, twins))
    for step, found in enumerate((0.0, 1.0, 0.0)):
        set_grads(halves(pairs), step, scale=4.0)
        optimizer.grad_scale = torch.tensor(8.0, device=DEVICE)
        optimizer.found_inf = torch.tensor(found, device=DEVICE)
        if found:
            pairs[0].A.grad[0, 0] = math.inf
        else:
            set_grads(halves(twins), step, scale=0.5)
            other.step()
        optimizer.step()
    assert_all_close(halves(pairs), halves(twins), rtol=1e-6, atol=1e-8)
    # GradScaler's skips are its own to count.
    assert optimizer.nonfinite_steps == 0


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


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, -math.inf])
def test_a_bound_out_of_range(value: float) -> None:
    message = f"max_grad_norm must be a finite number in (0, inf), got {value}"
    with pytest.raises(ValueError, match=re.escape(message)):
        StableLoRAAdamW(make_pairs(), max_grad_norm=value)
