"""StableShrink: the shrinkage alone, before the steps of another optimizer: its rule, its kernel, and
what it refuses.
"""

from __future__ import annotations

import math
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.reference.optimizer import (
    rounding_noise_ref,
    shrink_ref,
    stochastic_round_ref,
)
from tests.helpers.optimizers import DEVICE, halves, make_pairs, set_grads
from tests.helpers.steps import assert_all_close, saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
# One chunk of the kernel is 4,096 elements: none full, one and a part, several.
SHAPES = [(8, 24, 40), (1, 7, 13), (3, 1501, 1409), (20, 16, 416)]
RATIO = 0.1
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def step_with(optimizer: torch.optim.Optimizer, pairs: list[slk.LoRAPair], seed: int) -> None:
    set_grads(halves(pairs), seed)
    optimizer.step()


def made(
    pairs: list[slk.LoRAPair], lr: float = 1.0, **options: Any
) -> tuple[torch.optim.Optimizer, slk.StableShrink]:
    """Plain gradient descent with a StableShrink."""
    optimizer = torch.optim.SGD(halves(pairs), lr=lr)
    return optimizer, slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO, **options)


def latches(shrink: slk.StableShrink) -> list[int | None]:
    return [pair.latched_at for pair in shrink.stability()]


# Equal to StableLoRAAdamW


class Twins:
    """Training by StableLoRAAdamW, and by torch's AdamW with a StableShrink, on the same gradients."""

    def __init__(self, dtype: torch.dtype, **choice: bool) -> None:
        self.dtype, self.choice = dtype, choice
        self.ours, self.theirs = (make_pairs(dtype=dtype) for _ in range(2))
        self.optimizers: list[torch.optim.Optimizer] = []
        self.make()

    def make(self) -> None:
        """New optimizers, of two groups with ratios and rates of their own."""
        ours, theirs = (
            [
                {"params": part, "lr": 0.05, "weight_decay": 0.1, "shrink_ratio": 0.08},
                {"params": rest, "lr": 0.03, "weight_decay": 0.0},
            ]
            for part, rest in (
                (self.ours[:2], self.ours[2:]),
                (halves(self.theirs[:2]), halves(self.theirs[2:])),
            )
        )
        adamw = torch.optim.AdamW(theirs, **self.choice)
        self.shrink = slk.StableShrink(adamw, self.theirs, shrink_ratio=RATIO)
        self.optimizers = [slk.StableLoRAAdamW(ours, shrink_ratio=RATIO), adamw]
        self.scalers = [torch.amp.GradScaler(DEVICE, init_scale=4.0) for _ in range(2)]
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(each, max_lr=[0.08, 0.05], total_steps=60)
            for each in self.optimizers
        ]

    def reload(self) -> None:
        """Go on in new optimizers from what the old ones save."""
        old = [self.optimizers, self.scalers, self.schedules]
        states = [[saved_and_loaded(each.state_dict()) for each in kind] for kind in old]
        self.make()
        for kind, its_states in zip(
            (self.optimizers, self.scalers, self.schedules), states, strict=True
        ):
            for each, state in zip(kind, its_states, strict=True):
                each.load_state_dict(state)

    def step(self, draws: torch.Generator) -> None:
        """A step on gradients of which some are missing, zero or, in some steps, infinite."""
        seed = int(torch.randint(2**31, (), generator=draws))
        fates = torch.rand(len(self.ours) * 2, generator=draws).tolist()
        overflows = torch.rand((), generator=draws).item() < 0.1
        for pairs, optimizer, scaler, schedule in zip(
            (self.ours, self.theirs), self.optimizers, self.scalers, self.schedules, strict=True
        ):
            params = halves(pairs)
            set_grads(params, seed, 4e-2)
            for p, fate in zip(params, fates, strict=True):
                if fate < 0.15:
                    p.grad = None
                elif fate < 0.25:
                    p.grad.zero_()
            params[3].grad = torch.full_like(params[3], math.inf if overflows else 0.5)
            scaler.scale(torch.zeros((), device=DEVICE))
            scaler.step(optimizer)
            scaler.update()
            schedule.step()


