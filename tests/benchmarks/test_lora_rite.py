"""LoRA-RITE as written for the benchmarks: invariant where the paper says so, trains, resumes."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.common.lora_rite import LoRARITE
from stablelora_kernels.pairs import LoRAPair

M, N, R = 13, 17, 3


def draw(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(b_scale: float = 1.0, transform: torch.Tensor | None = None) -> LoRAPair:
    """B A is the same for every ``transform``."""
    a, b = draw(R, N, seed=1), b_scale * draw(M, R, seed=2)
    if transform is not None:
        a, b = transform @ a, b @ torch.linalg.inv(transform)
    return LoRAPair("layer", torch.nn.Parameter(a), torch.nn.Parameter(b))


def train(of: LoRAPair, optimizer: LoRARITE, steps: int, first: int = 0) -> list[torch.Tensor]:
    """B A after each step towards a target that a batch of its own shows part of."""
    target, products = draw(M, R, seed=3) @ draw(R, N, seed=4), []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x = draw(N, 8, seed=100 + step)
        (0.5 * ((of.B @ of.A - target) @ x).square().mean()).backward()
        optimizer.step()
        products.append((of.B @ of.A).detach())
    return products


@pytest.mark.parametrize("b_scale", [1.0, 0.0], ids=["both filled", "B zero"])
@pytest.mark.parametrize("kind", ["scale", "rotation", "any"])
def test_the_product_does_not_depend_on_the_factorization(kind: str, b_scale: float) -> None:
    transform = {
        "scale": 1e3 * torch.eye(R, dtype=torch.float64),
        "rotation": torch.linalg.qr(draw(R, R, seed=5))[0],
        "any": draw(R, R, seed=6) + 2 * torch.eye(R, dtype=torch.float64),
    }[kind]
    settings = {"lr": 0.05, "weight_decay": 0.1}
    one, other = pair(b_scale), pair(b_scale, transform)
    assert kind == "rotation" or not torch.allclose(one.A, other.A, rtol=0.2)
    ours, theirs = (train(p, LoRARITE([p], **settings), 25) for p in (one, other))
    for step, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-9, msg=f"step {step}")


def test_adamw_would_fail_that_test() -> None:
    transform = 1e3 * torch.eye(R, dtype=torch.float64)
    products = []
    for of in (pair(), pair(transform=transform)):
        optimizer = torch.optim.AdamW([of.A, of.B], lr=0.05)
        products.append(train(of, optimizer, 5)[-1])  # type: ignore[arg-type]
    assert not torch.allclose(*products, rtol=0.1)


def test_first_step_from_a_zero_b_moves_b_alone_and_by_lr() -> None:
    of = pair(0.0)
    a = of.A.detach().clone()
    optimizer = LoRARITE([of], lr=0.01)
    train(of, optimizer, 1)
    assert torch.equal(of.A, a)
    # In A's orthonormal basis the step has the size that an Adam step has: rms of all entries lr.
    step = of.B.detach() @ torch.linalg.qr(a.t())[1].t()
    torch.testing.assert_close(step.square().mean().sqrt(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)


def test_escaped_mass_is_what_the_projection_lost() -> None:
    of = pair()
    optimizer = LoRARITE([of], lr=0.3)
    train(of, optimizer, 2)
    state = optimizer.state[of.B]
    second, basis, escaped = (state[key].clone() for key in ("second", "basis", "escaped"))
    now = torch.linalg.qr(of.A.detach().t())[0]
    moved = now.t() @ basis @ second @ basis.t() @ now
    lost = (torch.linalg.eigvalsh(second) - torch.linalg.eigvalsh(moved)).abs().max()
    beta2 = 0.999 * (1 - 0.999**2) / (1 - 0.999**3)
    train(of, optimizer, 1, first=2)
    assert lost > 0
    torch.testing.assert_close(state["escaped"], beta2 * (escaped + lost))


def test_it_trains() -> None:
    of = pair(0.0)
    target = draw(M, R, seed=3) @ draw(R, N, seed=4)
    products = train(of, LoRARITE([of], lr=0.1), 300)
    errors = [(product - target).norm() / target.norm() for product in products]
    assert errors[0] > 0.9 and errors[-1] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    def fresh() -> LoRAPair:
        of = pair(0.0)
        return LoRAPair(of.name, *(torch.nn.Parameter(half.detach().to(dtype)) for half in (of.A, of.B)))

    def step(of: LoRAPair, optimizer: LoRARITE, seed: int) -> None:
        for half, size in ((of.A, (R, N)), (of.B, (M, R))):
            half.grad = draw(*size, seed=seed).to(dtype)
        optimizer.step()

    whole, part, resumed = fresh(), fresh(), fresh()
    straight, before = LoRARITE([whole], lr=0.01), LoRARITE([part], lr=0.01)
    for seed in range(6):
        step(whole, straight, seed)
        if seed < 3:
            step(part, before, seed)
    with torch.no_grad():
        resumed.A.copy_(part.A), resumed.B.copy_(part.B)
    after = LoRARITE([resumed], lr=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for seed in range(3, 6):
        step(resumed, after, seed)
    assert torch.equal(whole.A, resumed.A) and torch.equal(whole.B, resumed.B)


def test_a_half_without_gradient_stays() -> None:
    of = pair()
    a, b = of.A.detach().clone(), of.B.detach().clone()
    of.B.grad = draw(M, R, seed=7)
    LoRARITE([of], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(of.A, a) and not torch.equal(of.B, b)


def test_bad_arguments_are_named() -> None:
    for settings in ({"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=r"-1\.0"):
            LoRARITE([pair()], **settings)
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\), got \(0\.9, 1\.0\)"):
        LoRARITE([pair()], betas=(0.9, 1.0))
    half = LoRAPair("q_proj", *(torch.nn.Parameter(p.detach().bfloat16()) for p in (pair().A, pair().B)))
    with pytest.raises(TypeError, match=r"q_proj must be float32 or float64, got A torch\.bfloat16"):
        LoRARITE([half])
