"""Schedules find every planted synchronization fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.helpers.inputs import DEVICE

pytest.importorskip("triton", reason="Triton is not installed on this platform")
if DEVICE == "cuda":
    pytest.skip("the interpreter runs where no GPU is", allow_module_level=True)

from tests.helpers.interleaving import Interleaving
from tests.helpers.planted_faults import FAULTS, SCHEDULES, Fault, interleaving


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@cache
def runs_of(name: str, stack: ExitStack) -> Interleaving:
    """The case with its run in order, which all faults share."""
    return stack.enter_context(interleaving(name))[0]


@pytest.mark.parametrize(
    ("fault", "case"), [pytest.param(f, case, id=f"{f.what} - {case}") for f in FAULTS for case in f.cases]
)
def test_a_fault_is_found(fault: Fault, case: str, stack: ExitStack) -> None:
    found = runs_of(case, stack).first_failure(range(SCHEDULES), mutation=fault.mutation)
    assert found is not None
    assert fault.looks_like in found.what
