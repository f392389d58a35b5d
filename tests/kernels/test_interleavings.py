"""Every kernel whose programs share something, under many orders of its programs: docs/internals/interleavings.md."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.inputs import DEVICE

pytest.importorskip("triton", reason="Triton is not installed on this platform")
if DEVICE == "cuda":
    pytest.skip("the interpreter runs where no GPU is", allow_module_level=True)

import triton
import triton.language as tl

from stablelora_kernels.kernels.lora.linear import add_branch
from stablelora_kernels.launch import counters
from stablelora_kernels.launch.base import Launch
from tests.helpers.interleaving import Interleaving
from tests.helpers.mutations import Mutation
from tests.helpers.planted_faults import EVERY_CASE, FAULTS, PROTOCOL, SCHEDULES, interleaving

# Of each case at night.
NIGHTLY = 20_000


@pytest.mark.parametrize(
    "schedules", [SCHEDULES, pytest.param(NIGHTLY, marks=pytest.mark.nightly)], ids=["", "nightly"]
)
@pytest.mark.parametrize("name", EVERY_CASE)
def test_every_schedule_leaves_the_same_bytes(name: str, schedules: int) -> None:
    with interleaving(name) as (runs, case):
        runs.write_back()
        case.check()
        assert not any(buffer.any() for buffer in counters._in_use.values())
        assert runs.first_failure(range(schedules)) is None


@pytest.mark.parametrize("processors", [1, 2, 3])
def test_the_protocol_needs_no_number_of_processors(processors: int) -> None:
    with interleaving(PROTOCOL) as (runs, _):
        assert runs.first_failure(range(SCHEDULES), processors=processors) is None


def test_a_deadlock_is_reported_with_each_programs_state() -> None:
    """Programs that take their id for a ticket hold the processors and wait for programs that have not begun."""
    (by_id,) = (fault.mutation for fault in FAULTS if "the program's id" in fault.what)
    with interleaving(PROTOCOL) as (runs, _):
        found = runs.first_failure(range(SCHEDULES), processors=2, mutation=by_id)
        again = runs.first_failure([found.schedule], processors=2, mutation=by_id)
    assert again == found
    title, *states = found.what.splitlines()
    assert title == "deadlock"
    spinning = [state for state in states if "again and again" in state]
    assert len(spinning) == 2
    assert all("before volatile load at one_launch_protocol.py:" in state for state in spinning)
    assert all("has read _one_launch_kernel's flags_ptr[" in state for state in spinning)
    assert sum("has not begun" in state for state in states) == len(states) - 2


def test_launches_overlap_only_where_they_may() -> None:
    """Without launch_pdl, the launch of Y begins when S's has ended, and need not wait."""
    unwaited = Mutation(add_branch, "tl.extra.cuda.gdc_wait()", "pass")
    with interleaving("pointers, S then Y, two layers") as (runs, case):
        assert runs.first_failure(range(SCHEDULES), mutation=unwaited) is not None
        apart = Interleaving([launch._replace(options={}) for launch in case.launches])
        assert apart.first_failure(range(SCHEDULES), mutation=unwaited) is None


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
    """Stores that nothing orders, of which the later is any."""
    x = torch.zeros(1, dtype=torch.int32)
    assert Interleaving([Launch(_race_kernel, "", "", (2,), (x,), {}, {})]).first_failure(range(20)) is not None


def test_an_access_outside_of_all_tensors_is_found() -> None:
    x, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    runs = Interleaving([Launch(_bytes_kernel, "", "", (2,), (x, out), {}, {})])
    found = runs.first_failure([0], mutation=Mutation(_bytes_kernel, "out_ptr + program", "out_ptr + program + 1000"))
    assert "of _bytes_kernel's" in found.what
