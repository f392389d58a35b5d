"""Weights in 4 and 8 bits: which launch dequantizes them, in the product's own loop or before it, and how often."""

from __future__ import annotations

import pytest

import stablelora_kernels as slk
from stablelora_kernels.dispatch import rules
from stablelora_kernels.dispatch.problem import DEVICES, Call
from stablelora_kernels.dispatch.rules import QUANTIZED_RULES
from stablelora_kernels.launch.dry_run import quantized_launches
from stablelora_kernels.testing import fp8_weight, nf4_weight
from tests.helpers.case_checks import check
from tests.helpers.cases import BF16, FP16, FP32, Case, make, on_device, run, small
from tests.helpers.launches import count_launches

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(
    ("direction", "m", "bits", "dtype", "kernel"),
    [
        ("forward", 1, 4, BF16, "in_loop"),
        ("forward", 256, 4, BF16, "in_loop"),
        ("forward", 257, 8, FP16, "dequantize"),
        ("forward", 16, 4, FP32, "in_loop"),
        ("forward", 17, 4, FP32, "dequantize"),
        ("backward", 128, 4, BF16, "in_loop"),
        ("backward", 129, 4, BF16, "dequantize"),
        ("backward", 256, 8, BF16, "in_loop"),
        ("backward", 257, 8, BF16, "dequantize"),
    ],
)
def test_the_table(direction, m, bits, dtype, kernel):
    call = Call(direction, m, 4096, 4096, 16, dtype, FP32, False)
    choice = rules.choose_quantized(DEVICES["sm_90"], call, bits)
    assert choice.kernel == kernel
    assert choice.reason in [rule.reason for rule in QUANTIZED_RULES]
    with slk.use_kernel("split"):
        forced = rules.choose_quantized(DEVICES["sm_90"], call, bits)
    assert forced.kernel == "dequantize" and "'split' is forced" in forced.reason


@pytest.mark.parametrize(("weight", "kernel"), [
    (nf4_weight(8, 128, 64, nested=True), "in_loop"),
    (nf4_weight(8, 64, 128, nested=True), "dequantize"),
    (nf4_weight(8, 37, 64, nested=False), "dequantize"),
    (fp8_weight(8, 48), "in_loop"),
    (fp8_weight(8, 40), "dequantize"),
])  # fmt: skip
def test_rows_that_begin_anywhere_are_dequantized_first(weight, kernel):
    n, k = weight.shape
    layout = weight.stored.layout
    call = Call("forward", 1, n, k, 4, BF16, FP32, False)
    assert rules.choose_quantized(DEVICES["sm_90"], call, layout.bits, layout.aligned).kernel == kernel
    case = Case("linear", (1, k), (n,), (4,), BF16, FP32)
    given = make(case) | {"weight0": on_device(weight)}
    with count_launches() as made:
        check(case, run(case, given), given)
    assert made["_dequantize_kernel"] == (2 if kernel == "dequantize" else 0)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_programs_share_a_long_sum(kind):
    """Few tiles and a long sum: the launcher gives a tile to two programs, forward and backward (their results: test_oracle)."""
    for launches in quantized_launches(DEVICES["sm_90"], 5, 17 * 64, 17 * 64, 6, BF16, FP32, 0.0, kind):
        assert [launch.grid for launch in launches if "quantized" in launch.kernel.__name__] == [(17 * 2,)]


@pytest.mark.parametrize("kinds", [("nf4", "fp8", "nf4 nested"), (None, None, "nf4 nested")], ids=str)
def test_many_rows_of_an_mlp_dequantize_each_weight_twice(kinds):
    """Once forward and once backward, where only the weights that its gradients need are dequantized."""
    case = small("mlp", shape=(260, 64), sizes=(48, 48, 128), dtype=BF16, lora_dtype=FP32, quantized=kinds)
    with count_launches() as made:
        run(case)
    assert made["_dequantize_kernel"] == 2 * sum(kind is not None for kind in kinds)
    for wanted, count in ((["lora_A0", "lora_B0", "lora_A1", "lora_B1"], 1), (["lora_A2", "lora_B2"], 0)):
        forward = sum(kind is not None for kind in kinds)
        with count_launches() as made:
            run(case.but(wanted=wanted))
        assert made["_dequantize_kernel"] == forward + count
