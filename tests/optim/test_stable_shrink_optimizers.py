"""StableShrink under optimizers of torch and of other libraries: a step against float64, and training
against the same optimizer with A shrunk by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.reference.optimizer import shrink_ref
from tests.helpers.optimizers import halves, make_pairs, set_grads
from tests.helpers.steps import assert_all_close, saved_and_loaded

pytestmark = pytest.mark.usefixtures("one_thread")
bnb, lion, schedulefree, transformers = (
    pytest.importorskip(name, reason=f"runs where {name} is installed: pip install .[test]")
    for name in ("bitsandbytes", "lion_pytorch", "schedulefree", "transformers")
)
# Each has at least 64 elements, as Muon's and bitsandbytes' blocks.
SHAPES = [(8, 24, 40), (4, 70, 130), (3, 31, 45)]
RATIO = 0.1
FP32, FP64 = torch.float32, torch.float64
Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class Rival(NamedTuple):
    """An optimizer. ``bound``: how far its float32 step may be from its float64 one, beside the
    largest value; None if it has no float64.
    """

    make: Make
    bound: float | None = 3e-6


def adam(params: list[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-2, weight_decay=0.1, **options)


RIVALS = {
    "AdamW, fused": Rival(lambda params: adam(params, fused=True)),
    "AdamW, foreach": Rival(lambda params: adam(params, foreach=True)),
    "AdamW, amsgrad": Rival(lambda params: adam(params, amsgrad=True)),
    "SGD": Rival(lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9, nesterov=True)),
    # It orthogonalizes in bfloat16, also of float64 parameters.
    "Muon": Rival(lambda params: torch.optim.Muon(params, lr=2e-2), bound=4e-2),
    # Its updates are relative to a parameter's size, or to this one.
    "Adafactor of torch": Rival(
        lambda params: torch.optim.Adafactor(params, lr=2e-2, eps=(None, 0.5))
    ),
    "Adafactor of transformers": Rival(
        lambda params: transformers.Adafactor(
            params, lr=2e-2, relative_step=False, scale_parameter=False
        )
    ),
    "AdamW8bit": Rival(lambda params: bnb.optim.AdamW8bit(params, lr=2e-2, min_8bit_size=64), None),
    "PagedAdamW": Rival(lambda params: bnb.optim.PagedAdamW(params, lr=2e-2), None),
    "AdamW, schedule-free": Rival(
        lambda params: schedulefree.AdamWScheduleFree(params, lr=2e-2, weight_decay=0.1)
    ),
    "SGD, schedule-free": Rival(lambda params: schedulefree.SGDScheduleFree(params, lr=0.3)),
    "Lion": Rival(lambda params: lion.Lion(params, lr=5e-3, weight_decay=0.1)),
    "Lion of bitsandbytes": Rival(lambda params: bnb.optim.Lion(params, lr=5e-3), None),
}
by_rival = pytest.mark.parametrize("name", RIVALS)


def shrink_by_hand(
    pairs: list[slk.LoRAPair], optimizer: torch.optim.Optimizer, latched: list[bool]
) -> None:
    """Algorithm 1, also of what a schedule-free optimizer keeps beside A."""
    with torch.no_grad():
        for k, (_, a, b) in enumerate((pair.name, pair.A, pair.B) for pair in pairs):
            before = latched[k]
            _, latched[k] = shrink_ref(a.double(), b.double(), before, RATIO)
            if not latched[k]:
                z = optimizer.state.get(a, {}).get("z")
                for t in [a] if z is None else [a, z]:
                    t.add_(t, alpha=-RATIO)


def ready(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


@by_rival
def test_a_step_is_that_of_float64(name: str) -> None:
    """Behind some steps, of which the optimizer has a state, so that B is not zero."""
    make, bound = RIVALS[name]
    pairs = make_pairs(SHAPES, FP32)
    optimizer = ready(make(halves(pairs)))
    for step in range(3):
        set_grads(halves(pairs), step)
        optimizer.step()
    dtype = FP32 if bound is None else FP64
    exact = make_pairs(SHAPES, dtype)
    oracle = ready(make(halves(exact)))
    # State in float64, with the values of float32.
    for step in range(3):
        set_grads(halves(pairs), step)
        for p, q in zip(halves(pairs), halves(exact), strict=True):
            q.grad = p.grad.to(dtype)
        oracle.step()
    if bound is None:
        assert_all_close(halves(exact), halves(pairs), rtol=0, atol=0)
    slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
    shrink_by_hand(exact, oracle, [False] * len(exact))
    set_grads(halves(pairs), 7)
    for p, q in zip(halves(pairs), halves(exact), strict=True):
        q.grad = p.grad.to(dtype)
    before = [pair.A.detach().clone() for pair in pairs]
    optimizer.step()
    oracle.step()
    for p, q in zip(halves(pairs), halves(exact), strict=True):
        error = (p.detach().double() - q.detach().double()).abs().max().item()
        assert error <= (bound or 0.0) * q.detach().abs().max().item()
    # The shrinkage is larger than that.
    for a, pair in zip(before, pairs, strict=True):
        assert pair.A.norm() < 0.95 * a.norm()


@by_rival
def test_training_is_that_of_shrinking_by_hand(name: str) -> None:
    """To the bit, over twenty steps in which pairs latch, through a checkpoint."""
    make = RIVALS[name].make
    pairs, twins = make_pairs(SHAPES), make_pairs(SHAPES)
    optimizer, twin = ready(make(halves(pairs))), ready(make(halves(twins)))
    shrink = slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
    latched = [False] * len(twins)
    for step in range(20):
        if step == 8:
            states = [saved_and_loaded(each.state_dict()) for each in (optimizer, twin)]
            optimizer, twin = ready(make(halves(pairs))), ready(make(halves(twins)))
            shrink = slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
            for each, state in zip((optimizer, twin), states, strict=True):
                each.load_state_dict(state)
        shrink_by_hand(twins, twin, latched)
        for each, params in ((optimizer, halves(pairs)), (twin, halves(twins))):
            set_grads(params, step, 5e-2)
            each.step()
        for p, q in zip(halves(pairs), halves(twins), strict=True):
            assert torch.equal(p, q), step
    assert [pair.latched for pair in shrink.stability()] == latched
    assert any(latched)


@pytest.mark.parametrize("name", ["AdamW, schedule-free", "SGD, schedule-free"])
def test_the_average_of_a_schedule_free_optimizer_shrinks_too(name: str) -> None:
    """What is evaluated is the average, which no parameter holds in training."""
    pairs = make_pairs(SHAPES[:1])
    optimizer = ready(RIVALS[name].make(halves(pairs)))
    set_grads(halves(pairs), 0)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.eval()
    average = pairs[0].A.detach().clone()
    optimizer.train()
    slk.StableShrink(optimizer, pairs, shrink_ratio=RATIO)
    set_grads(halves(pairs), 1)
    optimizer.step()
    optimizer.eval()
    assert_all_close([pairs[0].A.detach()], [0.9 * average], rtol=1e-5, atol=1e-7)
    # A step in evaluation, which these optimizers refuse, shrinks nothing.
    before = pairs[0].A.detach().clone()
    with pytest.raises(Exception, match="train mode"):
        optimizer.step()
    assert torch.equal(before, pairs[0].A)


def test_two_optimizers_of_a_pair() -> None:
    """As LoRA's A by Muon and its B by AdamW: A's optimizer shrinks, and takes its step first."""
    pairs = make_pairs(SHAPES)
    muon = torch.optim.Muon([pair.A for pair in pairs], lr=1e-3)
    adamw = torch.optim.AdamW([pair.B for pair in pairs], lr=0.1)
    shrink = slk.StableShrink(muon, pairs, shrink_ratio=RATIO)
    for step in range(20):
        set_grads(halves(pairs), step)
        muon.step()
        adamw.step()
    assert all(pair.latched for pair in shrink.stability())
