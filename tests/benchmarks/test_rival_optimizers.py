"""Every optimizer that benchmarks compare: it trains, does what its paper says, or gives a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.common import optimizers
from benchmarks.common.optimizers import (
    ADAMW_FUSED,
    ARMS,
    LORA_PLUS,
    OURS,
    RITE,
    TORCHAO,
    Unavailable,
)
from stablelora_kernels.pairs import LoRAPair

pytestmark = pytest.mark.usefixtures("one_thread")
# 8 bits keep tensors of fewer than 4,096 elements in 32.
R, N, M, LR = 8, 512, 640, 1e-3
EYE = torch.eye(R, dtype=torch.float64)


def train(
    name: str, steps: int, basis: torch.Tensor = EYE, b: float = 0.01, **options: Any
) -> list[torch.Tensor]:
    """A, B, their product and its distance from a target; at the start the product is the same for
    every ``basis``.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if name == RITE else torch.float32
    start, target = (
        [torch.randn(*size, generator=generator).double() for size in ((R, N), (M, R))]
        for _ in range(2)
    )
    halves = basis @ start[0] / N**0.5, b * start[1] @ torch.linalg.inv(basis)
    pair = LoRAPair("layer", *(torch.nn.Parameter(half.to(dtype)) for half in halves))
    goal = (target[1] @ target[0]).to(dtype) / N
    try:
        optimizer = optimizers.build(name, [pair], **{"lr": LR, "weight_decay": 0.0} | options)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for _ in range(steps):
        optimizer.zero_grad()
        (pair.B @ pair.A - goal).square().sum().backward()
        optimizer.step()
    product = (pair.B @ pair.A).detach()
    return [pair.A.detach(), pair.B.detach(), product, (product - goal).norm()]


# torchao compiles its step, which takes up to half a minute.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] if n == TORCHAO else []) for n in ARMS]
)
def test_every_arm_trains(name: str) -> None:
    assert train(name, 60, lr=2e-3)[3] < 0.9 * train(name, 0)[3]


def test_arms_that_are_one_optimizer_and_how_others_differ() -> None:
    start, adamw, ours = train(OURS, 0), train(ADAMW_FUSED, 1), train(OURS, 3)
    for name in (optimizers.NAIVE, optimizers.NAIVE_FOREACH):
        torch.testing.assert_close(train(name, 3)[:2], ours[:2], rtol=0, atol=1e-6)
    # Ours did shrink.
    assert (ours[0] - train(ADAMW_FUSED, 3)[0]).abs().max() > 1e-5
    plus = train(LORA_PLUS, 1)
    for i, ratio in ((0, 1.0), (1, optimizers.LORA_PLUS_RATIO)):
        torch.testing.assert_close(
            plus[i] - start[i], ratio * (adamw[i] - start[i]), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("b", [0.01, 0.0], ids=["both filled", "B zero"])
def test_lora_rite_does_not_depend_on_the_factorization(b: float) -> None:
    other = EYE.roll(1, 0) * 1e3 + torch.linspace(-1, 1, R * R, dtype=torch.float64).view(R, R)
    one, moved = (train(RITE, 20, basis, b, lr=0.05, weight_decay=0.1)[2] for basis in (EYE, other))
    torch.testing.assert_close(one, moved, rtol=1e-6, atol=1e-8)
    # Its first step from a zero B moves B alone: in A's orthonormal basis the rms of all entries is
    # lr, as Adam's is.
    a, moved, *_ = train(RITE, 1, lr=0.01, b=0.0)
    assert torch.equal(a, train(RITE, 0)[0])
    assert (moved @ torch.linalg.qr(a.t())[1].t()).square().mean().sqrt().item() == pytest.approx(
        0.01, rel=1e-3
    )
