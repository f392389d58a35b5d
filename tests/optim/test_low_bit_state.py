"""Few bits: moments in 8 bits by blocks and in bfloat16, and float32 masters of low-precision parameters."""

from __future__ import annotations

import math

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import BLOCK, decode8, encode8, load_moment
from stablelora_kernels.reference import stochastic_round_ref
from stablelora_kernels.reference.optimizer import moment8_ref, moment_noise_ref
from tests.helpers.optimizers import DEVICE, SHAPES, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import take_step
from tests.optim.options import BF16, FP32, FP64

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

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


by_way = pytest.mark.parametrize("way", [by_torch, by_kernel], ids=["torch", "kernel"])


def random_words(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


@by_way
@pytest.mark.parametrize("signed", [True, False])
def test_the_format_is_the_references(way, signed: bool) -> None:
    x, noise = values(signed), random_words(SIZE)
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


@by_way
def test_every_code_means_what_it_is_made_of(way) -> None:
    for signed in (True, False):
        codes = torch.arange(256, dtype=torch.uint8)
        # A negative zero has no code of its own.
        x = decode8(codes, torch.ones(1), signed)
        assert x.max().item() == 1.875 and x.unique().numel() == (255 if signed else 256)
        again = way(x, torch.full((256,), -1, dtype=torch.int32), signed)
        assert torch.equal(again[2].cpu(), x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@by_way
def test_a_value_that_is_not_finite_shows(way, bad: float) -> None:
    x = values(True)
    x[BLOCK + 3] = bad
    out = way(x, torch.zeros(SIZE, dtype=torch.int32), True)[2]
    assert out[BLOCK : 2 * BLOCK].isnan().all() and out[:BLOCK].isfinite().all() and out[2 * BLOCK :].isfinite().all()


def test_two_bytes_an_element() -> None:
    optimizer = StableLoRAAdamW(make_pairs([(8, 512, 512)] * 3), moments_dtype=torch.uint8)
    take_step(0, optimizer)
    kept = [t for s in optimizer.state.values() for key, t in s.items() if key.startswith("exp")]
    elements = sum(p.numel() for p in halves(optimizer.pairs))
    assert sum(t.numel() * t.element_size() for t in kept) == elements * (2 + 8 / BLOCK)


# bfloat16 and masters


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


@pytest.mark.parametrize("moments", [BF16, torch.uint8])
def test_moments_decay_on_average(path: str, moments: torch.dtype) -> None:
    """beta2 = 0.999 changes a moment by less than half of a step of either format: rounded to nearest it would never decay."""
    (pair,) = make_pairs([(16, 16, 512)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, moments_dtype=moments, seed=2)
    take_step(0, optimizer)
    before = load_moment(optimizer.state[pair.A], "exp_avg_sq", FP32).double()
    for _ in range(60):
        take_step(0, optimizer, scale=0.0)
    mean, square = (load_moment(optimizer.state[pair.A], name, FP32).double() for name in ("exp_avg", "exp_avg_sq"))
    assert (square.sum() / before.sum()).item() == pytest.approx(0.999**60, rel=5e-3 if moments is BF16 else 0.01)
    # Rounded independently, each moment is as often up as down: the means of the others are right as well.
    assert mean.abs().max() < 0.9**60 * 32 * before.sqrt().max()


def test_float64_parameters_keep_float64_moments() -> None:
    low = StableLoRAAdamW(make_pairs(dtype=FP64), moments_dtype=BF16, master_weights=True)
    plain = StableLoRAAdamW(make_pairs(dtype=FP64))
    take_step(0, low, plain)
    assert all_equal(snapshot(low), snapshot(plain))


def test_both_backends_round_both_moments_by_the_references_noise() -> None:
    """Of moments that float32 holds exactly, so that only their rounding is left."""
    found = []
    for backend in ("torch", "triton"):
        pairs = make_pairs([(4, 8, 600)])
        optimizer = StableLoRAAdamW(pairs, lr=0.0, weight_decay=0.0, betas=(0.5, 0.5), moments_dtype=BF16, seed=7)
        generator = torch.Generator().manual_seed(3)
        for p in halves(pairs):
            p.grad = torch.randint(1, 2**11, p.shape, generator=generator).float().to(DEVICE)
        with use_backend(backend):
            optimizer.step()
        found.append([optimizer.state[p][name] for p in halves(pairs) for name in ("exp_avg", "exp_avg_sq")])
    assert all_equal(*found)
    exact = torch.cat([p.grad.flatten() for p in halves(pairs)]).double() / 2
    for which, value in enumerate((exact, 2 * exact.square())):
        rounded = torch.cat([moment.flatten() for moment in found[0][which::2]])
        for i in (*range(0, 2400, 37), 2399, 2400, 2431):
            assert rounded[i].item() == stochastic_round_ref(value[i].item(), BF16, moment_noise_ref(7, 1, i)[which])
