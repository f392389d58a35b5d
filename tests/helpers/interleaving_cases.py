"""Launches for the interleaving tests: of tiny calls of every op, for every kernel with a shared sum, and of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stablelora_kernels.dispatch import mlp, problem, rules, tiles
from stablelora_kernels.dispatch.problem import Rule
from stablelora_kernels.dispatch.settings import use_backend
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.reference import StableAdamWRef
from tests.helpers import case_checks
from tests.helpers.cases import BF16, FP32, Case, forced, leaves, make, ours
from tests.helpers.optimizers import in_float64, make_pairs, params_of, set_grads
from tests.helpers.steps import assert_close_to

K, N, R = 16, 16, 4
# Dispatch takes the split-K kernel up to FEW rows.
FEW, MANY = 12, 24


class Launched(NamedTuple):
    """Launches of one stream. ``check`` asserts that the tensors hold the right results."""

    launches: Sequence[Launch]
    check: Callable[[], None]
    # Tensors that kernels reach through addresses in tables.
    others: Sequence[Tensor] = ()


def shrink_sizes(patch: pytest.MonkeyPatch) -> None:
    """Tiny tiles, and two programs for each sum."""
    for module in (tiles, mlp):
        for name in (name for name in dir(module) if name.endswith("_TILES")):
            # A descriptor holds no quarter of 16 columns in bfloat16.
            wide = "TMA" in name or "GATE_UP" in name
            patch.setattr(module, name, (Rule(lambda d, c: True, Tile(8, 32 if wide else 16, 8, 1, 2), "a test"),))
    patch.setattr(tiles, "plan_split_k", lambda device, tiles, steps, **_: 2 if steps > 1 else 1)
    patch.setattr(problem, "SMALL_M", FEW)
    patch.setattr(problem, "CHAINED_M", 0)


@contextmanager
def new_memory_is_poisoned() -> Iterator[None]:
    """``torch.empty`` holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def kept(patch: pytest.MonkeyPatch) -> list[Launch]:
    """A list of all launches from now on, which are not run."""
    launches: list[Launch] = []

    def keep(launch: Launch, device: torch.device) -> None:
        launches.append(launch._replace(options={}))

    patch.setattr(Launch, "run", keep)
    return launches


def calls(case: Case, patch: pytest.MonkeyPatch, backward: bool = False, layers: int = 1) -> Launched:
    """The launches of ``layers`` calls, which share counters: forward, or ``backward`` behind a forward that has run."""
    case = case if backward else case.but(wanted=())
    every, launches = [], []
    for seed in range(layers):
        one = case.but(seed=seed)
        given = make(one)
        # A forward keeps what backward would want.
        leaf = leaves(one if backward else one.but(wanted=None), given)
        grads = [given[f"grad{i}"] for i in one.outputs()]
        with forced(one), patch.context() as here:
            made = [] if backward else kept(here)
            ys = ours(one, leaf)
            found = {f"Y{i}": y.detach() for i, y in enumerate(ys)}
            if backward:
                made = kept(here)
                wanted = one.wanted_names
                found |= zip(wanted, torch.autograd.grad(ys, [leaf[name] for name in wanted], grads), strict=True)
        launches += made
        every.append((one, found, given))

    def check() -> None:
        for each in every:
            case_checks.check(*each)

    return Launched(launches, check)


def group_of_shared_sums(patch: pytest.MonkeyPatch) -> Launched:
    """S of three projections, then each one's Y, whose programs share sums."""
    patch.setattr(rules, "choose_form", lambda device, call, described: "split_k")
    patch.setattr(tiles, "fill_split_k", tiles.plan_split_k)
    return calls(GROUP, patch)


def split_branch(patch: pytest.MonkeyPatch) -> Launched:
    patch.setattr(rules, "CHAINED_M", 0)
    return calls(BRANCH, patch, backward=True)


