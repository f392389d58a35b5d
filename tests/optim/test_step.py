"""StableLoRAAdamW step by step: Algorithm 1 and AdamW, against the float64 reference and PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import DEVICE, halves, in_float64, make_pairs, set_grads
from tests.helpers.steps import assert_close_to, assert_no_worse_than_adamw, latches, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")


# Algorithm 1


@pytest.mark.covering(1)
@pytest.mark.parametrize("lr, ratio, steps", [(0.1, 5e-4, 15), (5e-2, 2e-3, 25), (1e-2, 5e-3, 60)])
def test_latch_steps_are_those_of_a_float64_run(backend: str, lr: float, ratio: float, steps: int) -> None:
    pairs = make_pairs()
    oracle = StableAdamWRef(in_float64(pairs), lr=lr, shrink_ratio=ratio)
    optimizer = StableLoRAAdamW(pairs, lr=lr, shrink_ratio=ratio)
    for step in range(steps):
        take_step_with(oracle, optimizer, step)
    assert_close_to(oracle, optimizer)
    report = optimizer.stability()
    assert all(s.latched == s.stable == (s.latched_at is not None) for s in report)
    assert sum(s.latched for s in report) > 1
    for pair, s in zip(pairs, report, strict=True):
        assert s.a_norm == pytest.approx(pair.A.norm().item() / pair.A.shape[1], rel=1e-5)
        assert s.b_norm == pytest.approx(pair.B.norm().item() / pair.B.shape[0], rel=1e-5)


def test_the_latch_holds_for_good(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        pair.B.fill_(100.0)
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    before = pair.A.detach().clone()
    take_step(0, optimizer)
    with torch.no_grad():
        pair.B.zero_()
    optimizer.step()
    assert torch.equal(pair.A, before)
    assert optimizer.stability()[0].latched_at == 1


def test_a_change_from_outside_is_noticed(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5)
    take_step(0, optimizer)
    assert optimizer.stability()[0].latched_at is None
    with torch.no_grad():
        pair.B.fill_(100.0)
    optimizer.step()
    assert optimizer.stability()[0].latched_at == 2


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_low_precision_shrinks_on_average(backend: str, dtype: torch.dtype, scale: float) -> None:
    # At 1e-4 of its size A is subnormal in float16.
    (pair,) = make_pairs([(8, 16, 512)], dtype)
    with torch.no_grad():
        pair.A.mul_(scale)
    optimizer = StableLoRAAdamW([pair], lr=1e-3, shrink_ratio=5e-4, weight_decay=0.0, seed=1)
    before = pair.A.detach().double().norm()
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    for _ in range(100):
        optimizer.step()
    ratio = (pair.A.detach().double().norm() / before).item()
    assert ratio == pytest.approx((1 - 5e-4) ** 100, rel=0.01)
    assert not optimizer.stability()[0].latched
    assert optimizer.state[pair.A]["exp_avg"].dtype is torch.float32


def test_pair_without_gradient_of_a_is_left_alone(backend: str) -> None:
    first, second = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([first, second], lr=1e-2, shrink_ratio=0.1)
    take_step(0, optimizer)
    first.A.grad = None
    twin = first.B.detach().clone().requires_grad_()
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=1e-2)
    adamw.state[twin] = {
        key: optimizer.state[first.B][key].clone().reshape(() if key == "step" else twin.shape)
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    adamw.state[twin]["step"] = adamw.state[twin]["step"].cpu()
    twin.grad = first.B.grad
    a = first.A.detach().clone()
    second_a = second.A.detach().clone()
    optimizer.step()
    adamw.step()
    assert torch.equal(first.A, a)
    assert optimizer.state[first.A]["step"].item() == 1
    assert optimizer.state[first.B]["step"].item() == 2
    assert not torch.equal(second.A, second_a)
    torch.testing.assert_close(first.B, twin, rtol=1e-6, atol=1e-8)
    # With its gradient back the pair goes on where it was.
    set_grads([first.A], 5)
    optimizer.step()
    assert optimizer.state[first.A]["step"].item() == 2


def test_an_a_without_a_gradient_does_not_latch(path: str) -> None:
    """B's norm is the larger from the start, so the pair latches in the first step in which A has a gradient."""
    (pair,) = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        pair.B.fill_(100.0)
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5)
    set_grads([pair.B], 0)
    for _ in range(2):
        optimizer.step()
        assert latches(optimizer) == {"layer0": None}
    take_step(1, optimizer)
    assert latches(optimizer) == {"layer0": 1}


def test_pair_whose_b_has_no_gradient_still_shrinks(backend: str) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    before = pair.A.detach().clone()
    set_grads([pair.A], 0)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(pair.A.detach(), before / 4, rtol=1e-6, atol=0)
    assert not pair.B.any()


