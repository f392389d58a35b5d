"""The optimizer's step below its interface: the kernel's tables and chunks, random rounding, launches, machine code."""

from __future__ import annotations

import json
import math

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim import stochastic_rounding as rounding
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.reference import StableAdamWRef, stochastic_round_ref
from stablelora_kernels.reference.optimizer import mix32, rounding_key_ref, rounding_noise_ref
from tests.helpers.launches import count_launches
from tests.helpers.processes import printed
from tests.helpers.steps import decide_on_device, latches

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from stablelora_kernels.kernels.stable_adamw import tables  # noqa: E402
from stablelora_kernels.kernels.stable_adamw.elementwise import stochastic_round  # noqa: E402
from stablelora_kernels.launch.stable_adamw import plan_square_sums  # noqa: E402
from stablelora_kernels.optim.triton_engine import TritonStep  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) / 4).to(DEVICE, dtype).requires_grad_()


def mixed_parameters() -> list[tuple[str, torch.Tensor]]:
    """Pairs and lone parameters of every dtype, in sizes that fit no chunk, some at addresses that are not aligned."""
    shapes = {"f": (8, 32, 48), "g": (3, 31, 45), "h": (1, 7, 129), "i": (20, 17, 9)}
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    named = []
    for i, ((name, (r, m, n)), dtype) in enumerate(zip(shapes.items(), dtypes, strict=True)):
        named += [
            (f"{name}.lora_A", make(r, n, dtype=dtype, seed=i)),
            (f"{name}.lora_B", make(m, r, dtype=dtype, seed=9 + i)),
        ]
        named.append((f"{name}.bias", make(m, dtype=dtype, seed=20 + i)))
    storage = make(40, seed=30).detach()
    return [*named, ("odd", storage[1:38].requires_grad_()), ("empty", make(0, 4)), ("scalar", make(seed=31))]


def set_grads(params: list[torch.Tensor], seed: int) -> None:
    for i, p in enumerate(params):
        p.grad = make(*p.shape, dtype=p.dtype, seed=1000 * seed + i).detach()


# Random rounding


def random_words(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)


def awkward_values() -> torch.Tensor:
    """float32 values around every power of two down to float16's smallest subnormal and below, and the special ones."""
    powers = 2.0 ** torch.arange(-40, 16)
    noise = 1 + torch.rand(powers.numel(), 4, generator=torch.Generator().manual_seed(1))
    values = torch.cat(
        [powers, (powers[:, None] * noise).flatten(), torch.tensor([0.0, 1e-30, 2.0**-14, 3e-5, 65504.0])]
    )
    return torch.cat([values, -values])


@triton.jit
def _round_kernel(x_ptr, noise_ptr, out_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + offsets, mask=mask, other=0).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + offsets, stochastic_round(x, noise, KIND).to(out_ptr.dtype.element_ty), mask=mask)


