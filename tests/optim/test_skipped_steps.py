"""A skipped step changes nothing and forgets nothing, on every path, for every kind of state and
for every reason to skip.

Between two steps someone writes to a parameter, or other gradients come, and the step that first
sees this is skipped. The float64 reference never takes that step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers.optimizers import DEVICE, WRITES, in_float64, make_pairs, params_of, set_grads
from tests.helpers.steps import latches
from tests.optim.options import BF16, FP32, FP64

pytestmark = pytest.mark.usefixtures("one_thread")

LR = 2.0**-4


class Storage(NamedTuple):
    """The parameters' dtype, the optimizer's options, and how far values may be from the
    reference's, relative and absolute.
    """

    dtype: torch.dtype
    options: dict[str, object]
    rtol: float
    atol: float


# Rounding at random moves a bfloat16 value by less than 2^-7 of itself in each of five steps, more
# if it crosses zero. Moments of 8 bits lead each step astray by about a tenth of the learning rate.
STORAGES = {
    "float32": Storage(FP32, {}, 2e-5, 2e-6),
    "bfloat16": Storage(BF16, {}, 5 * 2.0**-7, LR / 4),
    "masters": Storage(BF16, {"master_weights": True}, 2e-5, 2e-6),
    "8 bits": Storage(FP32, {"moments_dtype": torch.uint8}, 2e-5, LR / 2),
    "masters, 8 bits": Storage(
        BF16, {"master_weights": True, "moments_dtype": torch.uint8}, 2e-5, LR / 2
    ),
}


class Grads(NamedTuple):
    """The gradients of one step: the parameter that has none, and their dtype if it is not the
    parameters'.
    """

    missing: str | None = None
    dtype: torch.dtype | None = None


# In the steps before the skipped one, in that one, and in the steps after it.
GRADIENTS = {
    "the same": (Grads(), Grads(), Grads()),
    "one appears": (Grads("lone"), Grads(), Grads()),
    "one goes missing": (Grads(), Grads("lone"), Grads("lone")),
    "one appears and one goes missing": (
        Grads("lone"),
        Grads("layer0.lora_A"),
        Grads("layer0.lora_A"),
    ),
    "one appears in it alone": (Grads("lone"), Grads(), Grads("lone")),
    "others in it and others after it": (Grads(), Grads("lone"), Grads("layer0.lora_B")),
    "another dtype in it alone": (Grads(), Grads(dtype=FP64), Grads()),
}
# A reason that begins so needs max_grad_norm.
CLIPS = "norm"
REASONS = ["none", "found_inf", "GradScaler", "norm", "norm, GradScaler"]


class Run:
    """An optimizer of two pairs and a lone parameter beside the reference of them."""

    def __init__(self, storage: Storage, reason: str) -> None:
        self.reason = reason
        self.pairs = make_pairs([(2, 3, 4), (1, 5, 2)], storage.dtype)
        lone = torch.ones(5, dtype=storage.dtype, device=DEVICE, requires_grad=True)
        options = {"lr": LR, "weight_decay": 0.1, "shrink_ratio": 0.05}
        options["max_grad_norm"] = 0.5 if reason.startswith(CLIPS) else None
        self.optimizer = StableLoRAAdamW(
            [*self.pairs, ("lone", lone)], seed=1, **options, **storage.options
        )
        self.oracle = StableAdamWRef(
            in_float64(self.pairs), [lone.detach().to(FP64, copy=True)], **options
        )
        self.named = dict(
            zip(
                self.optimizer.param_groups[0]["param_names"],
                params_of(self.optimizer),
                strict=True,
            )
        )
        # The reference's tensor for each parameter.
        self.twins = dict(zip(params_of(self.optimizer), self.oracle.params, strict=True))
        # Of gradients, by parameter and dtype.
        self.memory: dict[tuple[torch.Tensor, torch.dtype | None], torch.Tensor] = {}
        self.scaler = torch.amp.GradScaler(
            DEVICE, init_scale=4.0, enabled=reason.endswith("GradScaler")
        )

    def step(self, seed: int, grads: Grads, overflows: bool = False) -> None:
        """A step on new gradients. If one ``overflows``, the reference skips it for its norm, or
        never sees it.
        """
        params = params_of(self.optimizer)
        set_grads(params, seed)
        if grads.missing is not None:
            self.named[grads.missing].grad = None
        present = [p for p in params if p.grad is not None]
        for p in present:
            if overflows:
                p.grad.view(-1)[-1] = math.inf
            # In the same memory in every step, so that only what is new in a step tells that
            # anything is.
            memory = self.memory.setdefault(
                (p, grads.dtype), torch.empty_like(p, dtype=grads.dtype)
            )
            p.grad.data = memory.detach().copy_(p.grad)
        exact = {self.twins[p]: p.grad.double() for p in present}
        if not overflows or self.reason.startswith(CLIPS):
            self.oracle.step(exact)
        for p in present:
            p.grad.mul_(self.scaler.get_scale())
        if self.reason == "found_inf":
            self.optimizer.found_inf = torch.tensor(float(overflows), device=DEVICE)
        # GradScaler makes its scale on the device when it first scales.
        self.scaler.scale(torch.zeros((), device=DEVICE))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def check(self, storage: Storage) -> None:
        """Parameters, counters and latches are the reference's."""
        assert latches(self.optimizer) == self.oracle.latched_at
        for p, twin in self.twins.items():
            entry = self.optimizer.state[p]
            assert entry["step"].item() == self.oracle.state[twin].step
            value = entry.get("master", p).detach()
            assert torch.equal(p.detach(), value.to(p.dtype))
            torch.testing.assert_close(value.double(), twin, rtol=storage.rtol, atol=storage.atol)


def kept(run: Run) -> list[torch.Tensor]:
    """Copies of what a skipped step leaves as it is. A master takes over what was written to its
    parameter.
    """
    entries = [run.optimizer.state[p] for p in params_of(run.optimizer)]
    tensors = [entry[key] for entry in entries for key in sorted(entry) if key != "master"]
    return [t.detach().clone() for t in [*params_of(run.optimizer), *tensors]]


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:1 step was skipped")
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("write", ["none", *WRITES])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_step_after_it_is_that_of_the_reference(backend, storage, write, gradients, reason):
    run, (before, at_skip, after) = Run(STORAGES[storage], reason), GRADIENTS[gradients]
    for seed in range(2):
        run.step(seed, before)
    b = run.pairs[0].B
    if write != "none":
        with torch.no_grad():
            WRITES[write](run.optimizer, b)
            run.twins[b].fill_(100)
    unchanged = kept(run)
    run.step(2, at_skip, overflows=reason != "none")
    assert all(map(torch.equal, kept(run), unchanged)) == (reason != "none")
    for seed in range(3, 5):
        run.step(seed, after)
    run.check(STORAGES[storage])
    assert write == "none" or b.min() > 95
    assert run.optimizer.nonfinite_steps == (reason == "norm")
