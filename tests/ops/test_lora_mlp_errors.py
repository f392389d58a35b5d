"""Every refusal of ``functional.lora_mlp``, by the words a user would read, before anything is computed."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.functional import LoRAWeights, lora_mlp
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.inputs import BF16, DEVICE, FP16
from tests.helpers.launches import count_launches
from tests.helpers.mlps import MLP, PROJECTIONS

ROWS, K, F, N = 70, 24, 40, 20
ONE_OF = "activation must be one of 'silu', 'gelu', 'gelu_tanh', got "


def arguments(*dtypes):
    mlp = MLP((ROWS, K), F, N, (6, 3, 4), *dtypes, biases=(True, True, True))
    return {"x": mlp.x, **dict(zip(PROJECTIONS, mlp.projections(mlp.tensors()[1:]), strict=True)), "activation": "silu"}


def zeros(*size, dtype=torch.float32, device=DEVICE):
    return torch.zeros(size, dtype=dtype, device=device)


# What is changed, in words such as "gate.lora_A", to what; the error and its message.
VALUES = [
    ({"activation": "relu"}, ONE_OF + r"'relu'"),
    ({"activation": "SiLU"}, ONE_OF + r"'SiLU'"),
    ({"activation": None}, ONE_OF + r"None"),
    ({"activation": torch.nn.functional.silu}, ONE_OF + r"<function silu"),
    ({"x": zeros(ROWS, K - 1)}, r"x must be \[..., 24\] to fit gate.weight \[40, 24\], got \[70, 23\]"),
    ({"x": zeros()}, r"x must be \[..., 24\] to fit gate.weight \[40, 24\], got \[\]"),
    ({"gate.weight": zeros(F)}, r"gate.weight must be \[N, K\], got \[40\]"),
    ({"gate.weight": zeros(F, K + 1)}, r"x must be \[..., 25\] to fit gate.weight \[40, 25\], got \[70, 24\]"),
    ({"gate.bias": zeros(F + 1)}, r"gate.bias must be \[40\] to fit gate.weight \[40, 24\], got \[41\]"),
    ({"gate.lora_A": zeros(6, K + 1)}, r"gate.lora_A must be \[r, 24\] with r >= 1 to fit gate.weight \[40, 24\], got \[6, 25\]"),
    ({"gate.lora_A": zeros(0, K)}, r"gate.lora_A must be \[r, 24\] with r >= 1 .* got \[0, 24\]"),
    (
        {"gate.lora_B": zeros(F, 7)},
        r"gate.lora_B must be \[40, 6\] to fit gate.weight \[40, 24\] and gate.lora_A \[6, 24\], got \[40, 7\]",
    ),
    ({"up.weight": zeros(F + 1, K)}, r"up.weight must be \[40, 24\] to fit gate.weight, got \[41, 24\]"),
    ({"up.weight": zeros(F, K - 1)}, r"up.weight must be \[40, 24\] to fit gate.weight, got \[40, 23\]"),
    ({"up.weight": zeros(F)}, r"up.weight must be \[40, 24\] to fit gate.weight, got \[40\]"),
    ({"up.bias": zeros(1, F)}, r"up.bias must be \[40\] to fit up.weight \[40, 24\], got \[1, 40\]"),
    ({"up.lora_A": zeros(3, F)}, r"up.lora_A must be \[r, 24\] with r >= 1 to fit up.weight \[40, 24\], got \[3, 40\]"),
    ({"up.lora_B": zeros(N, 3)}, r"up.lora_B must be \[40, 3\] .* got \[20, 3\]"),
    ({"down.weight": zeros(N, F - 1)}, r"down.weight must be \[N, 40\] to fit gate.weight \[40, 24\], got \[20, 39\]"),
    ({"down.weight": zeros(F, N)}, r"down.weight must be \[N, 40\] to fit gate.weight \[40, 24\], got \[40, 20\]"),
    ({"down.weight": zeros(N)}, r"down.weight must be \[N, 40\] to fit gate.weight \[40, 24\], got \[20\]"),
    ({"down.bias": zeros(F)}, r"down.bias must be \[20\] to fit down.weight \[20, 40\], got \[40\]"),
    ({"down.lora_A": zeros(4, K)}, r"down.lora_A must be \[r, 40\] with r >= 1 to fit down.weight \[20, 40\], got \[4, 24\]"),
    ({"down.lora_B": zeros(F, 4)}, r"down.lora_B must be \[20, 4\] .* got \[40, 4\]"),
    ({"gate.lora_A": None}, r"gate.lora_A must be given with gate.lora_B, or both must be None, got None"),
    ({"up.lora_B": None}, r"up.lora_B must be given with up.lora_A, or both must be None, got None"),
    ({"down.lora_B": None}, r"down.lora_B must be given with down.lora_A, or both must be None, got None"),
    ({"up.weight": zeros(F, K, device="meta")}, r"up.weight must be on x's device cpu, got meta"),
    ({"down.weight": zeros(N, F, device="meta")}, r"down.weight must be on x's device cpu, got meta"),
    ({"down.lora_B": zeros(N, 4, device="meta")}, r"down.lora_B must be on x's device cpu, got meta"),
    ({"gate.bias": zeros(F, device="meta")}, r"gate.bias must be on x's device cpu, got meta"),
    ({"up.weight": nf4_weight(F, 2 * K, 64, True)}, r"up.weight must be \[40, 24\] to fit gate.weight, got \[40, 48\]"),
    ({"down.weight": fp8_weight(N, F + 1)}, r"down.weight must be \[N, 40\] to fit gate.weight \[40, 24\], got \[20, 41\]"),
    ({"dropout_p": 1.0}, r"dropout_p must be a finite number in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, r"dropout_p must be a finite number in \[0, 1\), got -0.1"),
    ({"dropout_p": float("nan")}, r"dropout_p must be a finite number in \[0, 1\), got nan"),
]  # fmt: skip
TYPES = [
    ({"x": zeros(ROWS, K, dtype=torch.int64)}, r"x must be bfloat16, float16, float32 or float64, got torch.int64"),
    ({"gate.weight": zeros(F, K, dtype=FP16)}, r"gate.weight must have x's dtype torch.float32, got torch.float16"),
    ({"up.weight": zeros(F, K, dtype=BF16)}, r"up.weight must have x's dtype torch.float32, got torch.bfloat16"),
    ({"down.weight": zeros(N, F, dtype=BF16)}, r"down.weight must have x's dtype torch.float32, got torch.bfloat16"),
    ({"down.bias": zeros(N, dtype=FP16)}, r"down.bias must have x's dtype torch.float32, got torch.float16"),
    (
        {"up.lora_A": zeros(3, K, dtype=FP16)},
        r"up.lora_A and lora_B must have one dtype, got torch.float16 and torch.float32",
    ),
    (
        {"down.lora_A": zeros(4, F, dtype=FP16), "down.lora_B": zeros(N, 4, dtype=FP16)},
        r"down.lora_A and lora_B must be float32 or of x's dtype torch.float32, got torch.float16",
    ),
    ({"dropout_p": "0.1"}, r"dropout_p must be a number, got '0.1' of type str"),
]  # fmt: skip


def changed(good, changes):
    given = dict(good)
    for name, value in changes.items():
        projection, _, field = name.partition(".")
        given[projection] = given[projection]._replace(**{field: value}) if field else value
    return given


def refuses(good, changes, error, message):
    """It raises, and neither launches anything nor draws a number."""
    state = torch.get_rng_state()
    with count_launches() as made, pytest.raises(error, match=message):
        lora_mlp(**({"dropout_p": 0.3} | changed(good, changes)))
    assert not made
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("warm", [False, True])
def test_errors_from_cold_and_warm_plans(warm, backend):
    good = arguments()
    for _ in range(3 * warm):
        lora_mlp(**good, dropout_p=0.3)
    known = len(plans._table.young)
    for cases, error in ((VALUES, ValueError), (TYPES, TypeError)):
        for changes, message in cases:
            refuses(good, changes, error, message)
    # What was refused is not remembered.
    assert len(plans._table.young) == known and (known > 0) == warm


def test_adapters_of_two_dtypes_are_refused(backend):
    good = arguments(BF16, BF16)
    pair = {"down.lora_A": good["down"].lora_A.float(), "down.lora_B": good["down"].lora_B.float()}
    message = r"lora_A must have one dtype, got gate.lora_A torch.bfloat16, up.lora_A torch.bfloat16, down.lora_A torch.float32"
    refuses(good, pair, TypeError, message)
    without_gate = pair | {"gate.lora_A": None, "gate.lora_B": None}
    refuses(good, without_gate, TypeError, r"got up.lora_A torch.bfloat16, down.lora_A torch.float32")


def test_float64_does_not_fall_back_silently():
    good = arguments(torch.float64)
    with slk.use_backend("triton"):
        refuses(good, {}, TypeError, r"x is torch.float64.*use_backend\('torch'\)")
        bare = {name: good[name]._replace(lora_A=None, lora_B=None) for name in PROJECTIONS}
        refuses(good, bare, TypeError, r"x is torch.float64.*use_backend\('torch'\)")
    with slk.use_backend("torch"):
        assert lora_mlp(**good).dtype == torch.float64


def test_a_kernel_that_cannot_do_the_call_is_refused():
    """Before a launch of the same call."""
    good = arguments()
    high = changed(good, {"up.lora_A": zeros(130, K), "up.lora_B": zeros(F, 130)})
    with slk.use_backend("triton"):
        with slk.use_kernel("fused"):
            with (
                count_launches() as made,
                pytest.raises(ValueError, match="'fused' was asked for, but it has no dropout"),
            ):
                lora_mlp(**good, dropout_p=0.3)
            assert not made
            with count_launches() as made, pytest.raises(ValueError, match="it takes ranks up to 64, got 130"):
                lora_mlp(**high)
            assert not made
        with (
            slk.use_kernel("chained"),
            count_launches() as made,
            pytest.raises(ValueError, match="'chained' was asked for, but it takes ranks up to 128, got 130"),
        ):
            lora_mlp(**high)
        assert not made


def test_projections_are_named_tuples_of_lora_linears_arguments():
    assert LoRAWeights._fields == ("weight", "bias", "lora_A", "lora_B", "scaling")
