"""Few bits: float32 masters of low-precision parameters, bfloat16 moments, and what random rounding does to mean and variance."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.sharding import Shard
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import rounded_moments
from stablelora_kernels.optim.stochastic_rounding import seed_word
from stablelora_kernels.reference import StableAdamWRef, stochastic_round_ref
from stablelora_kernels.reference.optimizer import moment_noise_ref
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import DEVICE, SHAPES, all_equal, halves, in_float64, make_pairs, set_grads, snapshot
from tests.helpers.steps import latches, saved_and_loaded, take_step, take_step_with

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [torch.bfloat16, torch.float16]
BF16 = torch.bfloat16


# Masters


@pytest.mark.covering
@pytest.mark.parametrize("dtype", LOW)
def test_a_master_takes_the_steps_of_a_float64_run(path: str, dtype: torch.dtype) -> None:
    pairs = make_pairs(dtype=dtype)
    lone = torch.ones(7, device=DEVICE, requires_grad=True)
    params = [*halves(pairs), lone]
    oracle = StableAdamWRef(in_float64(pairs), [lone.detach().double()], lr=4e-2, shrink_ratio=5e-3)
    named = [*pairs, ("lone", lone)]
    optimizer = StableLoRAAdamW(named, lr=4e-2, shrink_ratio=5e-3, master_weights=True)
    for step in range(20):
        take_step_with(oracle, optimizer, step)
    assert latches(optimizer) == oracle.latched_at
    assert any(oracle.latched_at.values())
    for p, q in zip(params, oracle.params, strict=True):
        master = optimizer.state[p].get("master", p)
        assert (master is p) == (p is lone)
        torch.testing.assert_close(master.detach().double(), q, rtol=2e-5, atol=4e-6)
        # The shadow is its nearest rounding.
        assert torch.equal(p, master.to(p.dtype))


def test_a_master_and_its_shadow_are_one_launch() -> None:
    pytest.importorskip("triton")
    optimizer = StableLoRAAdamW(make_pairs(dtype=BF16), master_weights=True, moments_dtype=BF16)
    with use_backend("triton"):
        for step in range(2):
            take_step(step, optimizer)
        with count_launches() as made:
            take_step(2, optimizer)
    assert made == {"_stable_adamw_kernel": 1}


def test_a_parameter_that_someone_else_wrote_to_is_its_own_master(path: str) -> None:
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


def test_a_parameter_without_a_gradient_keeps_its_version(path: str) -> None:
    pairs = make_pairs(SHAPES[:2], dtype=BF16)
    optimizer = StableLoRAAdamW(pairs, master_weights=True)
    set_grads(halves(pairs)[:2], 0)
    version = pairs[1].A._version
    optimizer.step()
    assert pairs[1].A._version == version and pairs[0].A._version > 0


# Moments


def test_moments_are_rounded_by_the_references_noise() -> None:
    seed, step, base = 5, 3, 2**32 - 4
    values = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).t() for i in range(2)]
    kept = [torch.empty_like(v, dtype=BF16) for v in values]
    word = torch.tensor(seed_word(seed), dtype=torch.int32)
    entry = dict(zip(("exp_avg", "exp_avg_sq"), kept, strict=True))
    for old, new in rounded_moments(entry, values, Shard(base), torch.tensor(step, dtype=torch.int32), word):
        old.copy_(new)
    for which, (k, value) in enumerate(zip(kept, values, strict=True)):
        flat = value.t().flatten().tolist()
        noise = [moment_noise_ref(seed, step, (base + i) % 2**32)[which] for i in range(12)]
        expected = [stochastic_round_ref(x, BF16, w) for x, w in zip(flat, noise, strict=True)]
        assert k.t().flatten().tolist() == expected


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("master", [False, True])
def test_bfloat16_moments_follow_float32_ones(path: str, dtype: torch.dtype, master: bool) -> None:
    """Off by bfloat16's step of 2^-8 at most in each moment, at random: less in what they move the parameters by."""
    pairs, twins = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, moments_dtype=BF16, master_weights=master, seed=1)
    exact = StableLoRAAdamW(twins, lr=1e-2, master_weights=master, seed=1)
    start = [p.detach().double() for p in halves(pairs)]
    for step in range(20):
        take_step(step, optimizer, exact)
    for p, q, s in zip(halves(pairs), halves(twins), start, strict=True):
        assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {BF16}
        moved, error = (q.double() - s).norm().item(), (p.double() - q.double()).norm().item()
        rounding = 0.0 if dtype is torch.float32 or master else 2e-2 * p.double().norm().item()
        assert 0 < error < 0.01 * moved + rounding + (0.01 * p.double().norm().item() if dtype is BF16 else 0)


