"""The optimizer's step below its interface: the kernel's tables and chunks, and random rounding."""

from __future__ import annotations

import math

import pytest
import torch

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim import rounding
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef, stochastic_round_ref
from stablelora_kernels.reference.optimizer import mix32, rounding_key_ref, rounding_noise_ref
from tests.helpers.optimizers import DEVICE, make_pairs, set_grads
from tests.helpers.processes import printed
from tests.helpers.steps import latches, take_step

triton = pytest.importorskip(
    "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
)
import triton.language as tl  # noqa: E402

from stablelora_kernels.kernels.stable_adamw import tables  # noqa: E402
from stablelora_kernels.kernels.stable_adamw.elementwise import stochastic_round  # noqa: E402
from stablelora_kernels.optim.triton_step import TritonStep  # noqa: E402

LOW = [torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / 4).to(DEVICE, dtype).requires_grad_()


def mixed_parameters() -> list[tuple[str, torch.Tensor]]:
    """Pairs and lone parameters of every dtype, in sizes that fit no chunk, some at addresses that
    are not aligned.
    """
    shapes = {"f": (8, 32, 48), "g": (3, 31, 45), "h": (1, 7, 129), "i": (20, 17, 9)}
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    named = []
    for i, ((name, (r, m, n)), dtype) in enumerate(zip(shapes.items(), dtypes, strict=True)):
        parts = {"lora_A": (r, n), "lora_B": (m, r), "bias": (m,)}
        named += [
            (f"{name}.{part}", make(*p, dtype=dtype, seed=9 * i + len(part)))
            for part, p in parts.items()
        ]
    storage = make(40, seed=30).detach()
    return [
        *named,
        ("odd", storage[1:38].requires_grad_()),
        ("empty", make(0, 4)),
        ("scalar", make(seed=31)),
    ]


# Random rounding


