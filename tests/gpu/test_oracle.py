"""Forward and backward by every strategy: against float64, bounded by eager PyTorch's own error, and
the same bits in every run.

Dropout's mask is the one that the reference draws.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.dispatch.rules import STRATEGIES
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.cases import BF16, FP16, FP32, Case
from tests.helpers import case_checks, gpu_checks
from tests.helpers.gpu_checks import DEVICE, SMALL, by_strategy, keep_rows, linear, make, record

pytestmark = pytest.mark.gpu
poisoned = pytest.mark.usefixtures("poisoned_outputs")

# A race shows by chance, so repeat often.
REPEATS = 1 if SMALL else 8
DTYPES = ((BF16, FP32), (FP16, FP16), (FP32, FP32))
# Few rows; sizes that tensor descriptors take (rows of multiples of 16 bytes); sizes that they do
# not take.
CORE = ((9, 264, 200, 3), (257, 520, 1032, 16), (131, 71, 67, 20))
UGLY = (
    (1, 1, 1, 1), (1, 4096, 4096, 16), (64, 512, 256, 1), (65, 509, 251, 3), (1031, 264, 520, 128), (97, 89, 83, 64),
    (600, 1024, 1024, 64), (67, 40, 48, 200),
)  # fmt: skip
# The shapes and dtypes that benchmarks.lab.gpu times later. Checking them also fills Triton's cache
# on disk.
TIMED = [
    linear(m, 4096, 4096, r, p, BF16, BF16)
    for r, p, m in product((16, 64, 128, 8), (0.1, 0.0), (8192, 64, 2048, 16))
]
if SMALL:
    DTYPES = DTYPES[:1]
    CORE = ((9, 40, 24, 3), (70, 48, 40, 16))
    UGLY = ((1, 1, 1, 1), (67, 40, 33, 128))
    TIMED = [linear(16, 64, 32, 8, 0.1, BF16, BF16)]


def by_every_strategy(made: list[Case]) -> list[Case]:
    return [
        forced
        for case, strategy in product(made, STRATEGIES)
        if (forced := by_strategy(case, strategy)) is not None
    ]


def check(case: Case, record_property: Callable[[str, object], None]) -> None:
    given = gpu_checks.make(case)
    gpu_checks.record(record_property, gpu_checks.check(case, given, cases.run(case, given)))
    # As users run it, whose memory is not filled before each launch.
    torch.use_deterministic_algorithms(False)
    first = cases.run(case, given)
    for _ in range(REPEATS):
        case_checks.assert_close(first, cases.run(case, given))


CORE_CASES = by_every_strategy(
    [linear(*shape, p, *dtypes) for shape, dtypes, p in product(CORE, DTYPES, (0.0, 0.1))]
)
UGLY_CASES = [linear(*shape, p) for shape, p in product(UGLY, (0.0, 0.1))]


@poisoned
@pytest.mark.parametrize("case", CORE_CASES + UGLY_CASES, ids=str)
def test_every_strategy_matches_float64(case, record_property):
    check(case, record_property)


@poisoned
@pytest.mark.parametrize("case", by_every_strategy(TIMED), ids=str)
def test_timed_shapes_match_float64(case, record_property):
    check(case, record_property)


# x's shape, F and N, ranks: gate and up by descriptors, by pointers, and one by one; a projection
# without a branch.
MLPS = (
    ((2048, 1024), (2816, 2816, 1024), (16, 8, 20)), ((4096, 999), (2001, 2001, 500), (3, 16, 100)),
    ((33, 256), (512, 512, 256), (None, 8, 3)),
)  # fmt: skip
if SMALL:
    MLPS = (((70, 48), (40, 40, 24), (16, 8, None)),)


@poisoned
@pytest.mark.parametrize(("mlp", "activation"), list(product(MLPS, ACTIVATIONS)), ids=str)
@pytest.mark.parametrize("strategy", ["auto", "one_launch"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_an_mlp_matches_float64(mlp, activation, strategy, p):
    case = Case("mlp", *mlp, BF16, FP32, p=p, strategy=strategy, activation=activation)
    case_checks.check(case, cases.run(case))


# Offsets beyond 2^31 elements in real tensors. Rows and columns far apart, of every operand:
# tests/kernels


# The last row's offset must exceed this.
SPAN = 2**14 if SMALL else 2**31
by_every_forced_strategy = pytest.mark.parametrize(
    "strategy", ("auto",) if SMALL else ("one_launch", "branch_first")
)


def skip_if_short_of_memory(elements: int) -> None:
    """Skip unless ``elements`` in bfloat16 fit, and as much again."""
    if SMALL:
        return
    torch.cuda.empty_cache()
    needed, free = 4 * elements, torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(
            f"needs {needed / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} GiB are free"
        )


# One process of pytest-xdist runs all of these, one after the other, because each takes much of the
# GPU's memory.
@pytest.mark.xdist_group("large_offsets")
@by_every_forced_strategy
@pytest.mark.parametrize("p", (0.1,) if SMALL else (0.0, 0.1))
@pytest.mark.parametrize("large", ("Y and dY", "X and dX"))
def test_large_matrices(large, p, strategy, record_property):
    """Contiguous matrices of more than SPAN elements.

    The incoming gradient is zero except in the first rows, the last, and those around element SPAN.
    So dA and dB are sums over these rows alone, and the oracle needs no others.
    """
    width = 64 if SMALL else 16384
    m, middle = SPAN // width + 24, SPAN // width
    n, k = (width, 64) if large == "Y and dY" else (64, width)
    case = by_strategy(linear(m, n, k, 16, p, BF16, BF16), strategy)
    skip_if_short_of_memory(2 * m * width)
    some = torch.tensor(
        sorted({*range(8), *range(middle - 8, middle + 8), *range(m - 8, m)}), device=DEVICE
    )
    small = make(case.but(shape=(len(some), k)))
    inputs = dict(small)
    torch.manual_seed(9)
    inputs["x"] = torch.empty(m, k, dtype=BF16, device=DEVICE).normal_()
    inputs["x"][some] = small["x"]
    inputs["grad0"] = torch.zeros(m, n, dtype=BF16, device=DEVICE)
    inputs["grad0"][some] = small["grad0"]
    found = cases.run(case, inputs)
    keep = keep_rows(case, some) if p else None
    record(
        record_property,
        gpu_checks.check(
            case, small, found | {name: found[name][some] for name in ("Y0", "x")}, keep
        ),
    )
