"""Few bits: float32 masters of low-precision parameters, and how bfloat16 moments are rounded."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import load_moment
from stablelora_kernels.reference import stochastic_round_ref
from stablelora_kernels.reference.optimizer import moment_noise_ref
from tests.helpers.optimizers import DEVICE, SHAPES, all_equal, halves, make_pairs, set_grads, snapshot
from tests.helpers.steps import take_step
from tests.optim.options import BF16, FP32, FP64

pytestmark = pytest.mark.usefixtures("one_thread")


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