def test_bfloat16_moments_decay_on_average(path: str) -> None:
    """beta2 = 0.999 changes a moment by less than half of bfloat16's step: rounded to nearest it would never decay."""
    (pair,) = make_pairs([(16, 16, 512)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, moments_dtype=BF16, seed=2)
    take_step(0, optimizer)
    v = optimizer.state[pair.A]["exp_avg_sq"]
    before = v.double()
    for p in halves([pair]):
        p.grad.zero_()
    for _ in range(100):
        optimizer.step()
    ratio = v.double().sum() / before.sum()
    assert ratio.item() == pytest.approx(0.999**100, rel=5e-3)
    # Rounded independently, each moment is as often up as down: the means of the others are right as well.
    assert optimizer.state[pair.A]["exp_avg"].double().abs().max() < 1e-4 * before.sqrt().max() * 32


def test_float64_parameters_keep_float64_moments() -> None:
    pairs, twins = make_pairs(dtype=torch.float64), make_pairs(dtype=torch.float64)
    optimizers = StableLoRAAdamW(pairs, moments_dtype=BF16, master_weights=True), StableLoRAAdamW(twins)
    take_step(0, *optimizers)
    assert all_equal(snapshot(optimizers[0]), snapshot(optimizers[1]))


# Saving


@pytest.mark.covering
@pytest.mark.parametrize("moments", [torch.float32, BF16, torch.uint8])
@pytest.mark.parametrize("master", [False, True])
def test_resuming_is_bit_exact(path: str, moments: torch.dtype, master: bool) -> None:
    options = {"moments_dtype": moments, "master_weights": master}
    whole, cut = make_pairs(dtype=BF16), make_pairs(dtype=BF16)
    straight, optimizer = (StableLoRAAdamW(pairs, lr=4e-2, seed=5, **options) for pairs in (whole, cut))
    for step in range(9):
        take_step(step, straight, optimizer)
        if step == 4:
            state, values = saved_and_loaded([optimizer.state_dict(), [p.detach() for p in halves(cut)]])
            cut = make_pairs(dtype=BF16, seed=8)
            with torch.no_grad():
                for p, value in zip(halves(cut), values, strict=True):
                    p.copy_(value)
            optimizer = StableLoRAAdamW(cut, **options)
            optimizer.load_state_dict(state)
    assert all_equal(snapshot(straight), snapshot(optimizer))
    assert all_equal(snapshot(straight), snapshot(copy.deepcopy(optimizer)))


def test_a_state_is_converted_to_what_the_optimizer_keeps(path: str) -> None:
    pairs, twins = make_pairs(dtype=BF16), make_pairs(dtype=BF16)
    small = StableLoRAAdamW(pairs, moments_dtype=BF16, master_weights=True)
    plain = StableLoRAAdamW(twins)
    take_step(0, small, plain)
    states = copy.deepcopy((small.state_dict(), plain.state_dict()))
    plain.load_state_dict(states[0])
    small.load_state_dict(states[1])
    a, b = pairs[0].A, twins[0].A
    assert plain.state[b]["exp_avg"].dtype is torch.float32 and "master" not in plain.state[b]
    assert torch.equal(plain.state[b]["exp_avg"], states[0]["state"][0]["exp_avg"].float())
    assert small.state[a]["exp_avg"].dtype is BF16
    take_step(1, small, plain)
    assert small.state[a]["step"].item() == 2 and small.state[a]["master"].dtype is torch.float32


@pytest.mark.parametrize("moments", [BF16, torch.uint8])
def test_found_inf_touches_neither_masters_nor_moments(path: str, moments: torch.dtype) -> None:
    pairs = make_pairs(dtype=BF16)
    optimizer = StableLoRAAdamW(pairs, moments_dtype=moments, master_weights=True)
    take_step(0, optimizer)
    before = snapshot(optimizer)
    pairs[0].A.grad.fill_(math.inf)
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    optimizer.step()
    assert all_equal(before, snapshot(optimizer))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"master_weights": 1}, TypeError, "master_weights must be a bool, got 1 of type int"),
        (
            {"moments_dtype": torch.float16},
            ValueError,
            "moments_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks), got torch.float16",
        ),
        (
            {"moments_dtype": "bf16"},
            ValueError,
            "moments_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8 bits by blocks), got 'bf16'",
        ),
        (
            {"moments_dtype": BF16, "amsgrad": True},
            ValueError,
            "amsgrad=True needs moments_dtype=torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_bad_storage(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        StableLoRAAdamW(make_pairs(), **change)


def test_amsgrad_switched_on_later_is_refused_before_anything_changes(path: str) -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, moments_dtype=BF16)
    take_step(0, optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True needs"):
        optimizer.step()
    assert all_equal(before, snapshot(optimizer))


def test_both_backends_round_both_moments_by_the_same_noise() -> None:
    """Of moments that float32 holds exactly, so that only their rounding is left."""
    found = []
    for backend in ("torch", "triton"):
        pairs = make_pairs([(4, 8, 600)])
        options = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.5, 0.5), "moments_dtype": BF16, "seed": 7}
        optimizer = StableLoRAAdamW(pairs, **options)
        generator = torch.Generator().manual_seed(3)
        for p in halves(pairs):
            p.grad = torch.randint(1, 2**11, p.shape, generator=generator).float().to(DEVICE)
        with use_backend(backend):
            optimizer.step()
        found.append([optimizer.state[p][name] for p in halves(pairs) for name in ("exp_avg", "exp_avg_sq")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
