"""The first tests that a GPU runs: each kernel, in the simplest call that takes it, and each way of
launching it.

``benchmarks.lab.gpu`` runs them first, in the order of its ``stages``, in which each takes one step
beyond those before it, and ``test_nvidia_tools`` runs them under compute-sanitizer. So they are
few, small, and do not fill memory with NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stablelora_kernels import StableLoRAAdamW, settings
from stablelora_kernels.cli.self_test import checks, run_check
from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.problem import Device, device_of
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.functional import lora_linear_cross_entropy
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.fill_jobs import forward_product
from stablelora_kernels.launch.thin_products import lora_down
from stablelora_kernels.ops.dropout import new_mask
from stablelora_kernels.ops.meta_calls import linear_launches
from stablelora_kernels.projection import Projection
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.reference import StableAdamWRef
from stablelora_kernels.testing import assert_no_worse, cases
from stablelora_kernels.testing.cases import BF16, FP32, Case
from tests.helpers import case_checks, gpu_checks
from tests.helpers.cases import kinds_of
from tests.helpers.gpu_checks import DEVICE, SMALL, keep_rows, linear, make
from tests.helpers.launches import count_launches
from tests.helpers.optimizers import SHAPES, in_float64, make_pairs
from tests.helpers.steps import assert_close_to, take_step_with

pytestmark = pytest.mark.gpu

GPU = device_of(DEVICE)
by_dropout = pytest.mark.parametrize("p", (0.0, 0.1))
# M, N, K, r. Of "many tiles" there are more than any GPU has processors, so that programs take a
# second one, in Y or in dX.
SIZES = {
    "high rank": (131, 71, 67, 130),
    "odd rows": (131, 71, 67, 20),
    "even rows": (260, 264, 520, 16),
    "one tile": (100, 128, 200, 16),
    "many tiles": (2048, 4608, 512, 16),
    "many tiles of dX": (2048, 512, 4608, 16),
    "few rows": (16, 512, 1024, 16),
    "long sum": (200, 1024, 1024, 16),
}
SMALL_SIZES = dict.fromkeys(SIZES, (70, 48, 40, 8)) | {
    "high rank": (67, 40, 33, 130), "odd rows": (67, 40, 33, 3), "many tiles": (70, 1032, 40, 8),
    "many tiles of dX": (70, 40, 1032, 8), "few rows": (9, 48, 40, 8), "long sum": (16, 40, 48, 8),
}  # fmt: skip
# The kernel of whole tiles for rows that tensor descriptors take.
TMA = "linear_tma" if GPU.tma else "linear"
# What a call launches on every GPU, forward and backward.
LAUNCHED = {
    # S has a launch of its own.
    ("high rank", "branch_first"): {"down", "linear"},
    ("few rows", "few_rows"): {"linear_split_k"},
    ("odd rows", "branch_first"): {"linear"},
    ("odd rows", "one_launch"): {"linear"},
    ("one tile", "one_launch"): {TMA},
    ("even rows", "one_launch"): {TMA},
}
# On a GPU with enough processors, programs share sums here (split-K): dispatch says whether they do.
ASKED = (
    ("many tiles", "one_launch"),
    ("many tiles of dX", "one_launch"),
    ("long sum", "one_launch"),
)
# "few_rows" draws no masks.
CALLS = [
    (*call, p)
    for call in (*LAUNCHED, *ASKED)
    for p in ((0.0,) if "few_rows" in call else (0.0, 0.1))
]


def name_of(kernel: str) -> str:
    return kernel.removeprefix("_lora_").removesuffix("_kernel")


def listed_by_dispatch(
    device: Device, sizes: tuple[int, int, int, int], strategy: str, p: float
) -> set[str]:
    """The kernels that a call launches on ``device``, forward and backward."""
    ways = linear_launches(device, *sizes, (BF16, FP32), p, choices=(Choice(strategy, ""),) * 2)
    return {
        name_of(launch.kernel.__name__)
        for way in ways
        for launch in way
        if isinstance(launch, Launch)
    }


@pytest.mark.parametrize("check", [pytest.param(c, id=f"{c.family}, {c.case}") for c in checks()])
def test_doctor(check):
    """A check of ``stablelora-kernels doctor``, which must launch kernels."""
    result = run_check(check, DEVICE)
    assert result["passed"], result["problem"]


@by_dropout
@pytest.mark.parametrize("splits", (1, 2))
def test_down(splits, p, monkeypatch):
    """S alone, of one part or of two."""
    monkeypatch.setattr(tiles, "plan_split_k", lambda *given, **more: splits)
    m, n, k, r = (70, 8, 300, 8) if SMALL else (512, 8, 1024, 16)
    case, number = linear(m, n, k, r, p), torch.tensor([5], device=DEVICE)
    given, scaling = make(case), case.scalings[0]
    x, a = given["x"], given["lora_A0"]
    s = torch.full((m, r), float("nan"), dtype=BF16, device=DEVICE)
    y = torch.empty(m, n, dtype=BF16, device=DEVICE)
    projection = Projection(given["weight0"], None, a, given["lora_B0"], scaling)
    seed = number if p else None
    mask = new_mask(x, k) if p else None
    product = forward_product(x, projection, y, s=s, seed=seed, mask=mask, dropout_p=p)
    lora_down(GPU, [product]).run(DEVICE)
    dropped = x * keep_rows(case, torch.arange(m, device=DEVICE), 5) if p else x
    exact = scaling * dropped.double() @ a.double().t()
    assert_no_worse(s, exact, scaling * (dropped @ a.to(BF16).t()), name="S")


@pytest.mark.parametrize(("size", "strategy", "p"), CALLS)
def test_linear(size, strategy, p):
    sizes = (SMALL_SIZES if SMALL else SIZES)[size]
    case = linear(*sizes, p).but(strategy=strategy)
    given = make(case)
    with count_launches() as made:
        found = cases.run(case, given)
    asked = (size, strategy) in ASKED
    expected = listed_by_dispatch(GPU, sizes, strategy, p) if asked else LAUNCHED[size, strategy]
    assert {*map(name_of, made)} - {"vendor"} == expected
    gpu_checks.check(case, given, found)


# A group, whose products are of whole sums or of sums that programs share.
GROUPS = [((300, 520), (264, 136, 72), (16, 8, 3)), ((200, 4096), (1024, 256, 256), (16, 16, 16))]
# More tiles of gate and up than processors.
MLP = Case("mlp", (1024, 256), (2816, 2816, 256), (16, 8, 16), BF16, FP32)
# W in 4 and 8 bits: in the product's own loop for few rows, by a launch before it for many.
ROWS, N, K = ((9, 70), 40, 64) if SMALL else ((20, 600), 264, 512)
if SMALL:
    GROUPS, MLP = [((70, 48), (40, 24, 24), (8, 8, 8))], MLP.but(shape=(70, 48), sizes=(40, 40, 24))
OTHERS = [
    *(Case("group", *group, BF16, FP32) for group in GROUPS),
    *(MLP.but(p=p) for p in (0.0, 0.1)),
    *(
        Case("linear", (m, K), (N,), (8,), BF16, FP32, quantized=(kind,))
        for kind in (kinds_of(name)[-1] for name in WEIGHTS)
        for m in ROWS
    ),
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_ops(case):
    case_checks.check(case, cases.run(case))


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_loss_without_logits(dtype, reduction):
    """A head with LoRA, some of whose tokens are ignored, against PyTorch's operators in float64."""
    vocabulary = 70 if SMALL else 50_257
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (19, 64),
        "bias": (vocabulary,),
        "lora_A": (8, 64),
        "lora_B": (vocabulary, 8),
    }
    drawn = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weight = (0.1 * torch.randn(vocabulary, 64, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(vocabulary, (19,), generator=generator).to(DEVICE)
    labels[::4] = -100
    found = []
    for backend, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        leaves = {name: t.to(DEVICE, dtype).to(kind).requires_grad_() for name, t in drawn.items()}
        hidden = leaves.pop("hidden")
        with settings(backend=backend):
            loss = lora_linear_cross_entropy(
                hidden, weight.to(kind), labels, **leaves, scaling=2.0, reduction=reduction, softcap=30.0
            )  # fmt: skip
            grads = torch.autograd.grad(loss.sum(), [hidden, *leaves.values()])
        found.append([loss.detach(), *grads])
    for ours, torchs, exact in zip(*found, strict=True):
        assert_no_worse(ours, exact, torchs, dtype=dtype)


@pytest.mark.parametrize("max_grad_norm", (None, 0.05))
def test_optimizer(max_grad_norm):
    """The first step measures the pairs' norms. The others read them."""
    hyper: dict[str, Any] = {"lr": 1e-2, "shrink_ratio": 0.05, "max_grad_norm": max_grad_norm}
    pairs = make_pairs(SHAPES if SMALL else [*SHAPES, (16, 1024, 4096)])
    reference = StableAdamWRef(in_float64(pairs), **hyper)
    optimizer = StableLoRAAdamW(pairs, **hyper)
    for step in range(3):
        take_step_with(reference, optimizer, step)
    assert_close_to(reference, optimizer)