def kernel_round(x: torch.Tensor, dtype: torch.dtype, noise: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    block = triton.next_power_of_2(x.numel())
    _round_kernel[(1,)](x.to(DEVICE), noise.to(DEVICE), out, x.numel(), KIND=tables.KINDS.index(dtype), BLOCK=block)
    return out.cpu()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rounded", [rounding.stochastic_round, kernel_round], ids=["torch", "kernel"])
def test_rounding_is_the_reference_to_the_bit(dtype: torch.dtype, rounded) -> None:
    x = awkward_values()
    for seed, noise in enumerate([random_words(x.numel()), torch.zeros(x.numel(), dtype=torch.int32)]):
        noise = noise if seed == 0 else noise - seed
        expected = [
            stochastic_round_ref(v, dtype, w & 0xFFFFFFFF) for v, w in zip(x.tolist(), noise.tolist(), strict=True)
        ]
        got = rounded(x, dtype, noise).double()
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)
        assert torch.equal(got.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rounded", [rounding.stochastic_round, kernel_round], ids=["torch", "kernel"])
def test_rounding_keeps_what_is_representable_and_what_is_not_finite(dtype: torch.dtype, rounded) -> None:
    values = awkward_values().to(dtype).float()
    x = torch.cat([values[values.isfinite()], torch.tensor([math.inf, -math.inf])])
    assert torch.equal(rounded(x, dtype, random_words(x.numel())), x.to(dtype))
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert rounded(nan, dtype, torch.tensor([-1], dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("rounded_by", [rounding.stochastic_round, kernel_round], ids=["torch", "kernel"])
def test_rounding_is_right_in_mean_and_variance(dtype: torch.dtype, rounded_by) -> None:
    for value in (1.001, -0.3333, 7.7e-6):
        x = torch.full((200_000,), value)
        rounded = rounded_by(x, dtype, random_words(x.numel())).double()
        low, high = rounded.min().item(), rounded.max().item()
        assert low < value < high
        # Five standard deviations of the mean of that many choices between the two.
        assert abs(rounded.mean().item() - x[0].item()) < 5 * (high - low) / 2 / x.numel() ** 0.5
        # Of two values, the upper with the probability f that makes the mean right: f (1 - f) of their distance squared.
        fraction = (x[0].item() - low) / (high - low)
        variance = fraction * (1 - fraction) * (high - low) ** 2
        assert rounded.unique().numel() == 2
        assert rounded.var(correction=0).item() == pytest.approx(variance, rel=0.02)


def test_noise_is_uniform_and_new_at_every_step() -> None:
    seeds = torch.tensor([rounding.seed_word(3)], dtype=torch.int32)
    index = torch.arange(65536, dtype=torch.int32)
    streams = []
    for step in (1, 2):
        key = rounding.mix_(torch.tensor([step], dtype=torch.int32) + seeds)
        assert key.item() & 0xFFFFFFFF == rounding_key_ref(3, step)
        noise = rounding.mix_(index ^ key)
        assert [w & 0xFFFFFFFF for w in noise[:50].tolist()] == [rounding_noise_ref(3, step, i) for i in range(50)]
        streams.append((noise & 0xFFFF).double() / 65536 - 0.5)
    deviation = (1 / 12 / index.numel()) ** 0.5
    for stream in streams:
        assert abs(stream.mean()) < 5 * deviation
        for lag in (1, 2, 8, 64):
            assert abs((stream[lag:] * stream[:-lag]).mean()) * 12 < 5 / (index.numel() - lag) ** 0.5
    assert abs((streams[0] * streams[1]).mean()) * 12 < 5 / index.numel() ** 0.5
    assert len({rounding_key_ref(seed, 1) for seed in (0, 1, 2**32, 2**33, 2**63 - 1)}) == 5
    assert mix32(2**32 + 5) == mix32(5) != mix32(6)


# The step


@pytest.mark.parametrize("chunk", [64, 4096])
def test_mixed_parameters_in_one_launch(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(TritonStep, "CHUNK", chunk)
    named = mixed_parameters()
    params = [p for _, p in named]
    exact = {name: p.detach().double() for name, p in named}
    pairs = [LoRAPair(name, exact[f"{name}.lora_A"], exact[f"{name}.lora_B"]) for name in "fghi"]
    lone = [value for name, value in exact.items() if "lora" not in name]
    oracle = StableAdamWRef(pairs, lone, lr=1e-2, shrink_ratio=0.01, weight_decay=0.1)
    optimizer = StableLoRAAdamW(named, lr=1e-2, shrink_ratio=0.01, weight_decay=0.1, seed=1)
    start = {name: value.clone() for name, value in exact.items()}
    with use_backend("triton"):
        for step in range(3):
            set_grads(params, step)
            oracle.step({exact[name]: p.grad.double() for name, p in named})
            with count_launches() as made:
                optimizer.step()
            assert not step or made == {"_stable_adamw_kernel": 1}
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


@pytest.mark.parametrize("dtype", LOW)
def test_both_backends_round_with_the_same_noise(dtype: torch.dtype) -> None:
    results = []
    for backend in ("torch", "triton"):
        named = [
            ("q.lora_A", make(4, 600, dtype=dtype)),
            ("head", make(5, dtype=dtype)),
            ("q.lora_B", make(9, 4, dtype=dtype)),
        ]
        # Powers of two and no Adam step: both compute the same float32 values before they round.
        optimizer = StableLoRAAdamW(named, lr=0.5, weight_decay=2.0**-8, shrink_ratio=0.0, seed=7)
        for _, p in named:
            p.grad = torch.zeros_like(p)
        with use_backend(backend):
            for _ in range(3):
                optimizer.step()
        results.append([p.detach() for _, p in named])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], make(4, 600, dtype=dtype))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonStep, "CHUNK", 64)
    named = mixed_parameters()[:3]
    params = [p for _, p in named]
    optimizer = StableLoRAAdamW(named, lr=1e-3)

    def launches() -> dict[str, int]:
        with use_backend("triton"), count_launches() as made:
            optimizer.step()
        return made

    step, sums = {"_stable_adamw_kernel": 1}, {"_square_sums_kernel": 1}
    set_grads(params, 0)
    assert launches() == step | sums
    assert launches() == step
    # Other gradients, at other addresses, and none for A.
    set_grads(params, 1)
    params[0].grad = None
    assert launches() == step
    set_grads(params, 2)
    assert launches() == step
    # A written to by someone else.
    with torch.no_grad():
        params[0].mul_(2)
    assert launches() == step | sums
    optimizer.param_groups[0]["lr"] = 1e-4
    assert launches() == step
    optimizer.load_state_dict(optimizer.state_dict())
    assert launches() == step | sums
    optimizer.max_grad_norm = 1.0
    assert launches() == step | sums


def test_sums_kept_from_the_step_before_are_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonStep, "CHUNK", 64)
    named = mixed_parameters()[:6]
    optimizer = StableLoRAAdamW(named, lr=1e-2, shrink_ratio=0.1)
    with use_backend("triton"):
        for step in range(3):
            set_grads([p for _, p in named], step)
            if step == 2:
                # Carried over from the step before.
                named[0][1].grad = None
            optimizer.step()
    ((_, engine),) = optimizer._engines
    assert engine.turns.tolist() == [1] * engine.turns.numel()
    kept = engine.squares[1].clone()
    plan_square_sums(
        engine.tensors, engine.addresses, engine.chunks, engine.squares[0], None, 0, engine.variants, engine.CHUNK
    ).run(engine.device)
    torch.testing.assert_close(kept, engine.squares[0], rtol=1e-6, atol=0)
    assert kept.min() > 0


