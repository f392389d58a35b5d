"""Every refusal of the ops, by the words a user would read, before anything is launched, drawn or
remembered.
"""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.functional import (
    FP8Weight,
    lora_branch,
    lora_linear,
    lora_linear_group,
    lora_mlp,
)
from stablelora_kernels.ops import plans
from stablelora_kernels.testing.cases import BF16, DEVICE, FP16, FP32, FP64, Case, make, projections
from tests.helpers.cases import small
from tests.helpers.launches import count_launches

PROJECTIONS = ("gate", "up", "down")
FUNCTIONS = {
    "linear": lora_linear,
    "branch": lora_branch,
    "group": lora_linear_group,
    "mlp": lora_mlp,
}
NO_FLOAT = "must be bfloat16, float16, float32 or float64, got torch.int64"
ON_META = rf"must be on x's device {DEVICE}.*, got meta"


def arguments(op, dtype=FP32):
    """Good arguments of an op by name, in sizes that no two operands share."""
    sizes = {"group": {"sizes": (20, 12), "ranks": (6, 3)}, "mlp": {"bias": (True,)}}.get(op)
    case = small(op, **sizes) if sizes else Case(op, (5, 6), (4,), (2,))
    case = case.but(dtype=dtype, lora_dtype=dtype)
    given, parts = make(case), projections(case, make(case))
    if op == "mlp":
        return {"x": given["x"], **dict(zip(PROJECTIONS, parts, strict=True)), "activation": "silu"}
    if op == "group":
        names = ("weights", "biases", "lora_As", "lora_Bs", "scalings")
        return {
            "x": given["x"],
            **{name: [*each] for name, each in zip(names, zip(*parts, strict=True), strict=True)},
        }
    first = {"x": given["x"], **parts[0]._asdict()}
    if op == "branch":
        first = {"base_out": given["base_out"]} | {
            name: first[name] for name in first if name not in ("weight", "bias")
        }
    return first


def changed(good, changes):
    """``good`` with other arguments; "gate.lora_A" and "lora_As.1" are parts of an argument."""
    given = dict(good)
    for name, value in changes.items():
        argument, _, part = name.partition(".")
        if not part:
            given[name] = value
        elif part.isdigit():
            given[argument] = [
                value if i == int(part) else each for i, each in enumerate(given[argument])
            ]
        else:
            given[argument] = given[argument]._replace(**{part: value})
    return given


def refuses(op, good, changes, error, message, drawn=False):
    """``drawn``: only the launch refuses, behind the draw of dropout's seed."""
    state = torch.get_rng_state()
    with count_launches() as made, pytest.raises(error, match=message):
        FUNCTIONS[op](**({"dropout_p": 0.3} | changed(good, changes)))
    assert not made
    assert drawn or torch.equal(torch.get_rng_state(), state)


def zeros(*size, dtype=FP32, device=DEVICE):
    return torch.zeros(size, dtype=dtype, device=device)


def bad_pairs(of, n, k, r, fits):
    """Of a pair of A [r, k] and B [n, r] that has to fit the tensor ``fits``; ``of`` stands before
    their names.
    """
    a, b = f"{of}lora_A", f"{of}lora_B"
    half = {a: zeros(r, k, dtype=FP16), b: zeros(n, r, dtype=FP16)}
    return [
        ({a: zeros(r, k + 1)}, ValueError, rf"{a} must be \[r, {k}\] with r >= 1 to fit {fits}, got \[{r}, {k + 1}\]"),
        ({a: zeros(0, k)}, ValueError, rf"{a} must be \[r, {k}\] with r >= 1 to fit {fits}, got \[0, {k}\]"),
        ({b: zeros(n, r + 1)}, ValueError,
         rf"{b} must be \[{n}, {r}\] to fit {fits} and {a} \[{r}, {k}\], got \[{n}, {r + 1}\]"),
        ({b: zeros(n + 1, r)}, ValueError, rf"{b} must be \[{n}, {r}\] .* got \[{n + 1}, {r}\]"),
        ({b: zeros(n, r, device="meta")}, ValueError, f"{b} {ON_META}"),
        ({a: half[a]}, TypeError, f"{a} and lora_B must have one dtype, got torch.float16 and torch.float32"),
        (half, TypeError, f"{a} and lora_B must be float32 or of x's dtype torch.float32, got torch.float16"),
        ({f"{of}scaling": torch.tensor(2.0)}, TypeError, f"{of}scaling must be a number, got a Tensor"),
    ]  # fmt: skip


