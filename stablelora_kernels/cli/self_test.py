"""The self-test of ``doctor``: every kernel on small inputs, within the bound on errors that this
repository's tests use.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels import testing
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import settings
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.optim import StableLoRAAdamW, StableShrink
from stablelora_kernels.pairs import lora_pairs
from stablelora_kernels.reference import StableAdamWRef
from stablelora_kernels.testing import Deviation
from stablelora_kernels.testing.cases import BF16, FP16, FP32, Case, make, run
from stablelora_kernels.testing.expectations import by_parts, expectations, next_keep
from stablelora_kernels.testing.ops import MLP, CrossEntropy

# Exact in 16 bits: the PyTorch path on a CPU draws 16 bits per element and would round another
# probability.
DROPOUT = 0.125
Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A check of one kernel family. ``run`` returns how far each result is off, and how far it may
    be.
    """

    family: str
    case: str
    run: Callable[[torch.device], list[Deviation]]
    # Whether it launches Triton kernels where Triton is the backend.
    has_kernels: bool = True


# On Hopper and Blackwell they launch every kernel: dispatch chooses them for these sizes. Only for
# gate and up in one kernel it wants larger sizes, so "one_launch" asks for that.
CALLS: dict[str, dict[str, Case]] = {
    "lora_linear": {
        "few rows, bf16": Case("linear", (9, 48), (72,), (8,), BF16),
        "many rows, bf16": Case("linear", (70, 96), (136,), (16,), BF16),
        "odd sizes, bf16": Case("linear", (67, 37), (71,), (3,), BF16),
        "bf16 adapters": Case("linear", (70, 96), (136,), (16,), BF16, BF16),
        "many rows, fp16": Case("linear", (70, 96), (136,), (16,), FP16),
        "many rows, fp32": Case("linear", (70, 48), (72,), (8,)),
        "dropout, bf16": Case("linear", (70, 48), (72,), (8,), BF16, p=DROPOUT),
    },
    "lora_linear_group": {
        "3 projections, bf16": Case("group", (70, 96), (72, 24, 24), (8, 4, 4), BF16),
        "dropout, fp16": Case("group", (70, 96), (72, 24, 24), (8, 4, 4), FP16, p=DROPOUT),
    },
    "lora_linear_quantized": {
        "NF4, nested scales": Case(
            "linear", (37, 128), (72,), (8,), BF16, quantized=("nf4 nested",)
        ),
        "NF4, many rows": Case("linear", (300, 128), (72,), (8,), BF16, quantized=("nf4",)),
        "float8": Case("linear", (37, 128), (72,), (8,), BF16, quantized=("fp8",)),
        "NVFP4": Case("linear", (37, 128), (144,), (8,), BF16, quantized=("nvfp4 swizzled",)),
        "MXFP4": Case("linear", (37, 128), (72,), (8,), BF16, quantized=("mxfp4",)),
    },
    "lora_branch": {"bf16": Case("branch", (70, 48), (72,), (8,), BF16)},
    "lora_mlp": {
        "bf16": Case("mlp", (70, 64), (96, 96, 64), (8, 4, 8), BF16),
        "odd sizes, bf16": Case("mlp", (67, 37), (71, 71, 41), (3, 5, 3), BF16),
        "gate and up in one, bf16": Case(
            "mlp", (70, 64), (96, 96, 64), (8, 4, 8), BF16, strategy="one_launch"
        ),
        "gate and up in one, odd": Case(
            "mlp", (67, 37), (71, 71, 41), (3, 5, 3), BF16, strategy="one_launch"
        ),
        "dropout, fp16": Case("mlp", (70, 64), (96, 96, 64), (8, 4, 8), FP16, p=DROPOUT),
        "in tiles, dropout, bf16": Case(
            MLP(tile_rows=40), (70, 64), (96, 96, 64), (8, 4, 8), BF16, p=DROPOUT
        ),
        "NF4 and float8, bf16": Case(
            "mlp", (300, 64), (96, 96, 64), (8, 4, 8), BF16, quantized=("nf4 nested", "nf4", "fp8")
        ),
    },
    # One of the experts has no rows.
    "lora_experts": {
        "bf16": Case("experts", (70, 48), (72,), (8,), BF16),
        "fp32": Case("experts", (70, 48), (72,), (8,)),
    },
    # One of the experts has no rows, and some slots choose none here.
    "lora_experts_mlp": {
        words: Case("experts mlp", (37, 48), (64, 48), (8, 8), dtype, dtype, bias=(True, True))
        for words, dtype in (("bf16", BF16), ("fp32", FP32))
    },
    "lora_linear_cross_entropy": {
        words: Case(CrossEntropy(softcap=5.0), (37, 48), (211,), (8,), dtype, dtype, bias=(False,))
        for words, dtype in (("bf16", BF16), ("fp32", FP32))
    },
    "DoRA": {
        "bf16": Case("DoRA", (70, 48), (72,), (8,), BF16),
        "fp32": Case("DoRA", (70, 48), (72,), (8,)),
    },
}