def random_words(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def awkward_values(dtype: torch.dtype) -> torch.Tensor:
    """float32 values around every power of two down to float16's smallest subnormal and below, the
    special ones, and those of these that ``dtype`` has.
    """
    powers = 2.0 ** torch.arange(-40, 16)
    noise = 1 + torch.rand(powers.numel(), 4, generator=torch.Generator().manual_seed(1))
    values = torch.cat(
        [
            powers,
            (powers[:, None] * noise).flatten(),
            torch.tensor([0.0, 1e-30, 2.0**-14, 3e-5, 65504.0]),
        ]
    )
    values = torch.cat([values, -values])
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    return torch.cat([values, values.to(dtype).float(), torch.tensor([math.inf, -math.inf]), nan])


@triton.jit
def _round_kernel(x_ptr, noise_ptr, out_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
    tl.store(
        out_ptr + offsets, stochastic_round(x, noise, KIND).to(out_ptr.dtype.element_ty), mask=mask
    )


def kernel_round(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    block = triton.next_power_of_2(x.numel())
    _round_kernel[(1,)](
        x.to(DEVICE), noise.to(DEVICE), out, x.numel(), KIND=tables.KINDS.index(dtype), BLOCK=block
    )
    return out.cpu()


by_way = pytest.mark.parametrize(
    "rounded", [rounding.stochastic_round, kernel_round], ids=["torch", "kernel"]
)
by_dtype = pytest.mark.parametrize("dtype", LOW)


@by_dtype
@by_way
def test_rounding_is_the_reference_to_the_bit(dtype: torch.dtype, rounded) -> None:
    x = awkward_values(dtype)
    for noise in (random_words(x.numel()), torch.full((x.numel(),), -1, dtype=torch.int32)):
        expected = [
            stochastic_round_ref(v, dtype, w & 0xFFFFFFFF)
            for v, w in zip(x.tolist(), noise.tolist(), strict=True)
        ]
        got = rounded(x, dtype, noise).double()
        torch.testing.assert_close(
            got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
        )
        # Not of the NaN, which is the last.
        assert torch.equal(got.signbit()[:-1], x.signbit()[:-1])


def test_noise_is_uniform_and_new_at_every_step() -> None:
    seeds = torch.tensor([rounding.seed_word(3)], dtype=torch.int32)
    index = torch.arange(65536, dtype=torch.int32)
    streams = []
    for step in (1, 2):
        key = rounding.mix_(torch.tensor([step], dtype=torch.int32) + seeds)
        assert key.item() & 0xFFFFFFFF == rounding_key_ref(3, step)
        noise = rounding.mix_(index ^ key)
        assert [w & 0xFFFFFFFF for w in noise[:50].tolist()] == [
            rounding_noise_ref(3, step, i) for i in range(50)
        ]
        streams.append((noise & 0xFFFF).double() / 65536 - 0.5)
    deviation = (1 / 12 / index.numel()) ** 0.5
    for stream in streams:
        assert abs(stream.mean()) < 5 * deviation
        for lag in (1, 2, 8, 64):
            assert (
                abs((stream[lag:] * stream[:-lag]).mean()) * 12 < 5 / (index.numel() - lag) ** 0.5
            )
    assert abs((streams[0] * streams[1]).mean()) * 12 < 5 / index.numel() ** 0.5
    assert len({rounding_key_ref(seed, 1) for seed in (0, 1, 2**32, 2**33, 2**63 - 1)}) == 5
    assert mix32(2**32 + 5) == mix32(5) != mix32(6)


# The step


WAYS = [("torch", 4096), ("triton", 64), ("triton", 4096)]


@pytest.mark.parametrize(("backend", "chunk"), WAYS, indirect=["backend"])
def test_mixed_parameters_in_one_optimizer(
    backend: str, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(TritonStep, "CHUNK", chunk)
    named = mixed_parameters()
    params = [p for _, p in named]
    exact = {name: p.detach().to(torch.float64, copy=True) for name, p in named}
    pairs = [LoRAPair(name, exact[f"{name}.lora_A"], exact[f"{name}.lora_B"]) for name in "fghi"]
    lone = [value for name, value in exact.items() if "lora" not in name]
    oracle = StableAdamWRef(pairs, lone, lr=1e-2, shrink_ratio=0.01, weight_decay=0.1)
    optimizer = StableLoRAAdamW(named, lr=1e-2, shrink_ratio=0.01, weight_decay=0.1, seed=1)
    start = {name: value.clone() for name, value in exact.items()}
    for step in range(3):
        set_grads(params, step, scale=0.25)
        oracle.step({exact[name]: p.grad.double() for name, p in named})
        optimizer.step()
    for name, p in named:
        got, ref = p.detach().double(), exact[name]
        eps = torch.finfo(p.dtype).eps
        # A rounding at random is off by less than one unit in the last place, a step.
        bound = 2e-6 if p.dtype is torch.float32 else 3.5 * eps * max(1.0, ref.abs().max().item())
        assert got.numel() == 0 or (got - ref).abs().max().item() <= bound, name
        assert got.numel() == 0 or not torch.equal(ref, start[name])
        assert optimizer.state[p]["step"].item() == 3
    assert latches(optimizer) == oracle.latched_at
    assert None in oracle.latched_at.values() and 1 in oracle.latched_at.values()


def test_16_bytes_are_read_at_a_time_of_aligned_tensors_alone() -> None:
    """A GPU faults at other addresses, the interpreter does not: so what the step tells the kernel
    of each tensor.
    """
    optimizer = StableLoRAAdamW(mixed_parameters(), lr=1e-2)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_grads(params, 0)
    first = params[0]
    memory = torch.zeros(first.numel() + 1, dtype=first.dtype, device=DEVICE)
    for is_aligned in (True, False):
        if not is_aligned:
            first.grad = memory[1:].view_as(first)
        with settings(backend="triton"):
            optimizer.step()
        (engine,) = optimizer._steps.engines
        variants = dict(zip(engine.params, engine.memory.addresses[:, 1].tolist(), strict=True))
        assert variants[first] & 1 == is_aligned
        for p, variant in variants.items():
            fits = p.numel() % 16 == 0 and p.data_ptr() % 16 == 0 and p.grad.data_ptr() % 16 == 0
            assert variant & 1 == fits, p.shape


@by_dtype
def test_both_backends_round_with_the_same_noise(dtype: torch.dtype) -> None:
    """After powers of two and no Adam step both round the same float32 values."""
    results = []
    for backend in ("torch", "triton"):
        optimizer = StableLoRAAdamW(
            make_pairs([(4, 9, 600)], dtype), lr=0.5, weight_decay=2.0**-8, shrink_ratio=0.0, seed=7
        )
        with settings(backend=backend):
            for _ in range(3):
                take_step(0, optimizer, scale=0.0)
        results.append(optimizer.pairs[0].A.detach())
    assert torch.equal(*results) and not torch.equal(
        results[0], make_pairs([(4, 9, 600)], dtype)[0].A
    )


def test_the_optimizer_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
import stablelora_kernels.optim as optim
A, B = torch.ones(2, 4, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
optimizer = optim.StableLoRAAdamW([("q.lora_A", A), ("q.lora_B", B)], lr=0.0, shrink_ratio=0.5)
A.grad = torch.ones_like(A)
optimizer.step()
assert A.eq(0.5).all(), A
print("done")
"""
    assert printed(code) == "done"
