"""The formulas of a gated MLP's bytes against the counter, and what fusing saves."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.lab.traffic import counter, formula
from benchmarks.lab.traffic.mlp import BF16, FP32, MLP, apart, launches, mlp_rows
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.settings import use_kernel
from stablelora_kernels.launch.dry_run import mlp_launches

pytestmark = [
    pytest.mark.skipif(not backend.INTERPRETING, reason="bytes are counted in the interpreter only"),
    pytest.mark.usefixtures("one_thread"),
]
CPU = torch.device("cpu")
# Descriptors and pointers; ranks that fill no block and several blocks; the vendor's products; few rows.
CASES = [
    (136, 72, 264, 136, 16, 0.0, BF16, "split"),
    (136, 72, 264, 136, 20, 0.3, BF16, "split"),
    (70, 67, 75, 71, 3, 0.3, BF16, "split"),
    (70, 72, 136, 40, 80, 0.0, BF16, "split"),
    (9, 72, 136, 40, 8, 0.3, BF16, "auto"),
    (70, 72, 136, 40, 8, 0.0, BF16, "chained"),
    (70, 72, 136, 40, 8, 0.3, FP32, "auto"),
    (70, 72, 136, 40, 80, 0.3, BF16, "vendor"),
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("m", "n", "f", "k", "r", "p", "dtype", "kernel"), CASES, ids=str)
def test_the_formula_counts_an_mlp(m, n, f, k, r, p, dtype, kernel, arch):
    with use_kernel(kernel):
        ways = mlp_launches(DEVICES[arch], m, n, f, k, r, dtype, FP32, p, "silu", "cpu")
    made = [launch for way in ways for launch in way]
    with counter.counted() as found:
        for launch in made:
            launch.run(CPU)
    for launch, seen in zip(made, found, strict=True):
        assert seen.tensors == formula.formula_by_tensor(launch), (seen.kernel, launch.variant)


def test_one_op_moves_less():
    """G, U and H are written by one kernel, dG and dU by another: neither H nor dH is read or written for the activation."""
    mlp = MLP(2048, 4096, 14336, 4096, 16)
    forward, backward = mlp_rows(DEVICES["sm_90"], mlp)
    assert (forward["launches_apart"], forward["launches"]) == (4, 3)
    assert (backward["launches_apart"], backward["launches"]) == (5, 4)
    assert forward["wide_passes_apart"] - forward["wide_passes"] == 2
    assert backward["wide_passes_apart"] - backward["wide_passes"] == 3
    # dA's programs read G and U for themselves, where H was read once.
    assert backward["wide_passes_apart"] - backward["wide_passes_of_readers"] == 1
    assert forward["unique"] < 0.9 * forward["unique_apart"] and backward["unique"] < 0.8 * backward["unique_apart"]


def test_no_launch_is_elementwise():
    for arch in ("sm_80", "sm_90", "gfx942"):
        names = [
            launch.kernel.__name__
            for way in launches(DEVICES[arch], MLP(2048, 4096, 14336, 4096, 16))
            for launch in way
        ]
        assert "_gated_activation_kernel" not in names
    assert apart(DEVICES["sm_90"], MLP(2048, 4096, 14336, 4096, 16))[0].passes == 6