@pytest.mark.parametrize("choice", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "bound"), [(FP64, 1e-14), (FP32, 2e-5)], ids=["fp64", "fp32"])
def test_with_adamw_it_is_the_fused_optimizer(
    dtype: torch.dtype, bound: float, seed: int, choice: dict[str, bool]
) -> None:
    """Through missing, zero and infinite gradients, groups, schedules and a checkpoint."""
    twins = Twins(dtype, **choice)
    draws = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        # Schedulers warn of steps that a scaler has skipped.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler")
        for step in range(50):
            if step == 20:
                twins.reload()
            twins.step(draws)
    expected = twins.optimizers[0].stability()
    found = twins.shrink.stability()
    counts = [(pair.name, pair.latched_at, pair.steps) for pair in expected]
    assert [(pair.name, pair.latched_at, pair.steps) for pair in found] == counts
    assert len({pair.latched_at for pair in expected}) > 2
    assert_all_close(halves(twins.theirs), halves(twins.ours), rtol=bound, atol=bound)


# The rule


def zero_grads(pairs: list[slk.LoRAPair]) -> None:
    """Gradients along which descent changes nothing."""
    for p in halves(pairs):
        p.grad = torch.zeros_like(p)


def grow(pairs: list[slk.LoRAPair], seed: int) -> None:
    """Train B, as nobody but the test does here."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair, rate in zip(pairs, (0.02, 0.002, 0.0005, 0.01), strict=False):
            size = rate * pair.B.shape[0] ** 0.5
            pair.B.add_(size * torch.rand(pair.B.shape, generator=generator).to(pair.B))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_a_shrinks_as_the_reference_until_its_pair_latches(backend, dtype: torch.dtype) -> None:
    """In low precision, some elements as the reference rounds them, to the bit."""
    pairs = make_pairs(SHAPES, dtype)
    optimizer, shrink = made(pairs, seed=7)
    at: list[int | None] = [None] * len(pairs)
    firsts = [sum(pair.A.numel() for pair in pairs[:k]) for k in range(len(pairs))]
    for step in range(1, 13):
        before = [pair.A.detach().clone() for pair in pairs]
        zero_grads(pairs)
        optimizer.step()
        for k, (pair, a) in enumerate(zip(pairs, before, strict=True)):
            shrunk, latched = shrink_ref(
                a.double(), pair.B.detach().double(), at[k] is not None, RATIO
            )
            found = pair.A.detach()
            if latched:
                at[k] = at[k] or step
                assert torch.equal(found, a)
            elif dtype is FP32:
                torch.testing.assert_close(found.double(), shrunk, rtol=2e-7, atol=0)
            else:
                x = a.flatten().float()
                x = x - torch.tensor(RATIO) * x
                for i in range(0, a.numel(), max(1, a.numel() // 40)):
                    noise = rounding_noise_ref(7, step, firsts[k] + i)
                    assert found.flatten()[i].item() == stochastic_round_ref(
                        x[i].item(), dtype, noise
                    )
        grow(pairs, step)
    assert latches(shrink) == at
    assert None in at and len({*at}) > 2


def test_low_precision_shrinks_on_average(backend) -> None:
    """Rounded to nearest, A would stay as it is at this ratio."""
    pairs = make_pairs([(8, 8, 2048)], BF16)
    optimizer = torch.optim.SGD(halves(pairs), lr=1.0)
    slk.StableShrink(optimizer, pairs, shrink_ratio=5e-4)
    norm = pairs[0].A.detach().double().norm().item()
    for _ in range(40):
        zero_grads(pairs)
        optimizer.step()
    assert pairs[0].A.detach().double().norm().item() / norm == pytest.approx(
        (1 - 5e-4) ** 40, rel=5e-4
    )


def test_float32_does_not_drift(backend) -> None:
    """The product with float32's rounding of 1 - ratio would be off by 2.5e-5 behind these steps."""
    pairs = make_pairs([(8, 8, 64)])
    optimizer = torch.optim.SGD(halves(pairs), lr=1.0)
    slk.StableShrink(optimizer, pairs, shrink_ratio=5e-4)
    steps = 1000 if backend == "torch" else 100
    exact = pairs[0].A.detach().double() * (1 - 5e-4) ** steps
    for _ in range(steps):
        zero_grads(pairs)
        optimizer.step()
    torch.testing.assert_close(
        pairs[0].A.detach().double(), exact, rtol=1.5e-7 * steps**0.5, atol=0
    )


