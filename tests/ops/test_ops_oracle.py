"""Every op against float64, bounded by eager PyTorch's own error: one table over sizes, dtypes,
dropout, strides and strategies.
"""

from __future__ import annotations

import math
from itertools import cycle, product

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import STRATEGIES, check_possible
from stablelora_kernels.dispatch.tiles import Tile
from stablelora_kernels.ops.dropout import draw_keep
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.reference import dropout_keep_ref
from stablelora_kernels.testing.cases import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    FP64,
    TINY,
    Case,
    leaves,
    make,
    ours,
    run,
)
from stablelora_kernels.testing.inputs import QUANTIZED, can_hold
from stablelora_kernels.testing.ops.lora_mlp import MLP
from tests.helpers.case_checks import assert_close, check, table
from tests.helpers.cases import DTYPES, OPS, kinds_of, separately, small
from tests.helpers.largest_shares import PROPERTY

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
# x's shape, columns, rank: single, odd, prime; above one tile and above one block of ranks;
# multiples of 16 bytes.
SHAPES = [
    ((1, 1), 1, 1), ((5, 37), 53, 3), ((2, 35, 31), 17, 20), ((67, 40), 48, 20), ((70, 136), 72, 64), ((131, 75), 90, 128),
]  # fmt: skip
MANY_ROWS = ((2, 260, 37), 53, 3)
LAYOUTS = {
    "contiguous": {},
    "transposed": dict.fromkeys(
        ("x", "weight", "lora_A", "lora_B", "grad", "base_out"), "transposed"
    ),
    "apart": dict.fromkeys(
        ("x", "weight", "bias", "lora_A", "lora_B", "grad", "base_out"), "every second"
    ),
    "wider": dict.fromkeys(("x", "weight", "lora_B", "base_out"), "wider")
    | {"lora_A": "transposed"},
    # Memory holds the values times -1, as that of the imaginary part of a conjugate.
    "negated": dict.fromkeys(
        ("x", "weight", "bias", "lora_A", "lora_B", "grad", "base_out"), "negated"
    ),
    # Rows repeated by expand(), and the stride-0 gradient that sum() sends back.
    "broadcast": {"x": "expanded", "base_out": "expanded", "grad": "expanded", "bias": "expanded"},
}
# On a GPU the kernels run on the one that is there.
OLD, NEW = (None, None) if DEVICE == "cuda" else ("sm_80", "sm_90")
ARCHES = [None] if DEVICE == "cuda" else [OLD, NEW, "gfx942"]
MLP_ARCHES = [None] if DEVICE == "cuda" else [*ARCHES, "sm_100"]
TILES = [None] if DEVICE == "cuda" else [None, TINY]
RANKS = [(8, 3, 5), (None, 8, 5), (8, None, 5), (8, 5, None), (None, None, None)]
KINDS = [
    *((kind,) * 3 for kind in ("nf4", "nf4 nested", "fp8")),
    ("mxfp4", "nvfp4 swizzled", None),
    ("nf4", "fp8", "nf4 nested"),
    (None, "nf4 nested", "fp8"),
    (None, None, "nf4 nested"),
]
# Many programs of tiny tiles take their time.
MOST_OF_TINY = 350_000


def can_do(strategy: str, case: Case) -> bool:
    """Whether ``strategy`` can do each projection. Backward has no narrower limits."""
    m = math.prod(case.shape[:-1])
    for r in (r for r in case.ranks if r is not None):
        call = Call("forward", m, 1, 1, r, case.dtype, case.lora_dtype, case.p > 0)
        try:
            check_possible(call, strategy)
        except ValueError:
            return False
    return True