def optimizer_steps(patch: pytest.MonkeyPatch) -> Launched:
    """Two clipped steps: the first measures all sums of squares, the second goes by those that the first has left."""
    launches = kept(patch)
    patch.setattr(TritonStep, "CHUNK", 16)
    options = {"lr": 2e-2, "shrink_ratio": 0.01, "max_grad_norm": 0.1}
    pairs = make_pairs([(2, 7, 9)])
    for pair in pairs:
        pair.B.data.normal_(generator=torch.Generator().manual_seed(1))
    oracle = StableAdamWRef(in_float64(pairs), **options)
    with use_backend("triton"):
        optimizer = StableLoRAAdamW(pairs, **options)
        params = params_of(optimizer)
        set_grads(params, 3)
        for _ in range(2):
            optimizer.step()
            oracle.step({q: p.grad.double() for p, q in zip(params, oracle.params, strict=True)})
    state = [value for p in params for value in optimizer.state[p].values()]
    others = [t.detach() for t in (*params, *(p.grad for p in params), *state)]
    return Launched(launches, lambda: assert_close_to(oracle, optimizer), others)


def linear(rows: int, kernel: str, arch: str = "sm_90", dtype: torch.dtype = FP32) -> Case:
    return Case("linear", (rows, K), (N,), (R,), dtype, dtype, kernel=kernel, arch=arch, processors=2)


BRANCH = linear(MANY, "auto").but(op="branch")
GROUP = Case("group", (16, K), (8, 8, 8), (R, R, R), arch="sm_120", processors=2)
NF4 = linear(8, "auto").but(shape=(8, 64), quantized=("nf4",))
FP8 = linear(FEW, "auto").but(quantized=("fp8",))
GATED = Case("mlp", (16, K), (32, 32, 8), (R, R, R), BF16, BF16, kernel="split", arch="sm_90", processors=2)
# The gradients of down, and of gate and up no more than shows dG and dU.
GATED_BACKWARD = GATED.but(
    shape=(8, K), sizes=(16, 16, 8), dtype=FP32, lora_dtype=FP32, kernel="chained", activation="gelu",
    wanted=("lora_B", "lora_A2"),
)  # fmt: skip


def forward(case: Case, layers: int = 1) -> Callable[[pytest.MonkeyPatch], Launched]:
    return partial(calls, case, layers=layers)


def backward(case: Case) -> Callable[[pytest.MonkeyPatch], Launched]:
    return partial(calls, case, backward=True)


# sm_90 has tensor descriptors, sm_120 has none. The names appear in test ids.
CASES: dict[str, Callable[[pytest.MonkeyPatch], Launched]] = {
    "split-K, S then Y, two layers": forward(linear(FEW, "split"), 2),
    "split-K, S beside Y": forward(linear(FEW, "fused")),
    "split-K, dS and dB, dX and dA": backward(linear(FEW, "split")),
    "pointers, S then Y, two layers": forward(linear(16, "split", "sm_120"), 2),
    "pointers, dS and dB, dX and dA": backward(linear(16, "split", "sm_120")),
    "descriptors, S then Y": forward(linear(MANY, "split", dtype=BF16)),
    "descriptors, dS and dB, dX and dA": backward(linear(MANY, "split", dtype=BF16)),
    "chained split-K, S and Y, two layers": forward(linear(FEW, "chained"), 2),
    "chained pointers, S and Y, two layers": forward(linear(MANY, "chained", "sm_120"), 2),
    "chained descriptors, S and Y, two layers": forward(linear(MANY, "chained", dtype=BF16), 2),
    "chained split-K, all gradients": backward(linear(FEW, "chained")),
    "chained pointers, all gradients": backward(linear(MANY, "chained", "sm_120")),
    "chained descriptors, all gradients": backward(linear(MANY, "chained", dtype=BF16)),
    "branch, dS and dB, dX and dA": split_branch,
    "chained branch, all gradients": backward(BRANCH),
    "dX, then dA and dB": backward(linear(FEW, "fused")),
    "group, S then three Y": forward(GROUP),
    "group, S then three split-K Y": group_of_shared_sums,
    "group, three dX, then dA": backward(GROUP),
    "quantized, S then Y": forward(NF4),
    "quantized, dS and dB, dX, dA": backward(FP8),
    "gate and up by pointers, S to Y": forward(GATED.but(arch="sm_120")),
    "gate and up by descriptors, S to Y": forward(GATED),
    "chained gated split-K, all gradients": backward(GATED_BACKWARD),
    "optimizer, two clipped steps": optimizer_steps,
}