def test_a_latch_holds_and_pairs_without_a_gradient_wait(backend) -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    with torch.no_grad():
        pairs[0].B.fill_(100.0)
    before = [pair.A.detach().clone() for pair in pairs]
    zero_grads(pairs)
    pairs[0].A.grad = None
    optimizer.step()
    assert torch.equal(pairs[0].A, before[0]) and not torch.equal(pairs[1].A, before[1])
    assert [(pair.latched_at, pair.steps) for pair in shrink.stability()] == [(None, 0), (None, 1)]
    zero_grads(pairs)
    optimizer.step()
    with torch.no_grad():
        pairs[0].B.zero_()
    optimizer.step()
    assert torch.equal(pairs[0].A, before[0])
    first, second = shrink.stability()
    assert (first.latched_at, first.steps, first.latched, first.stable) == (1, 2, True, False)
    assert (second.latched_at, second.steps) == (None, 3)
    # An A without a gradient is frozen for that step, whatever B's gradient.
    assert first.experts == 1 and shrink.pairs == pairs


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("half", ["A", "B"])
def test_a_norm_that_is_not_finite_decides_nothing(backend, half: str, value: float) -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    with torch.no_grad():
        getattr(pairs[0], half)[0, 0] = value
    before = pairs[0].A.detach().clone()
    zero_grads(pairs)
    optimizer.step()
    assert torch.equal(pairs[0].A.nan_to_num(1.5), before.nan_to_num(1.5))
    assert optimizer.param_groups[0]["latched_at"].tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="pair 'layer0' holds values that are not finite"):
        shrink.stability()


def test_empty_sizes_and_equal_norms_latch(backend) -> None:
    """As StableLoRAAdamW's pairs do: 0 is no more than 0."""
    pairs = make_pairs([(2, 3, 0), (2, 0, 5), (4, 4, 4)])
    with torch.no_grad():
        pairs[2].A.zero_()
    optimizer, shrink = made(pairs)
    zero_grads(pairs)
    optimizer.step()
    assert latches(shrink) == [1, None, 1]


def test_long_sums_and_close_calls(backend) -> None:
    """B's only numbers are behind 128 chunks of the kernel. Norms in bfloat16 would let the second
    pair shrink.
    """
    pair = slk.LoRAPair(
        "long", torch.ones(1, 4).requires_grad_(), torch.zeros(4096 * 140, 1).requires_grad_()
    )
    low = make_pairs([(4, 48, 64)], BF16)[0]
    with torch.no_grad():
        pair.B[-1] = 1e6
        # ||A|| / n = 0.36523 and ||B|| / m = 0.36535, of which bfloat16 has 0.36458.
        low.A.fill_(1.4609375)
        low.B.fill_(1.265625)
    for each in (pair, low):
        optimizer, shrink = made([each])
        zero_grads([each])
        optimizer.step()
        assert latches(shrink) == [1]


def test_what_is_beside_a_shrinks_with_it(backend) -> None:
    """As of schedule-free optimizers, which have these words in their groups and their state."""
    pairs = make_pairs(SHAPES[:2])
    optimizer, _ = made(pairs)
    optimizer.param_groups[0]["train_mode"] = True
    z = torch.ones_like(pairs[1].A)
    optimizer.state[pairs[1].A]["z"] = z
    zero_grads(pairs)
    optimizer.step()
    assert_all_close([z], [torch.full_like(z, 0.9)])


def test_nothing_else_is_written(backend) -> None:
    """B, and what lies around A in the same memory, at an address that is no multiple of 16."""
    storage = torch.full((3 * 1409 + 60,), 7.0)
    a = storage[5 : 5 + 3 * 1409].view(3, 1409).normal_(generator=torch.Generator().manual_seed(1))
    pair = slk.LoRAPair("odd", a.requires_grad_(), torch.full((5, 3), 1e-3).requires_grad_())
    before = a.detach().clone()
    optimizer, _ = made([pair])
    zero_grads([pair])
    optimizer.step()
    torch.testing.assert_close(a.detach(), before * 0.9)
    assert bool((storage[:5] == 7).all() and (storage[5 + a.numel() :] == 7).all())
    assert bool((pair.B == 1e-3).all())