def bad_projections(of, n, k, r):
    """Of a projection with a weight [n, k]."""
    w, bias, fits = f"{of}weight", f"{of}bias", rf"{of}weight \[{n}, {k}\]"
    return [
        *bad_pairs(of, n, k, r, fits),
        (
            {bias: zeros(n + 1)},
            ValueError,
            rf"{bias} must be \[{n}\] to fit {fits}, got \[{n + 1}\]",
        ),
        ({bias: zeros(1, n)}, ValueError, rf"{bias} must be \[{n}\] to fit {fits}, got \[1, {n}\]"),
        (
            {bias: zeros(n, dtype=FP16)},
            TypeError,
            f"{bias} must have x's dtype torch.float32, got torch.float16",
        ),
        ({bias: zeros(n, device="meta")}, ValueError, f"{bias} {ON_META}"),
        (
            {w: zeros(n, k, dtype=FP16)},
            TypeError,
            f"{w} must have x's dtype torch.float32, got torch.float16",
        ),
        ({w: zeros(n, k, device="meta")}, ValueError, f"{w} {ON_META}"),
    ]


def bad_inputs(of, n, k):
    """Of x, and of a weight that no x fits."""
    fits = rf"{of}weight \[{n}, {k}\]"
    return [
        (
            {"x": zeros(5, k + 1)},
            ValueError,
            rf"x must be \[..., {k}\] to fit {fits}, got \[5, {k + 1}\]",
        ),
        ({"x": zeros()}, ValueError, rf"x must be \[..., {k}\] to fit {fits}, got \[\]"),
        ({"x": zeros(5, k, dtype=torch.int64)}, TypeError, f"x {NO_FLOAT}"),
        ({f"{of}weight": zeros(n)}, ValueError, rf"{of}weight must be \[N, K\], got \[{n}\]"),
        (
            {f"{of}weight": zeros(n, k + 1)},
            ValueError,
            rf"x must be \[..., {k + 1}\] .*weight \[{n}, {k + 1}\], got",
        ),
    ]


DROPOUT = [
    *(({"dropout_p": p}, ValueError, rf"dropout_p must be a finite number in \[0, 1\), got {p}") for p in (1.0, -0.1, torch.nan)),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got '0.1' of type str"),
]  # fmt: skip
ON_META_8_BIT = FP8Weight(
    zeros(4, 6, device="meta").to(torch.float8_e4m3fn), zeros(4, device="meta")
)
# By op: what is changed, the error and its message.
REFUSED = {
    "linear": [
        *bad_inputs("", 4, 6),
        *bad_projections("", 4, 6, 2),
        ({"weight": testing.fp8_weight(4, 7)}, ValueError, r"x must be \[..., 7\] to fit weight \[4, 7\], got \[5, 6\]"),
        ({"weight": ON_META_8_BIT}, ValueError, f"weight {ON_META}"),
        ({"x": zeros(5, 6, dtype=FP64), "weight": zeros(4, 6, dtype=FP64), "bias": None}, TypeError,
         "lora_A and lora_B must be float32 or of x's dtype torch.float64, got torch.float32"),
    ],
    "branch": [
        *bad_pairs("", 4, 6, 2, r"base_out \[5, 4\]"),
        ({"base_out": (zeros(5, 4), zeros(5))}, TypeError, "base_out must be a Tensor, got tuple"),
        ({"base_out": zeros(4, 4)}, ValueError, r"base_out must be \[..., N\] .* fit x \[5, 6\], got \[4, 4\]"),
        ({"base_out": zeros()}, ValueError, r"base_out must be .* got \[\]"),
        ({"x": zeros()}, ValueError, r"base_out must be .* fit x \[\], got \[5, 4\]"),
        ({"base_out": zeros(5, 4, device="meta")}, ValueError, f"base_out {ON_META}"),
        ({"base_out": zeros(5, 4, dtype=torch.int64)}, TypeError, f"base_out {NO_FLOAT}"),
    ],
    "group": [
        ({"weights": []}, ValueError, "one length, of 1 to 3, got 0, 2, 2, 2, 2"),
        ({"scalings": [1.0]}, ValueError, "one length, of 1 to 3, got 2, 2, 2, 2, 1"),
        ({"scalings.1": torch.tensor(2.0)}, TypeError, "scaling must be a number, got a Tensor"),
        ({"lora_As.1": zeros(3, 23)}, ValueError, r"lora_A must be \[r, 24\] .* got \[3, 23\]"),
        ({"x": zeros(5, 23)}, ValueError, r"x must be \[..., 24\] to fit weight \[20, 24\], got \[5, 23\]"),
        ({"biases.0": zeros(12)}, ValueError, r"bias must be \[20\] to fit weight \[20, 24\], got \[12\]"),
        ({"lora_As.1": zeros(3, 24, dtype=BF16), "lora_Bs.1": zeros(12, 3, dtype=BF16), "x": zeros(5, 24, dtype=BF16),
          "weights": [zeros(20, 24, dtype=BF16), zeros(12, 24, dtype=BF16)], "biases": [None, None]}, TypeError,
         "lora_As must have one dtype, got torch.float32 and torch.bfloat16"),
    ],
    "mlp": [
        *bad_inputs("gate.", 40, 24),
        *bad_projections("gate.", 40, 24, 6),
        *bad_projections("up.", 40, 24, 3),
        *bad_projections("down.", 20, 40, 4),
        *(({"activation": given}, ValueError, f"activation must be one of 'silu', 'gelu', 'gelu_tanh', got {given!r}"[:70])
          for given in ("relu", "SiLU", None, torch.nn.functional.silu)),
        *(({"up.weight": zeros(*size)}, ValueError, rf"up.weight must be \[40, 24\] to fit gate.weight, got \{[*size]}")
          for size in ((41, 24), (40, 23), (40,))),
        ({"up.weight": testing.nf4_weight(40, 48, 64, True)}, ValueError, r"up.weight must be \[40, 24\] .*, got \[40, 48\]"),
        *(({"down.weight": zeros(*size)}, ValueError, rf"down.weight must be \[N, 40\] .* \[40, 24\], got \{[*size]}")
          for size in ((20, 39), (40, 20), (20,))),
        ({"down.weight": testing.fp8_weight(20, 41)}, ValueError, r"down.weight must be \[N, 40\] .* got \[20, 41\]"),
        *(({f"{name}.{given}": None}, ValueError,
           f"{name}.{given} must be given with {name}.{other}, or both must be None, got None")
          for name, given, other in (("gate", "lora_A", "lora_B"), ("up", "lora_B", "lora_A"), ("down", "lora_B", "lora_A"))),
    ],
}  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("op", REFUSED)
def test_errors_from_cold_and_warm_plans(op, warm, backend):
    good = arguments(op)
    for _ in range(3 * warm):
        FUNCTIONS[op](**good, dropout_p=0.3)
    known = len(plans._young)
    for changes, error, message in DROPOUT + REFUSED[op]:
        refuses(op, good, changes, error, message)
    # What was refused is not remembered.
    assert len(plans._young) == known and (known > 0) == warm


