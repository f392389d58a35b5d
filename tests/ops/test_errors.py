"""Every refusal of the ops, by the words a user would read, before anything is launched, drawn or remembered."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels import testing
from stablelora_kernels.functional import FP8Weight, LoRAWeights, lora_branch, lora_linear, lora_linear_group, lora_mlp
from stablelora_kernels.ops import plans
from tests.helpers.cases import BF16, DEVICE, FP16, FP32, FP64, Case, make, projections, small
from tests.helpers.launches import count_launches

PROJECTIONS = ("gate", "up", "down")
FUNCTIONS = {"linear": lora_linear, "branch": lora_branch, "group": lora_linear_group, "mlp": lora_mlp}


def arguments(op, dtype=FP32):
    """Good arguments of an op by name, in sizes that no two operands share."""
    case = {
        "linear": Case("linear", (5, 6), (4,), (2,), dtype, dtype),
        "branch": Case("branch", (5, 6), (4,), (2,), dtype, dtype),
        "group": small("group", 5, dtype=dtype, lora_dtype=dtype, sizes=(20, 12), ranks=(6, 3)),
        "mlp": small("mlp", dtype=dtype, lora_dtype=dtype, bias=(True,)),
    }[op]
    given = make(case)
    parts = projections(case, given)
    if op == "mlp":
        return {"x": given["x"], **dict(zip(PROJECTIONS, parts, strict=True)), "activation": "silu"}
    if op == "group":
        names = ("weights", "biases", "lora_As", "lora_Bs", "scalings")
        return {"x": given["x"], **{name: [*each] for name, each in zip(names, zip(*parts, strict=True), strict=True)}}
    first = parts[0]._asdict()
    return {"x": given["x"]} | (
        {"base_out": given["base_out"]} | dict([*first.items()][2:]) if op == "branch" else first
    )


def zeros(*size, dtype=FP32, device=DEVICE):
    return torch.zeros(size, dtype=dtype, device=device)


def changed(good, changes):
    given = dict(good)
    for name, value in changes.items():
        argument, _, part = name.partition(".")
        if not part:
            given[name] = value
        elif part.isdigit():
            given[argument] = [value if i == int(part) else each for i, each in enumerate(given[argument])]
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


ACTIVATION = "activation must be one of 'silu', 'gelu', 'gelu_tanh', got "
DROPOUT = [
    ({"dropout_p": p}, ValueError, rf"dropout_p must be a finite number in \[0, 1\), got {p}") for p in (1.0, -0.1, float("nan"))
] + [({"dropout_p": "0.1"}, TypeError, r"dropout_p must be a number, got '0.1' of type str")]  # fmt: skip
# By op: what is changed, in words such as "gate.lora_A" or "lora_As.1", to what; the error and its message.
REFUSED = {
    "linear": [
        *DROPOUT,
        ({"weight": zeros(4)}, ValueError, r"weight must be \[N, K\], got \[4\]"),
        ({"x": zeros(5, 7)}, ValueError, r"x must be \[..., 6\] to fit weight \[4, 6\], got \[5, 7\]"),
        ({"x": zeros()}, ValueError, r"x must be \[..., 6\] to fit weight \[4, 6\], got \[\]"),
        ({"lora_A": zeros(2, 5)}, ValueError, r"lora_A must be \[r, 6\] with r >= 1 to fit weight \[4, 6\], got \[2, 5\]"),
        ({"lora_A": zeros(0, 6)}, ValueError, r"lora_A must be \[r, 6\] with r >= 1 .* got \[0, 6\]"),
        ({"lora_B": zeros(4, 3)}, ValueError, r"lora_B must be \[4, 2\] .* \[4, 6\] and lora_A \[2, 6\], got \[4, 3\]"),
        ({"lora_B": zeros(5, 2)}, ValueError, r"lora_B must be \[4, 2\] .* got \[5, 2\]"),
        ({"bias": zeros(5)}, ValueError, r"bias must be \[4\] to fit weight \[4, 6\], got \[5\]"),
        ({"bias": zeros(1, 4)}, ValueError, r"bias must be \[4\] .* got \[1, 4\]"),
        ({"weight": zeros(4, 6, device="meta")}, ValueError, rf"weight must be on x's device {DEVICE}.*, got meta"),
        ({"weight": testing.fp8_weight(4, 7)}, ValueError, r"x must be \[..., 7\] to fit weight \[4, 7\], got \[5, 6\]"),
        ({"weight": FP8Weight(zeros(4, 6, device="meta").to(torch.float8_e4m3fn), zeros(4, device="meta"))}, ValueError,
         rf"weight must be on x's device {DEVICE}.*, got meta"),
        ({"x": zeros(5, 6, dtype=torch.int64)}, TypeError, r"x must be bfloat16, float16, float32 or float64, got torch.int64"),
        ({"weight": zeros(4, 6, dtype=FP16)}, TypeError, r"weight must have x's dtype torch.float32, got torch.float16"),
        ({"bias": zeros(4, dtype=FP16)}, TypeError, r"bias must have x's dtype torch.float32, got torch.float16"),
        ({"lora_A": zeros(2, 6, dtype=FP16)}, TypeError,
         r"lora_A and lora_B must have one dtype, got torch.float16 and torch.float32"),
        ({"lora_A": zeros(2, 6, dtype=FP16), "lora_B": zeros(4, 2, dtype=FP16)}, TypeError,
         r"lora_A and lora_B must be float32 or of x's dtype torch.float32, got torch.float16"),
        ({"x": zeros(5, 6, dtype=FP64), "weight": zeros(4, 6, dtype=FP64), "bias": None}, TypeError,
         r"lora_A and lora_B must be float32 or of x's dtype torch.float64, got torch.float32"),
    ],
    "branch": [
        *DROPOUT,
        ({"base_out": zeros(4, 4)}, ValueError, r"base_out must be \[..., N\] .* fit x \[5, 6\], got \[4, 4\]"),
        ({"base_out": zeros()}, ValueError, r"base_out must be .* got \[\]"),
        ({"x": zeros()}, ValueError, r"base_out must be .* fit x \[\], got \[5, 4\]"),
        ({"lora_A": zeros(2, 5)}, ValueError, r"lora_A must be \[r, 6\] .* base_out \[5, 4\], got \[2, 5\]"),
        ({"lora_B": zeros(5, 2)}, ValueError, r"lora_B must be \[4, 2\] to fit base_out \[5, 4\] .* got \[5, 2\]"),
        ({"base_out": zeros(5, 4, device="meta")}, ValueError, r"base_out must be on x's device .*, got meta"),
        ({"base_out": zeros(5, 4, dtype=torch.int32)}, TypeError, r"base_out must be bfloat16, .* got torch.int32"),
        ({"lora_A": zeros(2, 6, dtype=FP16)}, TypeError, r"one dtype, got torch.float16 and torch.float32"),
    ],
    "group": [
        *DROPOUT,
        ({"weights": []}, ValueError, r"one length, of 1 to 3, got 0, 2, 2, 2, 2"),
        ({"scalings": [1.0]}, ValueError, r"one length, of 1 to 3, got 2, 2, 2, 2, 1"),
        ({"lora_As.1": zeros(3, 23)}, ValueError, r"lora_A must be \[r, 24\] .* got \[3, 23\]"),
        ({"x": zeros(5, 23)}, ValueError, r"x must be \[..., 24\] to fit weight \[20, 24\], got \[5, 23\]"),
        ({"biases.0": zeros(12)}, ValueError, r"bias must be \[20\] to fit weight \[20, 24\], got \[12\]"),
    ],
    "mlp": [
        *DROPOUT,
        *(({"activation": given}, ValueError, ACTIVATION + f"{given!r}") for given in ("relu", "SiLU", None)),
        ({"activation": torch.nn.functional.silu}, ValueError, ACTIVATION + r"<function silu"),
        ({"x": zeros(70, 23)}, ValueError, r"x must be \[..., 24\] to fit gate.weight \[40, 24\], got \[70, 23\]"),
        ({"x": zeros()}, ValueError, r"x must be \[..., 24\] to fit gate.weight \[40, 24\], got \[\]"),
        ({"gate.weight": zeros(40)}, ValueError, r"gate.weight must be \[N, K\], got \[40\]"),
        ({"gate.weight": zeros(40, 25)}, ValueError, r"x must be \[..., 25\] to fit gate.weight \[40, 25\], got \[70, 24\]"),
        ({"gate.bias": zeros(41)}, ValueError, r"gate.bias must be \[40\] to fit gate.weight \[40, 24\], got \[41\]"),
        ({"gate.lora_A": zeros(6, 25)}, ValueError, r"gate.lora_A must be \[r, 24\] .* gate.weight \[40, 24\], got \[6, 25\]"),
        ({"gate.lora_A": zeros(0, 24)}, ValueError, r"gate.lora_A must be \[r, 24\] with r >= 1 .* got \[0, 24\]"),
        ({"gate.lora_B": zeros(40, 7)}, ValueError,
         r"gate.lora_B must be \[40, 6\] to fit gate.weight \[40, 24\] and gate.lora_A \[6, 24\], got \[40, 7\]"),
        *(({"up.weight": zeros(*size)}, ValueError, rf"up.weight must be \[40, 24\] to fit gate.weight, got \{[*size]}")
          for size in ((41, 24), (40, 23), (40,))),
        ({"up.weight": testing.nf4_weight(40, 48, 64, True)}, ValueError, r"up.weight must be \[40, 24\] .*, got \[40, 48\]"),
        ({"up.bias": zeros(1, 40)}, ValueError, r"up.bias must be \[40\] to fit up.weight \[40, 24\], got \[1, 40\]"),
        ({"up.lora_A": zeros(3, 40)}, ValueError, r"up.lora_A must be \[r, 24\] .* fit up.weight \[40, 24\], got \[3, 40\]"),
        ({"up.lora_B": zeros(20, 3)}, ValueError, r"up.lora_B must be \[40, 3\] .* got \[20, 3\]"),
        *(({"down.weight": zeros(*size)}, ValueError, rf"down.weight must be \[N, 40\] .* \[40, 24\], got \{[*size]}")
          for size in ((20, 39), (40, 20), (20,))),
        ({"down.weight": testing.fp8_weight(20, 41)}, ValueError, r"down.weight must be \[N, 40\] .* got \[20, 41\]"),
        ({"down.bias": zeros(40)}, ValueError, r"down.bias must be \[20\] to fit down.weight \[20, 40\], got \[40\]"),
        ({"down.lora_A": zeros(4, 24)}, ValueError, r"down.lora_A must be \[r, 40\] .* down.weight \[20, 40\], got \[4, 24\]"),
        ({"down.lora_B": zeros(40, 4)}, ValueError, r"down.lora_B must be \[20, 4\] .* got \[40, 4\]"),
        *(({f"{name}.{given}": None}, ValueError,
           rf"{name}.{given} must be given with {name}.{other}, or both must be None, got None")
          for name, given, other in (("gate", "lora_A", "lora_B"), ("up", "lora_B", "lora_A"), ("down", "lora_B", "lora_A"))),
        *(({name: zeros(*size, device="meta")}, ValueError, rf"{name} must be on x's device {DEVICE}.*, got meta")
          for name, size in (("up.weight", (40, 24)), ("down.weight", (20, 40)), ("down.lora_B", (20, 4)), ("gate.bias", (40,)))),
        ({"x": zeros(70, 24, dtype=torch.int64)}, TypeError, r"x must be bfloat16, float16, float32 or float64, got torch.int64"),
        *(({f"{name}.weight": zeros(*size, dtype=BF16)}, TypeError,
           rf"{name}.weight must have x's dtype torch.float32, got torch.bfloat16")
          for name, size in (("gate", (40, 24)), ("up", (40, 24)), ("down", (20, 40)))),
        ({"down.bias": zeros(20, dtype=FP16)}, TypeError, r"down.bias must have x's dtype torch.float32, got torch.float16"),
        ({"up.lora_A": zeros(3, 24, dtype=FP16)}, TypeError,
         r"up.lora_A and lora_B must have one dtype, got torch.float16 and torch.float32"),
        ({"down.lora_A": zeros(4, 40, dtype=FP16), "down.lora_B": zeros(20, 4, dtype=FP16)}, TypeError,
         r"down.lora_A and lora_B must be float32 or of x's dtype torch.float32, got torch.float16"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("op", REFUSED)
def test_errors_from_cold_and_warm_plans(op, warm, backend):
    good = arguments(op)
    for _ in range(3 * warm):
        FUNCTIONS[op](**good, dropout_p=0.3)
    known = len(plans._table.young)
    for changes, error, message in REFUSED[op]:
        refuses(op, good, changes, error, message)
    # What was refused is not remembered.
    assert len(plans._table.young) == known and (known > 0) == warm


@pytest.mark.parametrize("op", ["group", "mlp"])
def test_adapters_of_two_dtypes_are_refused(op, backend):
    good = arguments(op, BF16)
    if op == "group":
        pair = {"lora_As.1": good["lora_As"][1].float(), "lora_Bs.1": good["lora_Bs"][1].float()}
        refuses(op, good, pair, TypeError, r"lora_As must have one dtype, got torch.bfloat16 and torch.float32")
        return
    pair = {"down.lora_A": good["down"].lora_A.float(), "down.lora_B": good["down"].lora_B.float()}
    message = r"lora_A must have one dtype, got gate.lora_A torch.bfloat16, up.lora_A torch.bfloat16, down.lora_A torch.float32"
    refuses(op, good, pair, TypeError, message)
    without_gate = pair | {"gate.lora_A": None, "gate.lora_B": None}
    refuses(op, good, without_gate, TypeError, r"got up.lora_A torch.bfloat16, down.lora_A torch.float32")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_float64_does_not_fall_back_silently(op):
    good = arguments(op, FP64)
    name = "base_out" if op == "branch" else "x"
    with slk.use_backend("triton"):
        if op == "branch":
            good = arguments(op) | {name: good[name]}
        refuses(op, good, {}, TypeError, rf"{name} is torch.float64.*use_backend\('torch'\)")
        if op == "mlp":
            bare = {each: good[each]._replace(lora_A=None, lora_B=None) for each in PROJECTIONS}
            refuses(op, good, bare, TypeError, r"x is torch.float64.*use_backend\('torch'\)")
        if op == "linear":
            weight = {"weight": testing.nf4_weight(4, 6, 64, True)}
            refuses(op, good, weight, TypeError, r"x is torch\.float64")
    with slk.use_backend("torch"):
        found = FUNCTIONS[op](**good)
        assert (found[0] if op == "group" else found).dtype == FP64


def test_a_kernel_that_cannot_do_the_call_is_refused():
    """Before a launch of the same call."""
    good = arguments("mlp")
    high = {"up.lora_A": zeros(130, 24), "up.lora_B": zeros(40, 130)}
    with slk.use_backend("triton"):
        with slk.use_kernel("fused"):
            refuses(
                "linear",
                arguments("linear"),
                {},
                ValueError,
                "'fused' was asked for, but it has no dropout",
                drawn=True,
            )
            refuses("mlp", good, {}, ValueError, "'fused' was asked for, but it has no dropout", drawn=True)
            refuses("mlp", good, high | {"dropout_p": 0.0}, ValueError, "it takes ranks up to 64, got 130")
        with slk.use_kernel("chained"):
            refuses(
                "mlp",
                good,
                high,
                ValueError,
                "'chained' was asked for, but it takes ranks up to 128, got 130",
                drawn=True,
            )


def test_projections_are_named_tuples_of_lora_linears_arguments():
    assert LoRAWeights._fields == ("weight", "bias", "lora_A", "lora_B", "scaling")
