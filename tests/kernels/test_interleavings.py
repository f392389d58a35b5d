"""Every kernel with a shared sum, counter or flag, under many schedules: docs/internals/interleavings.md."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import DEVICE

pytest.importorskip("triton", reason="Triton is not installed on this platform")
if DEVICE == "cuda":
    pytest.skip("the interpreter runs where no GPU is", allow_module_level=True)

import triton
import triton.language as tl

from stablelora_kernels.kernels import common
from stablelora_kernels.launch import jobs, workspace
from stablelora_kernels.launch.base import Launch
from tests.helpers.interleaving import Interleaving, Mutation
from tests.helpers.interleaving_cases import CASES
from tests.helpers.planted_faults import FAULTS, SCHEDULES, interleaving

# Schedules of each case in a nightly run; SCHEDULES are those of every test run.
NIGHTLY = 20_000
CHAINED = "chained pointers, S and Y, two layers"


@pytest.mark.parametrize(
    "schedules", [SCHEDULES, pytest.param(NIGHTLY, marks=pytest.mark.nightly)], ids=["", "nightly"]
)
@pytest.mark.parametrize("name", CASES)
def test_every_schedule_leaves_the_same_bytes(name: str, schedules: int) -> None:
    runs, case = interleaving(name)
    runs.write_back()
    case.check()
    assert not any(buffer.any() for buffer in workspace._in_use.values())
    assert runs.first_failure(range(schedules)) is None


@pytest.mark.parametrize("processors", [1, 2, 3])
def test_a_chained_launch_needs_no_number_of_processors(processors: int) -> None:
    assert interleaving(CHAINED)[0].first_failure(range(SCHEDULES), processors=processors) is None


def test_a_deadlock_is_reported_with_each_programs_state() -> None:
    """With the program's id as ticket, waiting programs hold all processors, and those that they wait for cannot begin."""
    (by_id,) = (fault.mutation for fault in FAULTS if fault.what == "chained: the program's id for its ticket")
    runs, _ = interleaving(CHAINED)
    found = runs.first_failure(range(SCHEDULES), processors=2, mutation=by_id)
    assert runs.first_failure([found.schedule], processors=2, mutation=by_id) == found
    title, *states = found.what.splitlines()
    assert title == "deadlock"
    spinning = [state for state in states if "again and again" in state]
    assert len(spinning) == 2
    assert all("before volatile load at chain.py:" in state and "counter[" in state for state in spinning)
    assert sum("has not begun" in state for state in states) == len(states) - 2


def test_jobs_of_one_launch_must_not_count_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes keep the counters of dS and dB, dX and dA apart."""
    original = workspace.counters
    monkeypatch.setattr(jobs, "counters", lambda n, device, lane=0: original(n, device))
    runs, case = interleaving.__wrapped__("chained split-K, all gradients")
    runs.write_back()
    with pytest.raises(AssertionError):
        case.check()


@triton.jit
def _bytes_kernel(x_ptr, out_ptr):
    """Each program stores a word of X, then one byte of it, and reads the word."""
    program = tl.program_id(0)
    tl.store(x_ptr + program, 0x01020304)
    tl.store(x_ptr.to(tl.pointer_type(tl.int8)) + 4 * program + 1, 0x55)
    tl.store(out_ptr + program, tl.load(x_ptr + program))


def test_a_program_sees_its_own_stores_byte_by_byte() -> None:
    x, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    runs = Interleaving([Launch(_bytes_kernel, "", "", (2,), (x, out), {}, {})])
    assert not x.any() and not out.any()
    runs.write_back()
    assert out.tolist() == x.tolist() == [0x01025504] * 2
    assert runs.first_failure(range(SCHEDULES)) is None


@triton.jit
def _race_kernel(x_ptr):
    tl.store(x_ptr, tl.program_id(0))


def test_a_race_is_found() -> None:
    """Two programs store different values to one address."""
    x = torch.zeros(1, dtype=torch.int32)
    assert Interleaving([Launch(_race_kernel, "", "", (2,), (x,), {}, {})]).first_failure(range(20)) is not None


def test_an_access_outside_all_tensors_is_found() -> None:
    far = Mutation(common.shared_sum, "split * PART", "(split.to(tl.int64) << 40)")
    found = interleaving("quantized, S then Y")[0].first_failure([0], mutation=far)
    assert found is not None and found.what.startswith("bytes ")