def build(op, shape, dtypes, p, layout, strategy, arch, tile, **options):
    """The call of a row of the table, or None if no call is one, or if twice eager PyTorch's error
    bounds no result of it.
    """
    shape, n, r = shape
    sizes, ranks, scalings = (n,), (r,), Case.scalings
    if op == "group":
        sizes, ranks = (n, n // 2 + 1, 8), (r, 3, min(r, 20))
    elif op == "mlp":
        sizes, ranks, scalings = (n, n, 24), (r, 3, 20), (0.5, 1.5, -0.75)
    case = Case(
        op,
        shape,
        sizes,
        ranks,
        *dtypes,
        p=p,
        layouts=LAYOUTS[layout],
        bias=(r != 3, False, True),
        scalings=scalings,
    )
    case = case.but(**{name: value for name, value in options.items() if value is not None})
    if not all(can_hold(kind, shape[-1]) for kind in case.quantized):
        return None
    # oneDNN's AMX instructions read the gaps between bfloat16 rows, in an MLP also for a projection
    # without a branch.
    reads_gaps = op == "mlp" or strategy in ("torch", "branch_first")
    gaps = layout == "wider" and case.dtype == BF16 and reads_gaps
    # By chance, eager's error of a sum of three numbers may be next to nothing.
    lone = op == "group" and shape == (1, 1) and p > 0
    # The oracle rounds as often where all rows are one.
    if gaps or lone or (case.dtype == FP64 and layout == "broadcast"):
        return None
    if strategy == "torch":
        # PyTorch's path knows neither GPUs nor tiles.
        return case.but(backend="torch") if (arch, tile) == (ARCHES[0], TILES[0]) else None
    if tile is not None and math.prod(shape) * n > MOST_OF_TINY:
        return None
    possible = case.dtype != FP64 and (strategy == "auto" or can_do(strategy, case))
    return case.but(strategy=strategy, arch=arch, tile=tile) if possible else None


def rows(op, **axes):
    default = {
        "op": [op], "shape": SHAPES, "dtypes": [*DTYPES, (FP64, FP64)], "p": [0.0, 0.1, 0.75], "layout": list(LAYOUTS),
        "strategy": ["torch", "auto", *STRATEGIES[1:]], "arch": ARCHES, "tile": TILES,
    }  # fmt: skip
    return table(build, by_day=1, **default | axes)


# Of x, A and B, base_out.
BRANCHES = [
    *((dtype,) * 3 for dtype in (FP64, FP32, FP16)),
    (BF16, FP32, BF16),
    (BF16, FP32, FP32),
    (FP32, FP32, FP16),
]
QUANTIZED_SHAPES = [
    ((1, 1), 1, 1), ((5, 128), 53, 3), ((2, 3, 37), 17, 20), ((70, 192), 40, 20), ((67, 100), 71, 3), ((260, 64), 48, 6),
    ((66, 48), 140, 3),
]  # fmt: skip
TABLE = [
    *rows("linear"),
    *rows("branch", dtypes=BRANCHES, strategy=["torch", "auto"]),
    # From 512 rows on, PyTorch's operators have an autograd function of their own, without dropout
    # too.
    *rows("linear", shape=[MANY_ROWS], strategy=["torch"], arch=ARCHES[:1], tile=TILES[:1], p=[0.0]),
    *rows("branch", shape=[MANY_ROWS], strategy=["torch"], arch=ARCHES[:1], tile=TILES[:1], p=[0.0], dtypes=BRANCHES),
    *rows("group"),
    *rows("linear", shape=QUANTIZED_SHAPES, strategy=["torch", "auto", "one_launch"], quantized=[(kind,) for kind in QUANTIZED]),
    *rows(
        "mlp", activation=[*ACTIVATIONS], ranks=[None, *RANKS], processors=[None, 2], arch=MLP_ARCHES,
        bias=[(True, False, True), (False, True, False)],
    ),
    *rows(
        "mlp", shape=[((rows, 64), 48, 6) for rows in (5, 70, 260)], layout=["contiguous"], tile=[None], p=[0.0, 0.3],
        quantized=KINDS, ranks=[None, (None, 3, 8), (6, None, None)],
    ),
]  # fmt: skip


def in_tiles(rows, dtypes, p, layout, backend, options):
    dtype, lora_dtype = dtypes
    if dtype == FP64 and (backend == "triton" or layout == "broadcast"):
        return None
    if layout == "wider" and dtype == BF16:
        # See build().
        return None
    if options.get("op") == MLP(tile_rows=1) and rows != (24,):
        # A launch or more a row.
        return None
    case = small("tiled mlp", rows, dtype=dtype, lora_dtype=lora_dtype, p=p, backend=backend)
    case = case.but(layouts=LAYOUTS[layout], **options)
    return case.but(shape=(*case.shape[:-1], 64)) if "quantized" in options else case


# A tile has 32 rows at most: one tile, two of one size, and a last one that is smaller.
TILED = table(
    in_tiles,
    by_day=1,
    rows=[(24,), (64,), (2, 35), (131,)],
    dtypes=[*DTYPES, (FP64, FP64)],
    p=[0.0, 0.1, 0.6],
    layout=list(LAYOUTS),
    backend=["torch", "triton"],
    options=[
        *({"activation": activation} for activation in ACTIVATIONS),
        *({"ranks": ranks} for ranks in RANKS),
        *({"quantized": kinds} for kinds in KINDS),
        {"ranks": (6, 6, 3), "shared": True},
        {"bias": (False, True, False)},
        {"op": MLP(tile_rows=1)},
    ],
)


# What no pair of the table's values reaches.
NAMED = [
    # Every rank, through one block or several, with NaN behind the last column of B.
    *(
        Case("linear", (rows, 40), (48,), (r,), BF16, FP32, arch=(OLD, NEW)[r % 2], layouts={"lora_B": "wider"})
        for r, rows in zip((1, 3, 17, 31, 65, 64, 100, 200, 256, 257, 512), cycle((4, 70)), strict=False)
    ),
    # Several tiles, through descriptors: S has programs of its own, or a launch.
    *(
        Case(op, (67, 40), (48,) * count, (20,) * count, FP16, FP16, arch=NEW, tile=TINY)
        for op, count in (("linear", 1), ("group", 2))
        if DEVICE == "cpu"
    ),
    # A masked tile in two, four and eight parts of 16 or 32 columns, with edges inside a part and
    # between parts.
    *(
        Case("linear", (66, 2 * n - 24), (48,), (r,), BF16, FP32, p=0.3, arch="sm_90", tile=Tile(16, n, 16, 4, 2))
        for n, r in ((32, 8), (64, 40), (128, 8), (256, 40))
        if DEVICE == "cpu"
    ),
    # The widest tile that is read through pointers, with one block of ranks and with two; and with
    # an S that a launch before it computes.
    *(
        Case("linear", (300, 160), (496,), (r,), BF16, FP32, arch="sm_80", processors=3)
        for r in (16, 40)
    ),
    Case("group", (300, 160), (496, 496), (16, 40), BF16, FP32, arch="sm_80", processors=3),
    # One program computes two tiles of S, or two of dS and one of dB, while others compute the
    # product's.
    *(
        Case("linear", (200, k), (n,), (16,), BF16, FP32, p=p, strategy="one_launch", arch=arch, processors=9)
        for arch, (k, n, p) in product(("sm_80", "sm_90"), ((96, 800, 0.0), (800, 96, 0.3)))
    ),
    # Dropout's mask on the branch of dX, behind an S by the other strategy.
    *(
        Case("linear", (rows, 72), (80,), (r,), BF16, lora, p=0.2, strategy="branch_first",
             backward_strategy="one_launch", arch=arch)
        for rows, r, lora, arch in (
            (9, 3, FP32, OLD), (70, 16, BF16, NEW), (70, 33, FP32, OLD), (9, 16, BF16, NEW), (70, 33, FP32, NEW),
        )
    ),
    # Programs share a sum: over K, over N and over rows, in parts that do not come out even.
    *(
        Case("linear", (rows, k), (n,), (r,), BF16, FP32, p=p, strategy=strategy)
        for rows, k, n, r, p, strategy in (
            (5, 1100, 72, 3, 0.0, "auto"), (5, 72, 1100, 40, 0.3, "auto"), (50, 1040, 136, 40, 0.0, "few_rows"),
            (150, 136, 1030, 40, 0.3, "one_launch"), (70, 1040, 136, 3, 0.3, "one_launch"), (550, 20, 24, 3, 0.3, "auto"),
            (550, 20, 24, 80, 0.0, "branch_first"), (550, 20, 24, 80, 0.3, "branch_first"),
        )
    ),
    # Several quantized blocks in a tile, whose last ones stand out in both directions.
    *(
        Case("linear", (20, 384), (40,), (20,), dtype, FP32, quantized=(kind,), tile=Tile(16, 128, 256, 4, 2))
        for kind, dtype in zip(QUANTIZED, cycle((BF16, FP16)), strict=False)
        if DEVICE == "cpu"
    ),
    # S is stored by the only column of tiles.
    Case("linear", (50, 64), (48,), (16,), BF16, FP32, strategy="few_rows", arch=NEW),
    # Leading sizes that cannot be flattened, none at all, and no rows.
    *(
        small(op, leading, layouts={"x": "transposed", "grad": "transposed"}, backend=backend)
        for op, leading, backend in product(OPS, ((7, 11), (), (3, 0)), ("torch", "triton"))
    ),
    *(
        Case("linear", (5, 1088), (1088,), (6,), BF16, FP32, quantized=(kinds_of(name)[-1],)) for name in WEIGHTS
    ),
    # Gate and up in one kernel, which has no idle processors to fill.
    *(
        Case("mlp", (rows, k), (48, 48, 24), ranks, dtype, FP32, p=p, strategy="one_launch", arch=arch, processors=1,
             activation=activation, layouts={"weight": layout}, bias=(False, True, False), scalings=(0.5, 1.5, -0.75))
        for activation, (rows, k, ranks, p, arch, dtype, layout) in zip(cycle(ACTIVATIONS), (
            (70, 40, (8, 3, 5), 0.4, "sm_90", FP16, "contiguous"), (70, 37, (None, 8, 5), 0.0, "sm_90", BF16, "transposed"),
            (70, 40, (8, None, 5), 0.4, "sm_90", BF16, "transposed"), (70, 40, (8, None, 5), 0.4, "sm_80", BF16, "transposed"),
            (6, 40, (None, None, 5), 0.0, "sm_80", BF16, "contiguous"), (130, 64, (6, 3, 4), 0.0, "sm_90", BF16, "contiguous"),
        ), strict=False)
        if DEVICE == "cpu"
    ),
    # Phi-3's halves of one projection: A is one tensor, has one mask and gets one gradient.
    *(
        Case("mlp", (rows, 64), (48, 48, 24), (6, 6, 3), dtype, FP32, p=p, backend=backend, shared=True, quantized=kinds)
        for rows, dtype, p, backend, kinds in (
            (9, FP32, 0.3, "triton", (None,)), (70, BF16, 0.3, "torch", (None,)), (70, FP32, 0.0, "torch", (None,)),
            (70, BF16, 0.3, "triton", ("nf4", "nf4 nested", None)), (9, BF16, 0.0, "torch", ("nf4", "nf4 nested", None)),
        )
    ),
]  # fmt: skip


def wanting(op, rows, subset, backend):
    case = small(op, rows, p=0.3 if rows == 70 else 0.0, backend=backend, wanted=subset)
    return case if case.wanted_names else None


# Gradients of some operands, or of all of a kind.
SUBSETS = [
    ["x"], ["lora_A"], ["lora_B"], ["x", "lora_B"], ["lora_A0"], ["lora_B1"], ["lora_A2", "lora_B2"], ["x", "lora_A0", "lora_B2"],
    ["base_out"], ["weight0"], ["bias0", "weight2"],
]  # fmt: skip
WANTED = table(wanting, op=OPS, rows=[5, 70], subset=SUBSETS, backend=["torch", "triton"])


@pytest.mark.parametrize("case", [*TABLE, *TILED, *WANTED, *NAMED], ids=str)
def test_matches_the_oracle(case, record_property):
    share, name = check(case, run(case))
    record_property(PROPERTY, (share, f"{name} of {case}"))


def test_outputs_that_nobody_uses(rows, backend):
    """An unused projection of a group has no part in backward; with none used there are no
    gradients at all.
    """
    case = small("group", rows, backend=backend)
    for used in ((0,), (2,), (0, 2), (1, 2)):
        found = []
        for call in (ours, separately):
            leaf = leaves(case, make(case))
            with slk.settings(backend=backend):
                ys = call(case, leaf)
            torch.autograd.backward([ys[i] for i in used], [leaf[f"grad{i}"] for i in used])
            found.append(
                {name: leaf[name].grad for name in case.wanted_names if leaf[name].grad is not None}
            )
        assert_close(*found, 1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_equal_bit_for_bit(op, backend):
    case = small(op, 150, dtype=BF16, lora_dtype=FP32, p=0.2, backend=backend)
    assert_close(run(case), run(case))


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates(activation, backend):
    """Where act and its slope are 0 or 1 to the last bit, nothing overflows on the way."""
    case = small("mlp", activation=activation, backend=backend)
    given = make(case)
    given["x"] = given["x"] * torch.logspace(0, 4, 70, device=DEVICE)[:, None]
    check(case, run(case, given), given)


@pytest.mark.parametrize("strategy", ["auto", "one_launch"])
def test_nan_in_float8_stays_nan(strategy):
    """0x7F and 0xFF are float8's NaN. Read as one number more they would be 480 and -480."""
    case = small("fp8", 5, strategy=strategy)
    given = make(case)
    given["weight0"].data.view(torch.uint8)[[3, 9], [7, 40]] = torch.tensor(
        [0x7F, 0xFF], dtype=torch.uint8, device=DEVICE
    )
    found = run(case, given)
    assert found["Y0"].isnan().all(0).nonzero().flatten().tolist() == [3, 9]
    assert found["x"].isnan().all(0).nonzero().flatten().tolist() == [7, 40]
    assert found["Y0"].isnan().sum() == found["x"].isnan().sum() == 2 * 5


def test_dropout_keeps_the_right_share_everywhere():
    """Each of the four lanes of a 64-bit word, and every column, within five standard errors."""
    x = torch.empty(2000, 64)
    for p in (0.1, 0.5, 0.9):
        # Small masks are drawn otherwise.
        several = [draw_keep(part, p) for part in x.split(20)]
        small = torch.cat([keep for keep, _ in several]), several[0][1]
        for mask, real in (draw_keep(x, p), small):
            assert abs(real - p) <= 2**-17
            assert abs(mask.double().mean() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        philox = dropout_keep_ref(2000, 64, p, seed=2**62 + 5)
        for mask in (draw_keep(x, p)[0], small[0], philox):
            assert (mask.double().mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5


def test_dropout_below_the_grid_drops_nothing():
    """PyTorch's path has 16 random bits: each element is dropped with the very probability that the
    scale uses.
    """
    torch.manual_seed(0)
    keep, real = draw_keep(torch.empty(1 << 21, 1), 2.0**-18)
    assert real == 0.0 and keep.all()