def test_a_norm_that_is_not_finite_decides_nothing_and_is_reported(backend: str) -> None:
    good, bad = make_pairs([(4, 8, 8), (4, 8, 8)])
    optimizer = StableLoRAAdamW([good, bad], lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    with torch.no_grad():
        bad.B[0, 0] = math.nan
    before = bad.A.detach().clone()
    take_step(0, optimizer)
    assert torch.equal(bad.A, before)
    assert optimizer.state[bad.A]["latched_at"].item() == 0
    for sync in (optimizer.stability, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"pair 'layer1' holds values that are not finite.*\|\|B\|\|_F = nan"):
            sync()


# AdamW


@pytest.mark.parametrize("maximize", [False, True])
def test_without_shrink_it_is_adamw(backend: str, maximize: bool) -> None:
    lone = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
    hyper = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    optimizer = StableLoRAAdamW([*make_pairs(), ("head.weight", lone)], shrink_ratio=0.0, **hyper)
    assert_no_worse_than_adamw(optimizer, hyper, [1e-2] * 12)


def test_every_group_has_its_own_hyper_parameters(backend: str) -> None:
    pairs = make_pairs([(4, 8, 8), (4, 8, 8)])
    # As a trainer may: every A in one group, every B in another.
    groups = [
        {"params": [("x.lora_A", pairs[0].A), ("y.lora_A", pairs[1].A)], "shrink_ratio": 0.25, "weight_decay": 0.0},
        {"params": [("x.lora_B", pairs[0].B), ("y.lora_B", pairs[1].B)], "lr": 1e-2},
    ]
    optimizer = StableLoRAAdamW(groups, lr=0.0)
    before = [p.detach().clone() for p in halves(pairs)]
    take_step(0, optimizer)
    torch.testing.assert_close(pairs[0].A.detach(), before[0] * 0.75, rtol=1e-6, atol=0)
    # Adam's first step moves every element by lr against its gradient's sign.
    torch.testing.assert_close(pairs[1].B.detach(), -1e-2 * pairs[1].B.grad.sign(), rtol=1e-4, atol=0)
    assert [pair.name for pair in optimizer.pairs] == ["x", "y"]


def test_strided_and_expanded_gradients(backend: str) -> None:
    (pair,), (twin,) = make_pairs([(4, 8, 6)]), make_pairs([(4, 8, 6)])
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pair.A.grad, pair.B.grad = wide.t()[::2], torch.ones(1, 1, device=DEVICE).expand(8, 4)
    twin.A.grad, twin.B.grad = pair.A.grad.contiguous(), pair.B.grad.contiguous()
    optimizers = StableLoRAAdamW([pair], lr=1e-2), StableLoRAAdamW([twin], lr=1e-2)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(pair.A, twin.A) and torch.equal(pair.B, twin.B)


def test_a_dense_transposed_parameter_and_an_empty_one(backend: str) -> None:
    pairs, twins = make_pairs([(4, 8, 6)]), make_pairs([(4, 8, 6)])
    lone = torch.arange(12.0, device=DEVICE).view(3, 4).t().requires_grad_()
    same = lone.detach().contiguous().requires_grad_()
    empty, void = (torch.zeros(0, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    optimizers = (
        StableLoRAAdamW([*pairs, ("lone", lone), ("empty", empty)], lr=1e-2),
        StableLoRAAdamW([*twins, ("lone", same), ("empty", void)], lr=1e-2),
    )
    take_step(0, *optimizers)
    torch.testing.assert_close(lone.detach(), same.detach(), rtol=0, atol=0)
    assert optimizers[0].state[empty]["step"].item() == 1


def test_equal_norms_latch(path: str) -> None:
    pairs = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        pairs[0].A.zero_()
    optimizer = StableLoRAAdamW(pairs, lr=0.0, shrink_ratio=0.5)
    take_step(0, optimizer)
    assert optimizer.stability()[0].latched_at == 1


def test_a_b_without_a_gradient_keeps_its_norm(path: str) -> None:
    pairs = make_pairs([(4, 8, 8)])
    with torch.no_grad():
        pairs[0].A.fill_(1.0)
        pairs[0].B.fill_(0.999)
    optimizer = StableLoRAAdamW(pairs, lr=0.0, shrink_ratio=0.5, weight_decay=0.0)
    for step in range(3):
        set_grads([pairs[0].A], step)
        optimizer.step()
    # One shrink, then A is smaller than B.
    assert optimizer.stability()[0].latched_at == 2


@pytest.mark.parametrize("lr", [0.0, 1e-310, 1e-13])
def test_a_shrinks_at_any_rate(path: str, lr: float) -> None:
    (pair,) = make_pairs([(4, 8, 8)])
    before = pair.A.detach().clone()
    take_step(0, StableLoRAAdamW([pair], lr=lr, shrink_ratio=0.5))
    torch.testing.assert_close(pair.A.detach(), before / 2, rtol=1e-6, atol=1e-12)
