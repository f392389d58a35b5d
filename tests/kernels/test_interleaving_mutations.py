"""Schedules find every planted synchronization fault: by day each fault in one case or more, and all pairs at night."""

from __future__ import annotations

import pytest

from tests.helpers.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed on this platform")
if DEVICE == "cuda":
    pytest.skip("the interpreter runs where no GPU is", allow_module_level=True)

from tests.helpers.planted_faults import FAULTS, SCHEDULES, Fault, interleaving


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("fault", "case"), [pytest.param(f, case, id=f"{f.what} - {case}") for f in FAULTS for case in f.cases]
)
def test_a_fault_is_found(fault: Fault, case: str) -> None:
    found = interleaving(case)[0].first_failure(range(SCHEDULES), mutation=fault.mutation)
    assert found is not None
    assert fault.looks_like in found.what