def checks() -> list[Check]:
    """Every check: the calls, and what is no call of an op."""
    return [
        *(
            Check(family, words, partial(check_call, case), case.description.has_kernels)
            for family, calls in CALLS.items()
            for words, case in calls.items()
        ),
        Check("dropout's mask", "forward and backward", check_mask),
        Check("stable_adamw", "3 steps, fp32", partial(check_step, dtype=FP32)),
        Check("stable_adamw", "3 steps, bf16", partial(check_step, dtype=BF16)),
        Check("stable_shrink", "3 steps, fp32", partial(check_step, dtype=FP32, by_hook=True)),
    ]


def run_checks(device: torch.device) -> Iterator[Result]:
    """Yield each check's result, on the current backend."""
    for check in checks():
        yield run_check(check, device)


def run_checks_in_processes(device: torch.device, count: int) -> Iterator[Result]:
    """:func:`run_checks` by ``count`` processes, in the same order. On a GPU that has not run the
    kernels before, nearly all of the time is the compiler's, which uses one core a process.
    """
    checks_of = [(check.family, check.case) for check in checks()]
    done = 0
    # A process that is forked could not use the GPU.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        try:
            names = repeat(str(device)), repeat(settings.backend)
            for result in pool.map(_run_numbered, range(len(checks_of)), *names):
                yield result
                done += 1
        except BrokenProcessPool as error:
            # A kernel may end its process. The pool does not say which of those left it was.
            for family, case in checks_of[done:]:
                yield result_of(family, case, f"a process of the self-test ended early: {error}")


def _run_numbered(number: int, device: str, backend_name: str) -> Result:
    with settings(backend=backend_name):
        return run_check(checks()[number], torch.device(device))


