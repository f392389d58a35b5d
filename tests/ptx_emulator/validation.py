"""The emulator against kernels of its own, whose results are known."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablelora_kernels.launch.base import Launch
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.memory import EmulationError, Faults
from tests.ptx_emulator.runner import run

# A name, the error over its bound, what was found, and whether something must be found.
Result = tuple[str, float, Faults, bool]


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + at, mask=at < n, other=-float("inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * stride + at, x / tl.sum(x, 0), mask=at < n)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, sam, sak, sbk, sbn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        a = tl.load(
            a_ptr + m[:, None] * sam + k[None, :] * sak,
            mask=(m[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        b = tl.load(
            b_ptr + k[:, None] * sbk + n[None, :] * sbn,
            mask=(k[:, None] < K) & (n[None, :] < N),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    c_ptrs = c_ptr + m[:, None] * N + n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _chain_kernel(x_ptr, s_ptr, flag_ptr, out_ptr, N: tl.constexpr, RELEASE: tl.constexpr):
    """All programs wait for the last one's row."""
    at = tl.arange(0, N)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(s_ptr + at, 2 * tl.load(x_ptr + at))
        tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem=RELEASE, scope="gpu")
    else:
        while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") < 1:
            pass
        tl.debug_barrier()
        tl.store(out_ptr + tl.program_id(0) * N + at, tl.load(s_ptr + at) + 1)


@triton.jit
def _count_kernel(counter_ptr, SCOPE: tl.constexpr):
    tl.atomic_add(counter_ptr, 1, sem="relaxed", scope=SCOPE)


@triton.jit
def _casts_kernel(x_ptr, bf_ptr, h_ptr, i_ptr, e_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(bf_ptr + at, x.to(tl.bfloat16), mask=at < n)
    tl.store(h_ptr + at, x.to(tl.float16), mask=at < n)
    tl.store(i_ptr + at, (x * 100).to(tl.int32) // 7 + (x * 100).to(tl.int32) % 5, mask=at < n)
    tl.store(e_ptr + at, tl.exp(x) + tl.sqrt(tl.abs(x)) + tl.floor(x), mask=at < n)


def relative_error(found: Tensor, right: Tensor) -> float:
    found, right = found.double(), right.double()
    return ((found - right).abs().max() / right.abs().max().clamp(min=1e-30)).item()


def _launch(kernel, grid, args, constants, **options) -> Launch:
    return Launch(kernel, "", "", grid, args, constants, options)


def results(arch: str) -> Iterator[Result]:
    """Each kernel's result on ``arch``."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(arch)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, out = randn(5, 500), torch.full((5, 500), torch.nan)
    faults = run(
        _launch(_softmax_kernel, (5,), (x, out, 500, 500), {"BLOCK": 512}, num_warps=4), schedule
    )
    yield "softmax", relative_error(out, x.double().softmax(1)) / 1e-5, faults, False
    x = 3 * randn(300)
    bf, h, i, e = (
        torch.empty(300, dtype=d)
        for d in (torch.bfloat16, torch.float16, torch.int32, torch.float32)
    )
    faults = run(_launch(_casts_kernel, (1,), (x, bf, h, i, e, 300), {"BLOCK": 512}), schedule)
    scaled = (x * 100).to(torch.int32)
    scaled = torch.div(scaled, 7, rounding_mode="trunc") + torch.fmod(scaled, 5)
    right = (
        relative_error(bf, x.bfloat16()) + relative_error(h, x.half()) + relative_error(i, scaled)
    )
    yield "casts", right / 1e-9, faults, False
    xd = x.double()
    yield (
        "functions",
        relative_error(e, xd.exp() + xd.abs().sqrt() + xd.floor()) / 1e-6,
        faults,
        False,
    )
    for sem in ("release", "relaxed"):
        x = randn(128)
        s = torch.empty(128)
        flag = torch.zeros(1, dtype=torch.int32)
        out = torch.empty(3, 128)
        faults = run(
            _launch(_chain_kernel, (4,), (x, s, flag, out), {"N": 128, "RELEASE": sem}), schedule
        )
        yield (
            f"chain, {sem}",
            relative_error(out, (2 * x + 1).expand(3, 128)) / 1e-6,
            faults,
            sem == "relaxed",
        )
    for scope in ("gpu", "cta"):
        counter = torch.zeros(1, dtype=torch.int32)
        faults = run(_launch(_count_kernel, (4,), (counter,), {"SCOPE": scope}), schedule)
        yield f"count, {scope}", float(counter.item() != 4), faults, scope == "cta"
    for dtype, precision, limit in (
        (torch.bfloat16, "ieee", 8e-3), (torch.float16, "ieee", 1e-3), (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32", 2e-3),
    ):  # fmt: skip
        for (m, n, k), (bm, bn, bk), warps, transposed in (
            ((70, 50, 130), (64, 64, 32), 4, True), ((128, 128, 128), (128, 128, 64), 8, False),
        ):  # fmt: skip
            if (dtype, precision, m) == (torch.float32, "ieee", 128):
                continue  # No matrix instructions, so 10 s to compile.
            a, b = randn(m, k).to(dtype), randn(k, n).to(dtype)
            b = b.t().contiguous().t() if transposed else b
            constants = {"BM": bm, "BN": bn, "BK": bk, "PRECISION": precision, "STAGES": 3}
            for landing in ("late", "early"):
                c = torch.full((m, n), torch.nan, dtype=dtype)
                args = (a, b, c, m, n, k, *a.stride(), *b.stride())
                grid = (-(-m // bm), -(-n // bn))
                launch = _launch(
                    _matmul_kernel, grid, args, constants, num_warps=warps, num_stages=3
                )
                faults = run(launch, schedule._replace(landing=landing))
                error = relative_error(c, a.double() @ b.double()) / limit
                yield (
                    f"matmul {str(dtype)[6:]} {precision} {m}x{n}x{k}, {landing}",
                    error,
                    faults,
                    False,
                )


def stuck(arch: str) -> str:
    """What is said of two programs that wait for the last one, which cannot begin before they have
    ended.
    """
    x = torch.ones(128)
    s = torch.empty(128)
    flag = torch.zeros(1, dtype=torch.int32)
    out = torch.empty(3, 128)
    launch = _launch(_chain_kernel, (4,), (x, s, flag, out), {"N": 128, "RELEASE": "release"})
    try:
        run(launch, Schedule(arch, resident=2))
    except EmulationError as error:
        return str(error)
    return ""


def main(arch: str) -> None:
    """Raise AssertionError if a result is wrong, if something is found that is no fault, or if a
    planted fault is not found.
    """
    said = stuck(arch)
    assert (
        said.startswith("deadlock, 2 CTAs have not begun: CTA ")
        and said.count("_chain_kernel: runs at") == 2
    ), said
    for name, share, faults, must_find in results(arch):
        assert share <= 1, f"{arch} {name}: {share:.2f} of the bound"
        assert bool(faults.found) == must_find, (
            f"{arch} {name}: {faults.lines() or 'nothing was found'}"
        )
