"""The optimizer arms: each is what its name says, trains, and says why where it can't run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.common import optimizers
from benchmarks.common.optimizers import ARMS, Unavailable, build
from stablelora_kernels.pairs import LoRAPair

pytestmark = pytest.mark.usefixtures("one_thread")
# 8 bits keep tensors of fewer than 4,096 elements in 32.
R, N, M = 8, 512, 640
LR = 1e-3


def make_pairs(dtype: torch.dtype = torch.float32, count: int = 2) -> list[LoRAPair]:
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(count):
        a, b = torch.randn(R, N, generator=generator) / N**0.5, 0.01 * torch.randn(M, R, generator=generator)
        pairs.append(LoRAPair(f"layer{i}", *(torch.nn.Parameter(half.to(dtype)) for half in (a, b))))
    return pairs


def make(name: str, pairs: list[LoRAPair], **options):
    try:
        return build(name, pairs, **({"lr": LR} | options))
    except Unavailable as reason:
        pytest.skip(str(reason))


def set_grads(pairs: list[LoRAPair], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs:
        for half in (pair.A, pair.B):
            half.grad = (torch.randn(half.shape, generator=generator) + 0.5).to(half.dtype)


def after(name: str, steps: int = 3, **options) -> list[LoRAPair]:
    pairs = make_pairs()
    optimizer = make(name, pairs, **options)
    for seed in range(steps):
        set_grads(pairs, seed)
        optimizer.step()
    return pairs


def values(pairs: list[LoRAPair]) -> list[torch.Tensor]:
    return [half.detach() for pair in pairs for half in (pair.A, pair.B)]


def without_torchao(names: list[str]) -> list[Any]:
    """torchao compiles its step, which takes up to half a minute, so it runs at night."""
    return [pytest.param(name, marks=pytest.mark.nightly) if name == optimizers.TORCHAO else name for name in names]


@pytest.mark.parametrize("name", without_torchao([*ARMS]))
def test_every_arm_trains(name: str) -> None:
    pairs = make_pairs(count=1)
    pair, generator = pairs[0], torch.Generator().manual_seed(1)
    optimizer = make(name, pairs, lr=2e-3, weight_decay=0.0)
    target = torch.randn(M, R, generator=generator) @ torch.randn(R, N, generator=generator) / N
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (pair.B @ pair.A - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses[::10]


@pytest.mark.parametrize("name", [optimizers.ADAMW_FOREACH, optimizers.ADAMW_FUSED])
def test_adamw_is_the_same_however_it_runs(name: str) -> None:
    torch.testing.assert_close(values(after(name)), values(after(optimizers.ADAMW_LOOP)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [optimizers.NAIVE, optimizers.NAIVE_FOREACH])
def test_algorithm_1_by_hand_is_ours(name: str) -> None:
    mine, theirs, plain = (values(after(arm)) for arm in (optimizers.OURS, name, optimizers.ADAMW_FUSED))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    # It did shrink.
    assert (plain[0] - theirs[0]).abs().max() > 1e-5


def test_lora_plus_moves_b_by_the_ratio() -> None:
    start, plain, plus = (
        values(make_pairs()),
        *(values(after(name, 1, weight_decay=0.0)) for name in (optimizers.ADAMW_FUSED, optimizers.LORA_PLUS)),
    )
    for i, ratio in ((0, 1.0), (1, optimizers.LORA_PLUS_RATIO)):
        torch.testing.assert_close(plus[i] - start[i], ratio * (plain[i] - start[i]), rtol=1e-3, atol=1e-6)


def test_riemannian_preconditions_by_the_other_half() -> None:
    pairs = make_pairs(count=1)
    pair = pairs[0]
    optimizer = make(optimizers.RIEMANNIAN, pairs, reg=0.1)
    set_grads(pairs, 0)
    a, grad = pair.A.detach().double(), pair.B.grad.double()
    optimizer.step()
    expected = grad @ torch.linalg.inv(a @ a.t() + 0.1 * torch.eye(R, dtype=torch.float64))
    torch.testing.assert_close(pair.B.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", without_torchao([optimizers.TORCHAO, optimizers.BITSANDBYTES]))
def test_8_bits_keep_moments_in_8_bits_and_stay_near_adamw(name: str) -> None:
    pairs = make_pairs()
    optimizer = make(name, pairs)
    set_grads(pairs, 0)
    optimizer.step()
    state = optimizer.state[pairs[0].A]
    kept = {getattr(value, "codes", value).dtype for value in state.values() if isinstance(value, torch.Tensor)}
    assert torch.uint8 in kept
    torch.testing.assert_close(values(after(name)), values(after(optimizers.ADAMW_FUSED)), rtol=0.05, atol=2 * LR)


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str):
        raise ImportError("no torchao here")

    monkeypatch.setattr(optimizers, "import_module", absent)
    with pytest.raises(Unavailable, match="torchao can't be imported: ImportError: no torchao here"):
        build(optimizers.TORCHAO, make_pairs(), lr=LR)


def test_8_bits_that_fail_are_a_reason_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.optim.AdamW):
        def step(self, closure=None):
            raise OSError("no compiler")

    monkeypatch.setattr(optimizers, "import_module", lambda _name: type("module", (), {"AdamW8bit": Broken}))
    pairs = make_pairs()
    before = [value.clone() for value in values(pairs)]
    with pytest.raises(Unavailable, match="bitsandbytes can't step on cpu: OSError: no compiler"):
        build(optimizers.BITSANDBYTES, pairs, lr=LR)
    assert all(map(torch.equal, before, values(pairs)))


def test_what_is_asked_wrongly_is_named() -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'AdamW fused'.*got 'SGD'"):
        build("SGD", make_pairs(), lr=LR)
    with pytest.raises(Unavailable, match="float32 and float64 matrices only, got bfloat16"):
        build(optimizers.RITE, make_pairs(torch.bfloat16), lr=LR)
    plain = LoRAPair("layer0", torch.randn(R, N, requires_grad=True), torch.randn(M, R, requires_grad=True))
    with pytest.raises(TypeError, match=r"layer0 must consist of nn\.Parameters, got Tensor and Tensor"):
        build(optimizers.LORA_PLUS, [plain], lr=LR)
