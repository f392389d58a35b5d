"""Moments in 8 bits by blocks: the format against its reference, both backends, accuracy, memory, saving."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import BLOCK, decode8, encode8
from stablelora_kernels.reference import StableAdamWRef
from stablelora_kernels.reference.optimizer import moment8_ref
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import DEVICE, halves, in_float64, make_pairs, snapshot
from tests.helpers.steps import take_step, take_step_with

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from stablelora_kernels.dispatch.settings import use_backend  # noqa: E402
from stablelora_kernels.kernels.stable_adamw.moments_8bit import load8, store8  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# Three blocks, the last of which is not full, and of very different sizes.
SIZE = 2 * BLOCK + 77


@triton.jit
def _round_trip_kernel(
    x_ptr, noise_ptr, codes_ptr, scales_ptr, out_ptr, n, table_ptr, SIGNED: tl.constexpr, CHUNK: tl.constexpr
):
    offsets = tl.arange(0, CHUNK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
    codes, scales = tl.load(table_ptr), tl.load(table_ptr + 1)
    left = tl.load(table_ptr + 2)
    store8(x, noise, codes, scales, left * 0, left, offsets, mask, SIGNED, False, CHUNK)
    tl.debug_barrier()
    tl.store(out_ptr + offsets, load8(codes, scales, left * 0, left, offsets, mask, SIGNED, False, CHUNK), mask=mask)


def by_kernel(x: torch.Tensor, noise: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, noise = x.to(DEVICE), noise.to(DEVICE)
    codes = torch.full((x.numel(),), 255, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((-(-x.numel() // BLOCK),), math.nan, device=DEVICE)
    out = torch.empty_like(x)
    table = torch.tensor([codes.data_ptr(), scales.data_ptr(), x.numel()], device=DEVICE)
    _round_trip_kernel[(1,)](x, noise, codes, scales, out, x.numel(), table, SIGNED=signed, CHUNK=1024)
    return codes, scales, out


def by_torch(x: torch.Tensor, noise: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = encode8(x, noise, signed)
    return codes, scales, decode8(codes, scales, signed)


def values(signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    # Over 12 orders of magnitude within a block, and of more between blocks.
    x = torch.randn(SIZE, generator=generator) * 10 ** (-12 * torch.rand(SIZE, generator=generator))
    x[BLOCK : 2 * BLOCK] *= 1e-9
    x[:3] = torch.tensor([0.0, 2.0**-40, -(2.0**-40)])
    return x if signed else x.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("way", [by_torch, by_kernel], ids=["torch", "kernel"])
def test_the_format_is_the_references(way, signed: bool) -> None:
    x = values(signed)
    noise = torch.randint(-(2**31), 2**31, (SIZE,), generator=torch.Generator().manual_seed(5)).to(torch.int32)
    _, scales, out = way(x, noise, signed)
    off = 0
    for block in range(3):
        part = slice(block * BLOCK, min((block + 1) * BLOCK, SIZE))
        expected, scale = moment8_ref(x[part].tolist(), [w & 0xFFFFFFFF for w in noise[part].tolist()], signed)
        assert scales[block].item() == pytest.approx(scale, rel=1e-6)
        got = out[part].double().cpu()
        # x / scale is rounded to float32 where the reference is exact: a draw may fall on the other side, seldom.
        off += int(((got - torch.tensor(expected, dtype=torch.float64)).abs() > 2e-6 * got.abs()).sum())
    assert off <= 2


@pytest.mark.parametrize("signed", [True, False])
def test_both_ways_make_the_same_codes(signed: bool) -> None:
    x, noise = values(signed), torch.randint(-(2**31), 2**31, (SIZE,), generator=torch.Generator().manual_seed(6)).int()
    results = [way(x, noise, signed) for way in (by_torch, by_kernel)]
    assert (results[0][0].cpu() != results[1][0].cpu()).sum() <= 2
    torch.testing.assert_close(results[0][1].cpu(), results[1][1].cpu(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", [by_torch, by_kernel], ids=["torch", "kernel"])
def test_every_code_means_what_it_is_made_of(way) -> None:
    for signed in (True, False):
        codes = torch.arange(256, dtype=torch.uint8)
        # A negative zero has no code of its own.
        x = decode8(codes, torch.ones(1), signed)
        assert x.max().item() == 1.875 and x.unique().numel() == (255 if signed else 256)
        again = way(x, torch.full((256,), -1, dtype=torch.int32), signed)
        assert torch.equal(again[2].cpu(), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("way", [by_torch, by_kernel], ids=["torch", "kernel"])
def test_a_value_that_is_not_finite_shows(way, bad: float) -> None:
    x = values(True)
    x[BLOCK + 3] = bad
    out = way(x, torch.zeros(SIZE, dtype=torch.int32), True)[2]
    assert out[BLOCK : 2 * BLOCK].isnan().all() and out[:BLOCK].isfinite().all() and out[2 * BLOCK :].isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_right_in_mean_and_variance(signed: bool) -> None:
    count = BLOCK * 400
    generator = torch.Generator().manual_seed(7)
    for value in (0.33, 0.0101, 3e-5):
        # Each block's largest value is 1.
        x = torch.full((count,), value)
        x[::BLOCK] = 1.0
        noise = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
        out = by_torch(x, noise, signed)[2].double()
        rest = out[torch.arange(count) % BLOCK != 0]
        low, high = rest.min().item(), rest.max().item()
        fraction = (x[1].item() - low) / (high - low)
        assert rest.unique().numel() == 2 and 0 < fraction < 1
        assert abs(rest.mean().item() - x[1].item()) < 5 * (high - low) / 2 / count**0.5
        assert rest.var().item() == pytest.approx(fraction * (1 - fraction) * (high - low) ** 2, rel=0.03)


def test_8_bits_follow_a_float64_run(path: str) -> None:
    pairs = make_pairs([(8, 24, 40), (3, 31, 5), (20, 60, 64)])
    oracle = StableAdamWRef(in_float64(pairs), lr=1e-2, shrink_ratio=5e-3)
    optimizer = StableLoRAAdamW(pairs, lr=1e-2, shrink_ratio=5e-3, moments_dtype=torch.uint8, seed=3)
    start = [q.clone() for q in halves(oracle.pairs)]
    for step in range(25):
        take_step_with(oracle, optimizer, step)
    for p, q, s in zip(halves(pairs), halves(oracle.pairs), start, strict=True):
        assert optimizer.state[p]["exp_avg"].dtype is torch.uint8
        error, moved = (p.detach().double() - q).norm().item(), (q - s).norm().item()
        # Each rounding moves a second moment by an eighth at most, seldom: a walk of about a hundredth a step, so of 0.06 in
        # 25 steps, half of which is in its root; the first moment adds as much.
        assert 0 < error < 0.1 * moved, f"off by {error}, moved by {moved}"


def test_8_bits_decay_on_average(path: str) -> None:
    """beta2 = 0.999 changes a moment by a hundredth of a step: rounded to nearest it would never decay."""
    (pair,) = make_pairs([(16, 16, 512)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, moments_dtype=torch.uint8, seed=2)
    take_step(0, optimizer)
    state = optimizer.state[pair.A]

    def total() -> float:
        return decode8(state["exp_avg_sq"], state["exp_avg_sq_scale"], False).double().sum().item()

    before = total()
    for p in halves([pair]):
        p.grad.zero_()
    for _ in range(60):
        optimizer.step()
    assert total() / before == pytest.approx(0.999**60, rel=0.01)


def test_one_launch_and_two_bytes_an_element() -> None:
    pairs = make_pairs([(8, 512, 512)] * 3)
    optimizer = StableLoRAAdamW(pairs, moments_dtype=torch.uint8)
    with use_backend("triton"):
        take_step(0, optimizer)
        with count_launches() as made:
            take_step(1, optimizer)
    assert made == {"_stable_adamw_kernel": 1}
    elements = sum(p.numel() for p in halves(pairs))
    kept = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for key, t in s.items() if key.startswith("exp")
    )
    assert kept == elements * (2 + 8 / BLOCK)


@pytest.mark.parametrize("way", ["to 8 bits", "from 8 bits"])
def test_states_are_converted(path: str, way: str) -> None:
    pairs, twins = make_pairs(), make_pairs()
    optimizer, small = StableLoRAAdamW(pairs), StableLoRAAdamW(twins, moments_dtype=torch.uint8)
    take_step(0, optimizer, small)
    source, target = (optimizer, small) if way == "to 8 bits" else (small, optimizer)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for p, q in zip(halves(pairs), halves(twins), strict=True):
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            decoded = decode8(small.state[q][key], small.state[q][f"{key}_scale"], signed)
            # A step of the last fraction bit, rounded to nearest: half of an eighth.
            close = 1 / 16 if way == "to 8 bits" else 0.0
            error = (optimizer.state[p][key] - decoded).abs()
            assert (error <= close * decoded.abs() + 2e-5 * decoded.abs().max() * (close > 0)).all()
    take_step(1, target)
    assert all(state["step"].item() == 2 for state in target.state.values())


def test_codes_without_scales_change_nothing() -> None:
    pairs = make_pairs()
    optimizer = StableLoRAAdamW(pairs, moments_dtype=torch.uint8)
    take_step(0, optimizer)
    before = snapshot(optimizer)
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match=re.escape("'exp_avg' is in 8 bits, so 'exp_avg_scale' must be [2]")):
        optimizer.load_state_dict(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer), strict=True))
