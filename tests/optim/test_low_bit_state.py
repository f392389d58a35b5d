"""Few bits: float32 masters of low-precision parameters, and how bfloat16 moments are rounded."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.sharding import Shard
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import load_moment, rounded_moments
from stablelora_kernels.optim.stochastic_rounding import seed_word
from stablelora_kernels.reference import stochastic_round_ref
from stablelora_kernels.reference.optimizer import moment_noise_ref
from tests.helpers.optimizers import DEVICE, SHAPES, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import take_step

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16


# Masters


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


@pytest.mark.parametrize("moments", [BF16, torch.uint8])
def test_moments_decay_on_average(path: str, moments: torch.dtype) -> None:
    """beta2 = 0.999 changes a moment by less than half of a step of either format: rounded to nearest it would never decay."""
    (pair,) = make_pairs([(16, 16, 512)])
    optimizer = StableLoRAAdamW([pair], lr=0.0, moments_dtype=moments, seed=2)
    take_step(0, optimizer)

    def moment(name: str) -> torch.Tensor:
        return load_moment(optimizer.state[pair.A], name, torch.float32).double()

    before = moment("exp_avg_sq")
    for p in halves([pair]):
        p.grad.zero_()
    for _ in range(60):
        optimizer.step()
    ratio = (moment("exp_avg_sq").sum() / before.sum()).item()
    assert ratio == pytest.approx(0.999**60, rel=5e-3 if moments is BF16 else 0.01)
    # Rounded independently, each moment is as often up as down: the means of the others are right as well.
    assert moment("exp_avg").abs().max() < 0.9**60 * 32 * before.sqrt().max()


def test_float64_parameters_keep_float64_moments() -> None:
    pairs, twins = make_pairs(dtype=torch.float64), make_pairs(dtype=torch.float64)
    optimizers = StableLoRAAdamW(pairs, moments_dtype=BF16, master_weights=True), StableLoRAAdamW(twins)
    take_step(0, *optimizers)
    assert all_equal(snapshot(optimizers[0]), snapshot(optimizers[1]))


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
