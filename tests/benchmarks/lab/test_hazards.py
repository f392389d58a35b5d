"""Faults of compiled kernels that show in their text: each is found where it is planted, and nowhere else."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.lab.compile_report.assembly import PTX_THREAD, parse_ptx
from benchmarks.lab.compile_report.hazards import reloaded_scalars, short_buffers, store_round_trips
from benchmarks.lab.compile_report.machine_code import varying
from tests.benchmarks.lab.test_compile_report_kernels import of_this_triton
from tests.helpers.processes import printed

SCALAR = """
    mov.u32 %r1, %tid.x;
    ld.global.b32 { %r2 }, [ %rd1 + 0 ];
    ld.global.b32 { %r3 }, [ %rd1 + 4 ];
    BARRIER
    @%p1 st.global.b32 [ %rd1 + 0 ], { %r4 };
"""


def _reloaded(text: str) -> int:
    code = parse_ptx(text)
    return len([*reloaded_scalars(code, varying(code, PTX_THREAD))])


def test_a_scalar_is_stored_behind_a_barrier() -> None:
    assert _reloaded(SCALAR.replace("BARRIER", "")) == 1
    assert _reloaded(SCALAR.replace("BARRIER", "bar.sync 0;")) == 0
    assert _reloaded(SCALAR.replace("[ %rd1 + 0 ], {", "[ %rd1 + 8 ], {")) == 0
    # An element of a thread's own.
    own = SCALAR.replace("BARRIER", "").replace(
        "ld.global.b32 { %r2 }", "add.s64 %rd1, %rd1, %r1;\n ld.global.b32 { %r2 }"
    )
    assert _reloaded(own) == 0


def test_one_wait_for_stores_of_tiles() -> None:
    wait = "cp.async.bulk.wait_group \t0;\n cp.async.bulk.wait_group.read \t0;\n"
    assert [*store_round_trips(wait)] == []
    assert len([*store_round_trips(2 * wait)]) == 1


BUFFERS = """
    %x_1 = ttg.local_alloc : () -> !ttg.memdesc<DEPTHx16x128xbf16, #shared>
    %v_1 = ttg.memdesc_index %x_1[%c0] : !ttg.memdesc<3x16x128xbf16>
    %t_1 = ttg.async_copy_global_to_local %p, %v_1 mask %m other %o {contiguity = 8 : i32} : tensor<16x128>
    %v_2 = ttg.memdesc_index %x_1[%c1] : !ttg.memdesc<3x16x128xbf16>
    %t_2 = ttg.async_copy_global_to_local %p, %v_2 mask %m other %o {contiguity = 8 : i32} : tensor<16x128>
    %r = scf.for %i = %c0 to %n step %c1
      %v_3 = ttg.memdesc_index %x_1[%i] : !ttg.memdesc<3x16x128xbf16>
      %xt = ttg.memdesc_trans %v_3 {order = array<i32: 1, 0>} : !ttg.memdesc<16x128xbf16>
      %acc_2 = ttng.warp_group_dot %w, %xt, %acc {isAsync = true} : !ttg.memdesc<64x128xbf16>
      %acc_3:2 = ttng.warp_group_dot_wait %acc_2, %xt {pendings = 1 : i32} : tensor<64x16xf32>
      %v_4 = ttg.memdesc_index %x_1[%j] : !ttg.memdesc<3x16x128xbf16>
      %t_4 = ttg.async_copy_global_to_local %p, %v_4 mask %m other %o {contiguity = 8 : i32} : tensor<16x128>
"""


def test_an_asynchronous_product_has_a_buffer_more_than_copies_run_ahead() -> None:
    short, enough = BUFFERS.replace("DEPTH", "2"), BUFFERS.replace("DEPTH", "3")
    assert len([*short_buffers(short)]) == 1
    assert [*short_buffers(enough)] == []
    assert [*short_buffers(short.replace("pendings = 1", "pendings = 0"))] == []


COMPILED = """
from benchmarks.lab.compile_report import launches, machine_code
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.kernels.lora.chain import wait_for_flag
launch = next(launch for _, launch in launches.{source} if {words!r} in launch.variant)
function = {function}
assert {text!r} in function.src
function._unsafe_update_src(function.src.replace({text!r}, {by!r}))
try:
    machine_code.read(machine_code.compile_launch(launch, "sm_90"))
    print("no fault")
except ValueError as error:
    print(error)
"""
_LINEAR = "lora_linear_launches(DEVICES['sm_90'])"


# Every launch that dispatch can pick is looked at by --check in test_compile_report_kernels.
@of_this_triton
@pytest.mark.parametrize(
    ("words", "source", "function", "planted", "fault"),
    [
        ("sharded", "stable_adamw_launches()", "launch.kernel", ("tl.debug_barrier()", "pass"), "late warp"),
        ("fused 16x", _LINEAR, "launch.kernel", ("acc = finished(acc)", "pass"), "3 copies run ahead"),
        ("y r16 chained 128x256", _LINEAR, "wait_for_flag", ("INTERPRETING or targets_amd()", "True"), "waits for"),
    ],
    ids=["optimizer", "few rows", "chained"],
)
def test_a_planted_fault_is_found(words: str, source: str, function: str, planted: tuple[str, str], fault: str) -> None:
    text, by = planted
    # Triton computes a kernel's key once a process.
    before, after = (
        printed(COMPILED.format(words=words, source=source, function=function, text=text, by=each))
        for each in (text, by)
    )
    assert before == "no fault"
    assert fault in after
