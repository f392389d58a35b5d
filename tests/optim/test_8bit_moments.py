"""Moments in 8 bits by blocks: the format against its reference in both backends, and its memory."""

from __future__ import annotations

import math

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import BLOCK, decode8, encode8
from stablelora_kernels.reference.optimizer import moment8_ref
from tests.helpers.optimizers import DEVICE, halves, make_pairs
from tests.helpers.steps import take_step

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