def test_an_mlps_adapters_of_two_dtypes_are_refused(backend):
    good = arguments("mlp", BF16)
    pair = {"down.lora_A": good["down"].lora_A.float(), "down.lora_B": good["down"].lora_B.float()}
    message = "one dtype, got gate.lora_A torch.bfloat16, up.lora_A torch.bfloat16, down.lora_A torch.float32"
    refuses("mlp", good, pair, TypeError, message)
    without_gate = pair | {"gate.lora_A": None, "gate.lora_B": None}
    refuses(
        "mlp",
        good,
        without_gate,
        TypeError,
        "got up.lora_A torch.bfloat16, down.lora_A torch.float32",
    )


@pytest.mark.parametrize("op", FUNCTIONS)
def test_float64_does_not_fall_back_silently(op):
    good = arguments(op, FP64)
    name = "base_out" if op == "branch" else "x"
    only = arguments(op) | {name: good[name]} if op == "branch" else good
    bare = {
        each: good[each]._replace(lora_A=None, lora_B=None) for each in PROJECTIONS if op == "mlp"
    }
    stored = {"weight": testing.nf4_weight(4, 6, 64, True)} if op == "linear" else {}
    with slk.settings(backend="triton"):
        for changes in ({}, bare, stored):
            refuses(
                op,
                only,
                changes,
                TypeError,
                rf"{name} is torch.float64.*slk.settings.backend = 'torch'",
            )
    with slk.settings(backend="torch"):
        found = FUNCTIONS[op](**good)
        assert (found[0] if op == "group" else found).dtype == FP64


MANY = {"x": zeros(65, 6), "dropout_p": 0.0}
HIGH = {"down.lora_A": zeros(130, 40), "down.lora_B": zeros(20, 130)}


@pytest.mark.parametrize(
    ("op", "strategy", "changes", "message"),
    [
        ("linear", "few_rows", {}, "'few_rows' was asked for, but it has no dropout"),
        ("linear", "few_rows", MANY, "'few_rows' was asked for, but it takes rows up to 64, got 65"),
        ("mlp", "few_rows", {}, "'few_rows' was asked for, but it has no dropout"),
        ("mlp", "few_rows", HIGH | {"x": zeros(5, 24), "dropout_p": 0.0}, "it takes ranks up to 64, got 130"),
        ("mlp", "one_launch", HIGH, "'one_launch' was asked for, but it takes ranks up to 128, got 130"),
    ],
)  # fmt: skip
def test_a_strategy_that_cannot_do_the_call_is_refused(op, strategy, changes, message):
    """Before a launch of the same call."""
    with slk.settings(backend="triton", strategy=strategy):
        refuses(op, arguments(op), changes, ValueError, message, drawn=True)