def test_the_device_side_of_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path as on a GPU, where it must not wait for a value: here on whatever device there is."""
    results = []
    for patched in (False, True):
        if patched:
            decide_on_device(monkeypatch)
        named = mixed_parameters()
        params = [p for _, p in named]
        optimizer = StableLoRAAdamW(named, lr=4e-2, shrink_ratio=0.01, max_grad_norm=2.0, seed=1)
        with use_backend("torch"):
            for step in range(8):
                set_grads(params, step)
                if step == 3:
                    params[0].grad = None
                if step in (4, 5):
                    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
                    optimizer.found_inf = torch.tensor(float(step == 4), device=DEVICE)
                optimizer.step()
                if step == 5:
                    del optimizer.grad_scale, optimizer.found_inf
        results.append((optimizer, params))
    (host, host_params), (device, device_params) = results
    assert latches(host) == latches(device) and any(latches(host).values())
    for p, q in zip(host_params, device_params, strict=True):
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6 if p.dtype is torch.float32 else 8 * eps)
        assert host.state[p]["step"].item() == device.state[q]["step"].item() == (6 if p is host_params[0] else 7)


# Machine code


def test_compiles_for_gpus_that_are_not_here() -> None:
    # The common case, float32 alone and aligned, everywhere, and bfloat16 and all variants at once for the H100.
    float32, bfloat16, everything = 2, 8, 63
    wanted = [("cuda:80", float32), ("cuda:100", float32), ("hip:gfx942", float32)]
    wanted += [("cuda:90", variants) for variants in (float32, bfloat16, everything)]
    code = f"from tests.helpers.compile_stable_adamw import main\nfor each in {wanted}: main(*each)"
    results = dict(zip(wanted, map(json.loads, printed(code).splitlines()), strict=True))
    assert "hsaco" in results["hip:gfx942", float32]["kinds"]
    # 4096 elements by 256 threads are four 16-byte vectors of float32 a thread; p, g, m and v are read, all but g written.
    for arch in ("cuda:80", "cuda:90", "cuda:100"):
        assert results[arch, float32]["step"].items() >= {"ld128": 16, "st128": 12, "spills": False}.items()
        assert results[arch, float32]["sums"] == {"ld128": 4}
    assert results["cuda:90", bfloat16]["step"].items() >= {"ld128": 12, "st128": 10, "spills": False}.items()


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