def run_check(check: Check, device: torch.device) -> Result:
    """A check's result, on the current backend. A forced strategy and first use are turned off
    meanwhile.
    """
    counts: Counter[str] = Counter()
    if on_triton := backend.resolve_backend(device) == "triton":
        from stablelora_kernels.launch.base import launch_counts as counts
    begun = time.perf_counter()
    before = counts.copy()
    figures: dict[str, Any] = {}
    problem = None
    try:
        # The same masks at each run. The caller's generators keep their states.
        with (
            # First use would give PyTorch's result in place of a wrong one.
            settings(strategy="auto", first_use="off"),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(0)
            nearest = max(check.run(device), key=lambda deviation: deviation.share)
        figures = nearest._asdict()
        if not nearest.error <= nearest.bound:
            problem = f"{nearest.of} is off by {nearest.error:.3g}, allowed {nearest.bound:.3g}"
    except Exception as raised:  # doctor reports any failure.
        problem = " ".join(f"{type(raised).__name__}: {raised}".split())
    # The counts include the vendor library's products.
    kernels = sorted(
        name.removeprefix("_").removesuffix("_kernel")
        for name in counts - before
        if name != "vendor"
    )
    if on_triton and check.has_kernels and not kernels and problem is None:
        problem = "no Triton kernel was launched"
    seconds = round(time.perf_counter() - begun, 3)
    return result_of(check.family, check.case, problem, **figures, kernels=kernels, seconds=seconds)


def result_of(family: str, case: str, problem: str | None, **known: Any) -> Result:
    """A check's result, with the Triton ``kernels`` that it launched. ``problem`` says why it
    failed, or is None.
    """
    unknown: Result = {"error": None, "bound": None, "of": "", "kernels": [], "seconds": 0.0}
    return {
        "family": family,
        "case": case,
        **unknown,
        **known,
        "problem": problem,
        "passed": problem is None,
    }


def check_call(case: Case, device: torch.device) -> list[Deviation]:
    """One call of an op, forward and backward."""
    case = case.but(device=str(device), backend=backend.resolve_backend(device))
    operands = make(case)
    results = by_parts(case, run(case, operands))
    measured = []
    for name, expected in expectations(case, operands).items():
        label = name if name.startswith("Y") else f"d{name}"
        check_shape(label, results[name], expected.ref)
        measured += expected.deviations(results[name], label)
    return measured


def check_shape(name: str, value: Tensor, ref: Tensor) -> None:
    if value.shape != ref.shape:
        raise AssertionError(f"{name} must be {list(ref.shape)}, got {list(value.shape)}")


def check_mask(device: torch.device) -> list[Deviation]:
    """Compare the masks of forward, backward and the reference element by element.

    With a zero weight and identities as A and B, Y is the mask times a constant for X = 1, and so
    is dX for dY = 1.
    """
    m, k = 70, 64
    x = torch.ones(m, k, dtype=BF16, device=device).requires_grad_()
    eye = torch.eye(k, dtype=BF16, device=device).requires_grad_()
    torch.manual_seed(0)
    y = lora_linear(x, torch.zeros_like(eye), None, eye, eye, 1.0, DROPOUT)
    keep = testing.keep_of(y, x)
    words = testing.kept_for_backward(y, torch.int32)
    if words is not None and words.dim() == 2:
        torch.manual_seed(0)
        keep, _ = next_keep(m, k, DROPOUT, "triton", str(device))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    kept = int(keep.sum())
    # Five standard deviations of a binomial.
    if abs(kept - (1 - DROPOUT) * m * k) > 5 * (DROPOUT * (1 - DROPOUT) * m * k) ** 0.5:
        raise AssertionError(
            f"the mask must keep about {1 - DROPOUT:g} of {m * k} elements, got {kept}"
        )
    wrong = int(((y != 0) != keep).sum() + ((dx != 0) != keep).sum())
    return [Deviation(wrong, 0, "elements")]


def check_step(
    device: torch.device, *, dtype: torch.dtype, by_hook: bool = False
) -> list[Deviation]:
    """Three steps over a shrinking pair, one that latches at once and a lone parameter; the latch
    steps must be the oracle's. ``by_hook``: the steps of torch's AdamW with a StableShrink.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(device, dtype)

    start = {
        "shrinks.lora_A": normal(8, 40), "shrinks.lora_B": normal(24, 8, std=0.0),
        "latches.lora_A": normal(3, 5, std=0.1), "latches.lora_B": normal(31, 3, std=9.0), "lone": normal(17),
    }  # fmt: skip
    grads = [
        {name: normal(*tensor.shape, std=1e-2) for name, tensor in start.items()} for _ in range(3)
    ]
    settings: dict[str, Any] = {"lr": 1e-2, "shrink_ratio": 5e-3}

    ours = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    shrunk: StableLoRAAdamW | StableShrink
    optimizer: torch.optim.Optimizer
    if by_hook:
        optimizer = torch.optim.AdamW(ours.values(), lr=settings["lr"])
        pairs = lora_pairs(ours.items())
        shrunk = StableShrink(optimizer, pairs, shrink_ratio=settings["shrink_ratio"], seed=1)
    else:
        optimizer = shrunk = StableLoRAAdamW(list(ours.items()), seed=1, **settings)
    for step in grads:
        for name, tensor in ours.items():
            tensor.grad = step[name]
        optimizer.step()

    def plain(kind: torch.dtype) -> tuple[dict[str, Tensor], dict[str, int | None]]:
        """Algorithm 1 operator by operator in the dtype ``kind``: the parameters and the latch
        steps.
        """
        named = {name: tensor.to(kind, copy=True) for name, tensor in start.items()}
        reference = StableAdamWRef(lora_pairs(named.items()), [named["lone"]], **settings)
        for step in grads:
            reference.step({tensor: step[name].to(kind) for name, tensor in named.items()})
        return named, reference.latched_at

    refs, latched_at = plain(torch.float64)
    latches = {pair.name: pair.latched_at for pair in shrunk.stability()}
    if latches != latched_at or sorted(latched_at.values(), key=str) != [1, None]:
        raise AssertionError(f"the pairs must latch at steps {latched_at}, got {latches}")
    baselines = plain(dtype)[0]
    measured = []
    for name, parameter in ours.items():
        check_shape(name, parameter, refs[name])
        measured += testing.deviations(
            parameter.detach(), refs[name], baselines[name], dtype=dtype, name=name
        )
    return measured
