"""First use on a GPU: every kind of call is proven and timed, and the answers are right."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import first_use
from stablelora_kernels.dispatch.first_use import OPERATORS
from stablelora_kernels.ops import plans
from stablelora_kernels.testing import cases
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, Case
from stablelora_kernels.testing.expectations import expectations
from tests.helpers.gpu_checks import SMALL

pytestmark = pytest.mark.gpu

M, K = (70, 64) if SMALL else (2048, 4096)
CASES = [
    Case("linear", (M, K), (K,), (16,), BF16, FP32),
    Case("linear", (M, K), (K,), (16,), BF16, FP32, p=0.1),
    Case("linear", (5, K), (K,), (16,), BF16, FP32),
    Case("linear", (M, K), (K,), (16,), BF16, FP32, quantized=("nf4 nested",)),
    Case("group", (M, K), (K, K // 4, K // 4), (16, 16, 16), BF16, FP32, p=0.1),
    Case("mlp", (M, K), (2 * K, 2 * K, K), (16, 16, 16), BF16, FP32, p=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_kind_of_call_is_proven_and_timed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    first_use.forget()
    plans.clear()
    operands = cases.make(case)
    with slk.settings(first_use="on"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="stablelora_kernels")
        results = cases.run(case, operands)
        for name, expected in expectations(case, operands).items():
            expected.check(results[name], name)
    findings = first_use.findings_on(torch.device(DEVICE))
    proofs = [f for kind, f in findings.items() if not kind.op.endswith("timed")]
    times = [f for kind, f in findings.items() if kind.op.endswith("timed")]
    assert len(proofs) == 2 and not any(any(f.faults.values()) for f in proofs)
    # The interpreter proves, and times nothing.
    assert len(times) == (0 if SMALL else 2)
    for finding in times:
        assert finding.fastest in finding.microseconds and OPERATORS in finding.microseconds
        assert all(0 < us < 1e6 for us in finding.microseconds.values())
    first_use.forget()
    plans.clear()
