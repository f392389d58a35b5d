"""Few bits: moments in 8 bits by blocks and in bfloat16, and float32 masters of low-precision
parameters.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stablelora_kernels.optim.rounding import BLOCK, MOMENT_WORD
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import load_moment
from stablelora_kernels.reference import stochastic_round_ref
from stablelora_kernels.reference.optimizer import (
    mix32,
    moment8_ref,
    moment_noise_ref,
    rounding_noise_ref,
)
from tests.helpers.optimizers import DEVICE, all_equal, make_pairs, params_of, set_grads, snapshot
from tests.helpers.steps import take_step
from tests.optim.options import BF16, FP32, FP64

pytestmark = pytest.mark.usefixtures("one_thread")


def after_a_step(
    moments: torch.dtype, bad: float = 0.0
) -> tuple[StableLoRAAdamW, torch.Tensor, dict[str, Any]]:
    """An optimizer, A's gradient, over 6 orders of magnitude in a block and more between blocks,
    and A's state after it.
    """
    (pair,) = make_pairs([(4, 8, 600)])
    optimizer = StableLoRAAdamW(
        [pair], lr=0.0, weight_decay=0.0, betas=(0.5, 0.5), moments_dtype=moments, seed=7
    )
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(2400, generator=generator) * 10 ** (
        -6 * torch.rand(2400, generator=generator)
    )
    grad[BLOCK : 2 * BLOCK] *= 1e-5
    grad[BLOCK + 3] = bad
    pair.A.grad = grad.view(4, 600).to(DEVICE)
    optimizer.step()
    return optimizer, grad, optimizer.state[pair.A]


@pytest.mark.parametrize("moments", [BF16, torch.uint8])
def test_both_moments_are_the_references(backend, moments):
    """In its format, rounded by its noise. Halves of gradients and of their squares are exact in
    float32.
    """
    optimizer, grad, state = after_a_step(moments)
    kept = {}
    for which, (name, exact) in enumerate((("exp_avg", grad / 2), ("exp_avg_sq", grad * grad / 2))):
        found, off = load_moment(state, name, FP32).flatten().double().cpu(), 0
        for start in range(0, 2400, BLOCK):
            indices = range(start, min(start + BLOCK, 2400))
            values = [exact[i].item() for i in indices]
            if moments is BF16:
                noises = [moment_noise_ref(7, 1, i)[which] for i in indices]
                expected = [
                    stochastic_round_ref(x, BF16, noise)
                    for x, noise in zip(values, noises, strict=True)
                ]
            else:
                noises = [mix32(rounding_noise_ref(7, 1, i) + MOMENT_WORD) for i in indices]
                noises = [mix32(noise + MOMENT_WORD) for noise in noises] if which else noises
                expected, scale = moment8_ref(values, noises, signed=not which)
                assert state[f"{name}_scale"][start // BLOCK].item() == pytest.approx(
                    scale, rel=1e-6
                )
            wrong = (found[start : start + BLOCK] - torch.tensor(expected, dtype=FP64)).abs()
            off += int((wrong > 2e-6 * found[start : start + BLOCK].abs()).sum())
        # x / scale is rounded to float32 where the reference is exact: a draw may fall on the other
        # side, seldom.
        assert off <= (0 if moments is BF16 else 2)
        kept[name] = load_moment(state, name, FP32).clone()
    # Halves have the codes of the whole.
    optimizer.pairs[0].A.grad.zero_()
    optimizer.step()
    for name, value in kept.items():
        torch.testing.assert_close(load_moment(state, name, FP32), value / 2, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows(backend, bad):
    *_, state = after_a_step(torch.uint8, bad)
    for name in ("exp_avg", "exp_avg_sq"):
        found = load_moment(state, name, FP32).flatten()
        assert found[BLOCK : 2 * BLOCK].isnan().all() and found[:BLOCK].isfinite().all()
        assert found[2 * BLOCK :].isfinite().all()


@pytest.mark.parametrize("moments", [BF16, torch.uint8])
def test_a_scale_leaves_the_gradients_as_they_are(backend, moments):
    """GradScaler may read them again."""
    optimizer = StableLoRAAdamW(make_pairs(), moments_dtype=moments)
    set_grads(params_of(optimizer), 0)
    before = [p.grad.clone() for p in params_of(optimizer)]
    optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
    optimizer.step()
    assert all_equal([p.grad for p in params_of(optimizer)], before)


# bfloat16 and masters


def test_both_halves_of_the_seed_count(backend):
    after = []
    for seed in (5, 5 + 2**32):
        optimizer = StableLoRAAdamW(make_pairs(dtype=BF16), lr=1e-2, seed=seed)
        take_step(0, optimizer)
        after.append(snapshot(optimizer))
    assert not all_equal(*after)


def test_a_parameter_that_someone_else_wrote_to_is_its_own_master(backend):
    pairs = make_pairs(dtype=BF16)
    optimizer = StableLoRAAdamW(pairs, lr=1e-3, master_weights=True)
    take_step(0, optimizer)
    a, b = pairs[0].A, pairs[0].B
    kept = optimizer.state[a]["master"].clone()
    with torch.no_grad():
        # Written to, but for its first row with what it was.
        a[1:] += 1
        b.copy_(b.clone())
    kept_b = optimizer.state[b]["master"].clone()
    optimizer.param_groups[0].update(lr=0.0, shrink_ratio=0.0)
    expected = a.detach().float()
    optimizer.step()
    master = optimizer.state[a]["master"]
    assert torch.equal(master[0], kept[0]) and not torch.equal(kept[0], kept[0].to(BF16).float())
    assert torch.equal(master[1:], expected[1:]) and torch.equal(a, master.to(BF16))
    assert torch.equal(optimizer.state[b]["master"], kept_b)


def test_float64_parameters_keep_float64_moments():
    low = StableLoRAAdamW(make_pairs(dtype=FP64), moments_dtype=BF16, master_weights=True)
    plain = StableLoRAAdamW(make_pairs(dtype=FP64))
    take_step(0, low, plain)
    assert all_equal(snapshot(low), snapshot(plain))
