"""Random lives of an optimizer: steps, edits, lost and replaced state, writes from outside, saves,
loads and copies.

Every step is compared with one step of the float64 reference from the values before it. The bound
is twice the error of the same step in eager float32, and a few roundings.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.state import load_moment
from stablelora_kernels.reference.optimizer import (
    AdamWState,
    adamw_ref,
    clip_coefficient_ref,
    shrink_ref,
)
from tests.helpers.optimizers import DEVICE, params_of
from tests.helpers.steps import saved_and_loaded

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("one_thread")]

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(3, 5, 9), (1, 7, 4)]
EPS = torch.finfo(FP32).eps
GRADS = ["normal", "normal", "none", "zero", "small", "huge", "nan", "inf", "strided", "expanded"]
SIZE = {"zero": 0.0, "small": 1e-20, "huge": 1e4, "nan": 1.0, "inf": 1.0}
# A second group, so that edits of one must not reach the other.
NAMES = ["p0.lora_A", "p0.lora_B", "p1.lora_A", "p1.lora_B", "lone"]
SEEDS = st.integers(0, 2**16)
KEYS = ["exp_avg", "exp_avg_sq", "step", "latched_at"]
WRITES = ["no_grad", "detach", "memory", "data"]
# As a hyperparameter; a power of two, so that it is the same number in every dtype.
TENSOR = torch.tensor(2.0**-10, device=DEVICE)
EDITS = [
    ("lr", 1e-3),
    ("lr", 0.0),
    ("lr", TENSOR),
    ("weight_decay", 0.5),
    ("shrink_ratio", 0.3),
    ("betas", (0.5, 0.9)),
]
WHICH = st.integers(0, len(NAMES) - 1)


def random(shape: Sequence[int], seed: int, size: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * (torch.randn(*shape, generator=generator) + 0.3)).to(DEVICE, dtype)


class Before:
    """What the reference needs of one parameter before a step, in ``dtype``."""

    def __init__(self, optimizer: StableLoRAAdamW, p: Tensor, dtype: torch.dtype) -> None:
        entry = optimizer.state.get(p, {})
        value = p.detach()
        if "master" in entry:
            master = entry["master"]
            value = torch.where(master.to(p.dtype) == p.detach(), master, p.detach().float())
        self.value = value.to(dtype, copy=True)
        moments = []
        for name in ("exp_avg", "exp_avg_sq"):
            work = FP64 if p.dtype is FP64 else FP32
            moments.append(
                load_moment(entry, name, work).to(dtype, copy=True) if name in entry else None
            )
        zero = torch.zeros_like(self.value)
        m, v = (zero if moment is None else moment for moment in moments)
        self.state = AdamWState(m, v, int(entry.get("step", 0)))
        self.latched_at = int(entry.get("latched_at", 0))


class Life(RuleBasedStateMachine):
    @initialize(
        backend=st.sampled_from(["torch", "triton"]),
        dtype=st.sampled_from([FP32, FP32, BF16, FP16, FP64]),
        moments=st.sampled_from([FP32, FP32, BF16, torch.uint8]),
        master=st.booleans(),
        clip=st.sampled_from([None, None, 0.1, math.inf]),
        lr_ratio=st.sampled_from([1.0, 4.0]),
        never=st.booleans(),
        seed=SEEDS,
    )
    def begin(self, backend, dtype, moments, master, clip, lr_ratio, never, seed) -> None:
        assume(not (backend == "triton" and dtype is FP64))
        self.backend, self.dtype = backend, dtype
        params = [
            random(shape, seed + i, 0.3 if i % 2 == 0 else 1e-4, dtype).requires_grad_()
            for i, shape in enumerate([(3, 9), (5, 3), (1, 4), (7, 1), (6,)])
        ]
        self.options: dict[str, Any] = {
            "seed": seed, "lr_ratio_B": lr_ratio, "max_grad_norm": clip, "stop_condition": "never" if never else "norm",
            "master_weights": master, "moments_dtype": moments,
        }  # fmt: skip
        self.optimizer = self.build(params, lr=1e-2, shrink_ratio=0.1)
        self.skipped = 0

    def build(self, params: list[Tensor], **options: Any) -> StableLoRAAdamW:
        named = list(zip(NAMES, params, strict=True))
        groups = [{"params": named[:2]}, {"params": named[2:], "weight_decay": 0.2}]
        return StableLoRAAdamW(groups, **self.options, **options)

    @property
    def params(self) -> list[Tensor]:
        return params_of(self.optimizer)

    # Steps

    @rule(kinds=st.lists(st.sampled_from(GRADS), min_size=5, max_size=5), seed=SEEDS)
    def step(self, kinds: list[str], seed: int) -> None:
        for i, (p, kind) in enumerate(zip(self.params, kinds, strict=True)):
            p.grad = None
            if kind != "none":
                shape = [*p.shape[::-1]] if kind == "strided" else p.shape
                grad = random(shape, seed + i, SIZE.get(kind, 1e-2), p.dtype)
                p.grad = (
                    grad.t()
                    if kind == "strided"
                    else grad[:1].expand_as(p)
                    if kind == "expanded"
                    else grad
                )
            if kind in ("nan", "inf"):
                p.grad.view(-1)[0] = float(kind)
        expected, eager = self.one_step(FP64), self.one_step(FP32)
        before = [p.detach().clone() for p in self.params]
        with settings(backend=self.backend):
            self.optimizer.step()
        for name, p, old, exact, plain in zip(
            NAMES, self.params, before, expected, eager, strict=True
        ):
            if exact is None:
                assert torch.equal(p.detach().nan_to_num(), old.nan_to_num()), (
                    f"{name} changed without a step"
                )
            else:
                self.check(name, p, exact, plain)

    def one_step(self, dtype: torch.dtype) -> list[tuple[Before, Tensor] | None]:
        """The reference's step in ``dtype``: each parameter's values after it, and the size of what
        was added up, or None.
        """
        counts, dtype = dtype is FP64, FP64 if self.dtype is FP64 else dtype
        grads = [None if p.grad is None else p.grad.to(dtype) for p in self.params]
        present = [g for g in grads if g is not None]
        coefficient = (
            clip_coefficient_ref(present, self.options["max_grad_norm"]) if present else None
        )
        if counts and coefficient is None and present:
            self.skipped += 1
        if coefficient is None:
            return [None] * len(grads)
        found = [Before(self.optimizer, p, dtype) for p in self.params]
        olds = [before.value.abs() for before in found]
        groups = [group for group in self.optimizer.param_groups for _ in group["params"]]
        for a, b in ((0, 1), (2, 3)):
            if grads[a] is not None:
                latched = found[a].latched_at > 0
                # In float32 too the decision is float64's.
                halves, own = (found[a].value.double(), found[b].value.double()), groups[a]
                shrunk, now = shrink_ref(
                    *halves, latched, own["shrink_ratio"], own["stop_condition"]
                )
                found[a].value = shrunk.to(dtype)
                if now and not latched:
                    found[a].latched_at = found[a].state.step + 1
        result: list[tuple[Before, Tensor] | None] = []
        for i, (before, g, group) in enumerate(zip(found, grads, groups, strict=True)):
            if g is None:
                result.append(None)
                continue
            size = before.state.exp_avg.abs() + (g * coefficient).abs()
            lr = group["lr"] * (group["lr_ratio_B"] if i in (1, 3) else 1.0)
            hyper = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            before.value = adamw_ref(before.value, g * coefficient, before.state, lr=lr, **hyper)
            step = before.state.step
            root = (before.state.exp_avg_sq / (1 - group["betas"][1] ** step)).sqrt() + group["eps"]
            result.append((before, olds[i] + lr * size / (1 - group["betas"][0] ** step) / root))
        return result

    def check(self, name: str, p: Tensor, exact: tuple[Before, Tensor], eager: Any) -> None:
        (want, size), entry = exact, self.optimizer.state[p]
        assert int(entry["step"]) == want.state.step
        assert "lora_A" not in name or int(entry["latched_at"]) == want.latched_at, name
        plain = eager[0]
        low = "master" not in entry and p.dtype in (BF16, FP16)
        rounding = (2 * want.value.abs() * torch.finfo(p.dtype).eps + 2.0**-23) if low else 0.0
        value = entry.get("master", p).detach()
        largest = torch.finfo(p.dtype).max if low else None
        close(name, value, want.value, plain.value, 16 * EPS * size + rounding, largest)
        if "master" in entry:
            assert torch.equal(p.detach().nan_to_num(), entry["master"].to(p.dtype).nan_to_num())
        for key in ("exp_avg", "exp_avg_sq"):
            found = load_moment(entry, key, FP32 if entry[key].dtype is not FP64 else FP64)
            target = getattr(want.state, key)
            rest = (
                target.abs() * {BF16: 2.0**-7, torch.uint8: 0.13}.get(entry[key].dtype, 0.0) + 1e-37
            )
            if entry[key].dtype is torch.uint8:
                if not target.isfinite().all():
                    # A block with a value that is not finite is NaN as a whole.
                    continue
                rest = rest + target.abs().max() * 2.0**-15
            # The size of what a moment is the sum of.
            size = target.double().abs() + p.grad.double().abs() ** (1 if key == "exp_avg" else 2)
            close(
                f"{key} of {name}", found, target, getattr(plain.state, key), 8 * EPS * size + rest
            )

    # Edits

    @rule(group=st.integers(0, 1), edit=st.sampled_from(EDITS))
    def edit_group(self, group: int, edit: tuple[str, Any]) -> None:
        self.optimizer.param_groups[group].update([edit])

    @rule()
    def switch_backend(self) -> None:
        if self.dtype is not FP64:
            self.backend = "triton" if self.backend == "torch" else "torch"

    # State lost and replaced

    @rule(how=st.sampled_from(["clear", "new", "pop", "clear one"]), which=WHICH)
    def lose_state(self, how: str, which: int) -> None:
        state, p = self.optimizer.state, self.params[which]
        if how == "clear":
            state.clear()
        elif how == "new":
            self.optimizer.state = {}
        elif how == "pop":
            state.pop(p, None)
        elif p in state:
            state[p].clear()
        self.step(["normal"] * len(NAMES), which)

    @rule(which=WHICH, key=st.sampled_from(KEYS), equal=st.booleans(), seed=SEEDS)
    def replace_state(self, which: int, key: str, equal: bool, seed: int) -> None:
        entry = self.optimizer.state.get(self.params[which], {})
        if key not in entry:
            return
        if equal:
            entry[key] = entry[key].clone()
        elif key in ("step", "latched_at"):
            entry[key] = torch.full_like(entry[key], seed % 5)
        elif entry[key].dtype is not torch.uint8:
            entry[key] = random(entry[key].shape, seed, 1e-2, entry[key].dtype).abs()
        self.step(["normal"] * len(NAMES), seed)

    # Writes from outside

    @rule(
        which=WHICH,
        how=st.sampled_from(WRITES),
        size=st.sampled_from([1e-3, 1.0, 50.0]),
        seed=SEEDS,
    )
    def write(self, which: int, how: str, size: float, seed: int) -> None:
        p = self.params[which]
        value = random(p.shape, seed, size, p.dtype)
        if how == "no_grad":
            with torch.no_grad():
                p.copy_(value)
        elif how == "detach":
            p.detach()[0] = value[0]
        elif how == "memory":
            p.data = value
        else:
            p.data.copy_(value)
            self.optimizer.refresh()
        self.step(["normal"] * len(NAMES), seed)

    # Saves, loads, copies

    @rule(fresh=st.booleans(), file=st.booleans())
    def save_and_load(self, fresh: bool, file: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if not all(p.isfinite().all() for p in self.params[:4]):
                with pytest.raises(RuntimeError, match="not finite"):
                    self.optimizer.state_dict()
                return
            state = self.optimizer.state_dict()
        assert len(state["state"]) == len(self.optimizer.state)
        state = saved_and_loaded(state) if file else copy.deepcopy(state)
        if fresh:
            params = [p.detach().clone().requires_grad_() for p in self.params]
            self.optimizer, self.skipped = self.build(params, lr=0.5, shrink_ratio=0.9), 0
        self.optimizer.load_state_dict(state)

    @rule(pickled=st.booleans())
    def make_copy(self, pickled: bool) -> None:
        self.optimizer = (
            pickle.loads(pickle.dumps(self.optimizer)) if pickled else copy.deepcopy(self.optimizer)
        )

    @invariant()
    def counts_are_kept(self) -> None:
        if hasattr(self, "optimizer"):
            assert self.optimizer.nonfinite_steps == self.skipped
            assert self.optimizer.max_grad_norm == self.options["max_grad_norm"]


def close(
    name: str,
    found: Tensor,
    exact: Tensor,
    eager: Tensor,
    floor: Tensor,
    largest: float | None = None,
) -> None:
    """``found`` is off by at most ``floor`` and twice ``eager``'s error; where eager is not finite
    it isn't either.
    """
    error, theirs = (found.double() - exact.double()).abs(), (eager.double() - exact.double()).abs()
    finite = eager.isfinite() & exact.isfinite()
    if largest is not None:
        finite &= exact.abs() < 0.99 * largest
    over = (error > 2 * theirs + floor) | ~error.isfinite()
    assert not (over & finite).any(), (
        f"{name} is off by {error[finite].max():.3g}, eager by {theirs[finite].max():.3g}"
    )
    if largest is None:
        assert not found[~finite & eager.isnan()].isfinite().any(), (
            f"{name} is finite where eager is not"
        )


TestLife = Life.TestCase