def test_halves_of_other_dtypes_and_strides(backend) -> None:
    """A in bfloat16 by columns, B in float32."""
    a = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)).bfloat16().t()
    pair = slk.LoRAPair("mixed", a.requires_grad_(), torch.zeros(24, 8).requires_grad_())
    norm = a.detach().float().norm().item()
    optimizer, shrink = made([pair])
    zero_grads([pair])
    optimizer.step()
    assert a.detach().float().norm().item() / norm == pytest.approx(0.9, rel=2e-3)
    with torch.no_grad():
        pair.B.fill_(10.0)
    optimizer.step()
    assert latches(shrink) == [2]


def test_the_ratio_of_a_group_may_change(backend) -> None:
    pairs = make_pairs(SHAPES[:2])
    ratio = torch.tensor(0.5)
    groups = [
        {"params": halves(pairs[:1]), "shrink_ratio": 0.25},
        {"params": halves(pairs[1:]), "shrink_ratio": ratio},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
    expected = [pair.A.detach() * (1 - r) for pair, r in zip(pairs, (0.25, 0.5), strict=True)]
    zero_grads(pairs)
    optimizer.step()
    assert_all_close([pair.A.detach() for pair in pairs], expected)
    optimizer.param_groups[0]["shrink_ratio"] = 0.0
    ratio.fill_(0.75)
    optimizer.step()
    assert_all_close([pair.A.detach() for pair in pairs], [expected[0], expected[1] * 0.25])


def test_new_memory_and_other_gradients_are_noticed(backend) -> None:
    """``p.data = tensor`` between steps, and another set of gradients."""
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    for step in range(4):
        zero_grads(pairs)
        if step == 1:
            pairs[1].A.grad = None
        if step == 2:
            for p in halves(pairs):
                p.data = p.data.clone()
        before = [pair.A.detach().clone() for pair in pairs]
        optimizer.step()
        shrunk = [1.0 if step == 1 and k == 1 else 0.9 for k in range(2)]
        assert_all_close(
            [pair.A.detach() for pair in pairs],
            [a * factor for a, factor in zip(before, shrunk, strict=True)],
        )
    assert [pair.steps for pair in shrink.stability()] == [4, 3]


def test_the_kernel_is_one_launch_and_the_host_reads_nothing() -> None:
    pytest.importorskip("triton", reason="runs where Triton is installed")
    from stablelora_kernels.launch.stable_shrink import Repeated

    def fail(*args: object) -> object:
        raise AssertionError("the host reads the device")

    pairs = make_pairs([(4, 24, 40)] * 30)
    reads = dict.fromkeys(("item", "tolist", "__bool__", "__int__", "__float__"), fail)
    with slk.settings(backend="triton"):
        groups = [
            {"params": halves(pairs[:9]), "shrink_ratio": torch.tensor(0.1)},
            {"params": halves(pairs[9:20])},
            {"params": halves(pairs[20:]), "shrink_ratio": torch.tensor(0.2)},
        ]
        # The fused one takes GradScaler's verdict.
        optimizer = torch.optim.SGD(groups, lr=1.0, fused=True)
        shrink = slk.StableShrink(optimizer, pairs)
        zero_grads(pairs)
        optimizer.step()
        optimizer.found_inf = torch.zeros(())
        # The launch itself does not run here: Triton's interpreter reads what a kernel loads.
        with mock.patch.object(Repeated, "run") as run, mock.patch.multiple(torch.Tensor, **reads):
            optimizer.step()
        assert run.call_count == 1
        optimizer.step()
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
    assert [pair.steps for pair in shrink.stability()] == [2] * 30


@pytest.mark.parametrize("is_wrong", [False, True])
def test_first_use_proves_the_kernel(
    is_wrong: bool, monkeypatch: pytest.MonkeyPatch, nothing_known: None
) -> None:
    """A kernel that is wrong here is retired with one warning, and PyTorch's operators shrink."""
    pytest.importorskip("triton", reason="runs where Triton is installed")
    from stablelora_kernels.optim import shrink as engines

    pairs = make_pairs(SHAPES[:2], BF16)
    if is_wrong:
        monkeypatch.setattr(engines.TritonShrink, "_set_ratios", lambda engine, ratios: None)
    with (
        slk.settings(backend="triton"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        optimizer, _ = made(pairs)
        before = pairs[0].A.detach().float()
        zero_grads(pairs)
        optimizer.step()
    assert pairs[0].A.detach().float().norm() < 0.95 * before.norm()
    said = [str(warning.message) for warning in caught]
    assert sum("stable_shrink by 'one_launch' is wrong" in words for words in said) == is_wrong


# As torch's optimizers are used


def test_a_closure_makes_the_gradients_first(backend) -> None:
    pairs, twins = make_pairs(SHAPES[:2]), make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    calls = []

    def closure() -> float:
        # On the values before the step.
        assert torch.equal(pairs[0].A, twins[0].A)
        zero_grads(pairs)
        calls.append(1)
        return 0.5

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        optimizer.zero_grad()
        assert step() == 0.5
        with torch.no_grad():
            for pair in twins:
                pair.A.mul_(0.9)
        assert_all_close([p.A for p in pairs], [p.A for p in twins])
        for p, q in zip(pairs, twins, strict=True):
            q.A.data.copy_(p.A)
    assert len(calls) == 2 and [pair.steps for pair in shrink.stability()] == [2, 2]


def test_autograd_notices_the_write(backend) -> None:
    pairs = make_pairs(SHAPES[:1])
    optimizer, _ = made(pairs)
    loss = pairs[0].A.square().sum()
    zero_grads(pairs)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_fake_step_that_makes_the_state_shrinks_nothing(backend) -> None:
    """torch.distributed.checkpoint takes one, with rates and gradients of zero."""
    pairs = make_pairs(SHAPES[:2])
    optimizer = torch.optim.AdamW(halves(pairs), lr=torch.tensor(0.0))
    shrink = slk.StableShrink(optimizer, pairs)
    before = [pair.A.detach().clone() for pair in pairs]
    zero_grads(pairs)
    optimizer.step()
    assert optimizer.state and all(torch.equal(a, p.A) for a, p in zip(before, pairs, strict=True))
    assert [pair.steps for pair in shrink.stability()] == [0, 0]
    # In warm-up's first step the rate alone is zero.
    set_grads(halves(pairs), 0)
    optimizer.step()
    assert [pair.steps for pair in shrink.stability()] == [1, 1]


def test_a_state_without_it_starts_anew_with_a_warning(backend) -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    with torch.no_grad():
        pairs[0].B.fill_(100.0)
    step_with(optimizer, pairs, 0)
    assert latches(shrink) == [1, None]
    plain = torch.optim.SGD(halves(make_pairs(SHAPES[:2])), lr=1.0).state_dict()
    optimizer.load_state_dict(plain)
    with pytest.warns(
        RuntimeWarning, match="has no 'shrink_steps': it was saved without StableShr"
    ):
        assert latches(shrink) == [None, None]
    assert optimizer.param_groups[0]["shrink_ratio"] == RATIO


def test_a_state_of_other_pairs_is_refused(backend) -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, _ = made(pairs)
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"latched_at": torch.zeros(3, dtype=torch.int32)}
    optimizer.load_state_dict(state)
    before = pairs[0].A.detach().clone()
    with pytest.raises(ValueError, match=r"must have latched_at \[2\], one a pair, got \[3\]"):
        step_with(optimizer, pairs, 0)
    assert torch.equal(before, pairs[0].A)


def test_made_behind_the_loading_it_goes_on(backend) -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    with torch.no_grad():
        pairs[1].B.fill_(100.0)
    for step in range(2):
        step_with(optimizer, pairs, step)
    state = saved_and_loaded(optimizer.state_dict())
    resumed = torch.optim.SGD(halves(pairs), lr=1.0)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"shrink_ratio is 0\.1, which was loaded with .*not 0\.7"):
        again = slk.StableShrink(resumed, pairs, shrink_ratio=0.7)
    assert again.stability() == shrink.stability()
    assert latches(again) == [None, 1]


# Refused


def test_what_is_refused() -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    for error, message, optimizer_given, source, options in (
        (ValueError, "pair 'layer0': the optimizer has a StableShrink of its A already",
         optimizer, pairs, {}),
        (TypeError, "optimizer is a StableLoRAAdamW, which shrinks A in its own step",
         slk.StableLoRAAdamW(pairs), pairs, {}),
        (TypeError, "must be a torch.optim.Optimizer with step hooks, got Linear",
         torch.nn.Linear(1, 1), pairs, {}),
        (ValueError, r"'layer0': A \[8, 40\] is not among the 4 parameters",
         torch.optim.SGD(halves(pairs[1:]) + halves(make_pairs(SHAPES[:1])), lr=1.0), pairs, {}),
        (ValueError, "its parameters are flat, as under DeepSpeed",
         torch.optim.SGD([torch.zeros(9)], lr=1.0), pairs, {}),
        (ValueError, r"shrink_ratio must be a finite number in \[0, 1\), got 1",
         torch.optim.SGD(halves(pairs), lr=1.0), pairs, {"shrink_ratio": 1}),
        (TypeError, "seed must be an int", torch.optim.SGD(halves(pairs), lr=1.0), pairs, {"seed": 0.5}),
        (ValueError, "has no trainable LoRA pair",
         optimizer, torch.nn.Linear(2, 2), {}),
        (TypeError, "must be a module or give LoRAPairs, got a Parameter",
         optimizer, torch.nn.Linear(2, 2).parameters(), {}),
        (ValueError, "one A is given as 'layer0' and as 'again'",
         torch.optim.SGD(halves(pairs), lr=1.0),
         [pairs[0], slk.LoRAPair("again", pairs[0].A, pairs[0].B)], {}),
        (ValueError, r"group 0's shrink_ratio must be .* got 2",
         torch.optim.SGD([{"params": halves(pairs), "shrink_ratio": 2}], lr=1.0), pairs, {}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            slk.StableShrink(optimizer_given, source, **options)
    # Nothing is left behind.
    fresh = torch.optim.SGD([{"params": halves(pairs), "shrink_ratio": 2}], lr=1.0)
    with pytest.raises(ValueError, match="shrink_ratio"):
        slk.StableShrink(fresh, pairs)
    assert not fresh._optimizer_step_pre_hooks
    assert {*fresh.param_groups[0]} == {
        *torch.optim.SGD([torch.zeros(1)], lr=1).param_groups[0],
        "shrink_ratio",
    }
    assert repr(shrink) == "StableShrink(2 LoRA pairs, SGD)"


def test_half_frozen_pairs_are_refused_and_frozen_ones_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    slk.apply_lora(model, ["0", "1"], r=2)
    for p in (model[1].lora_A, model[1].lora_B):
        p.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    shrink = slk.StableShrink(torch.optim.SGD(trainable, lr=1.0), model)
    assert [pair.name for pair in shrink.pairs] == ["0"]
    model[0].lora_B.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].lora_A], lr=1.0)
    with pytest.raises(ValueError, match="lora_A is trainable but lora_B is frozen"):
        slk.StableShrink(optimizer, model)
    (pair,) = slk.lora_pairs(model[0])
    with pytest.raises(ValueError, match=r"B is frozen \(requires_grad=False\)"):
        slk.StableShrink(optimizer, [pair])


def test_an_a_that_has_left_the_optimizer_is_named() -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, _ = made(pairs)
    group = optimizer.param_groups[0]
    group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]
    with pytest.raises(RuntimeError, match="A of pair 'layer0' is no longer in the optimizer"):
        optimizer.step()


def test_remove_takes_everything_back() -> None:
    pairs = make_pairs(SHAPES[:2])
    optimizer, shrink = made(pairs)
    step_with(optimizer, pairs, 0)
    shrink.remove()
    assert {*optimizer.param_groups[0]} == {
        *torch.optim.SGD([torch.zeros(1)], lr=1).param_groups[0]
    }
    before = pairs[0].A.detach().clone()
    zero_grads(pairs)
    optimizer.step()
    assert torch.equal(pairs[0].A, before)
    slk.StableShrink(optimizer, pairs)
