"""An MLP's launches: how many there are for the gradients that are wanted, and which may begin
early.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case
from tests.helpers.case_checks import launches
from tests.helpers.cases import small

another_gpu = pytest.mark.skipif(
    DEVICE == "cuda", reason="pretends a GPU: runs on machines without one"
)


@another_gpu
@pytest.mark.parametrize(
    ("processors", "arch", "forward"), [(1, "sm_90", 3), (1, "sm_80", 3), (132, "sm_90", 5)]
)
def test_launches_of_a_call(processors, arch, forward):
    """S of gate and up, both with the gate, and down. Where processors are idle, gate, up and the
    gate are three launches.
    """
    case = Case(
        "mlp", (130, 64), (48, 48, 24), (6, 3, 4), BF16, BF16, arch=arch, processors=processors
    )
    assert [made.total() for made in launches(case)] == [forward, 4]


@another_gpu
@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (["x"], 3),
        (None, 4),
        # dG and dU without dX.
        (["lora_A0", "lora_A1"], 4),
        (["lora_B0", "lora_B1"], 3),
        (["lora_A0", "lora_A1", "lora_B0", "lora_B1"], 4),
        # Nothing of gate and up.
        (["lora_A2", "lora_B2"], 1),
        (["lora_A2"], 1),
        (["lora_B2"], 1),
    ],
    ids=str,
)
def test_backward_launches_what_is_asked_for(wanted, count):
    """A product's launch may have dS, dA and dB as well."""
    case = small("mlp", dtype=BF16, lora_dtype=BF16, p=0.3, arch="sm_80", wanted=wanted)
    assert launches(case)[1].total() == count


@pytest.mark.parametrize(
    "kinds", [("nf4", "fp8", "nf4 nested"), (None, None, "nf4 nested")], ids=str
)
def test_many_rows_dequantize_each_weight_once_in_each_direction(kinds):
    """Backward only those weights that its gradients need."""
    case = small(
        "mlp", shape=(260, 64), sizes=(48, 48, 128), dtype=BF16, lora_dtype=FP32, quantized=kinds
    )
    count = sum(kind is not None for kind in kinds)
    for wanted, again in (
        (None, count),
        (["lora_A0", "lora_B0", "lora_A1", "lora_B1"], 1),
        (["lora_A2", "lora_B2"], 0),
    ):
        assert [made["dequantize"] for made in launches(case.but(wanted=wanted))] == [
            count,
            again,
        ], wanted
