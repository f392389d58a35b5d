"""Faults of compiled kernels that show in their text; and what needs Triton's compiler, in processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton

from benchmarks.lab.compile_report import report
from benchmarks.lab.compile_report.hazards import early_counts, reloaded_scalars, short_buffers, store_round_trips
from tests.helpers.processes import printed, python

of_this_triton = pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."), reason=f"the report is of Triton {report.TRITON}'s compiler"
)
SCALAR = """
    mov.u32 %r1, %tid.x;
    ld.global.b32 { %r2 }, [ %rd1 + 0 ];
    @%p1 st.global.b32 [ %rd1 + 0 ], { %r4 };
"""
WAIT = "cp.async.bulk.wait_group \t0;\n cp.async.bulk.wait_group.read \t0;\n"
BUFFERS = """
    %x_1 = ttg.local_alloc : () -> !ttg.memdesc<2x16x128xbf16, #shared>
    %v_1 = ttg.memdesc_index %x_1[%c0] : !ttg.memdesc<3x16x128xbf16>
    %t_1 = ttg.async_copy_global_to_local %p, %v_1 mask %m : tensor<16x128>
    %t_2 = ttg.async_copy_global_to_local %p, %v_1 mask %m : tensor<16x128>
    %r = scf.for %i = %c0 to %n step %c1
      %v_3 = ttg.memdesc_index %x_1[%i] : !ttg.memdesc<3x16x128xbf16>
      %xt = ttg.memdesc_trans %v_3 {order = array<i32: 1, 0>} : !ttg.memdesc<16x128xbf16>
      %acc_2 = ttng.warp_group_dot %w, %xt, %acc {isAsync = true} : !ttg.memdesc<64x128xbf16>
      %acc_3:2 = ttng.warp_group_dot_wait %acc_2, %xt {pendings = 1 : i32} : tensor<64x16xf32>
      %t_4 = ttg.async_copy_global_to_local %p, %v_1 mask %m : tensor<16x128>
"""
PUBLISHED = """
    buffer_store_dwordx4 v[6:9], v10, s[52:55], 0 offen
    s_waitcnt lgkmcnt(0)
    s_barrier
    s_waitcnt vmcnt(0)
    global_atomic_add v11, v11, v13, s[14:15] sc0
"""


@pytest.mark.parametrize(
    ("find", "text", "of_fault", "mended"),
    [
        (reloaded_scalars, SCALAR, "@%p1", "bar.sync 0;\n @%p1"),
        (reloaded_scalars, SCALAR, "st.global.b32 [ %rd1 + 0", "st.global.b32 [ %rd1 + 8"),
        (reloaded_scalars, SCALAR, "ld", "add.s64 %rd1, %rd2, %r1;\n ld"),
        (store_round_trips, 2 * WAIT, 2 * WAIT, WAIT),
        (short_buffers, BUFFERS, "memdesc<2x", "memdesc<3x"),
        (short_buffers, BUFFERS, "pendings = 1", "pendings = 0"),
        (early_counts, PUBLISHED, "lgkmcnt(0)", "vmcnt(0) lgkmcnt(0)"),
    ],
)
def test_a_fault_is_found_and_the_mended_text_has_none(find, text: str, of_fault: str, mended: str) -> None:
    assert len([*find(text)]) == 1
    assert [*find(text.replace(of_fault, mended, 1))] == []


PLANTED = """
from benchmarks.lab.compile_report import machine_code, report
from stablelora_kernels.kernels.lora.chain import wait_for_flag
launch = next(launch for label, launch in report.jobs("sm_90").items() if {words!r} in " ".join(label))
function = {function}
assert {text!r} in function.src
function._unsafe_update_src(function.src.replace({text!r}, {by!r}))
print(machine_code.read(machine_code.compile_launch(launch, "sm_90")))
"""


@pytest.mark.nightly
@of_this_triton
@pytest.mark.parametrize(
    ("words", "function", "text", "by", "fault"),
    [
        ("stable_adamw aligned sharded", "launch.kernel", "tl.debug_barrier()", "pass", "late warp"),
        ("fused 16x", "launch.kernel", "acc = finished(acc)", "pass", "3 copies run ahead"),
        (" y r16 chained 128x256", "wait_for_flag", "INTERPRETING or targets_amd()", "True", "waits for"),
    ],
)
def test_a_fault_planted_in_a_kernel_is_found(words: str, function: str, text: str, by: str, fault: str) -> None:
    # Triton computes a kernel's key once a process.
    before, after = (printed(PLANTED.format(words=words, function=function, text=text, by=each)) for each in (text, by))
    assert "'load_bits'" in before and "ValueError" in after and fault in after


# Of all rows one in 40: changed code is compiled and compared, other code is as recorded. Then no digest is computed again.
KEPT = """
from benchmarks.lab.compile_report import machine_code, report
labels, old = [label for arch in report.DEVICES for label in report.jobs(arch)], report.read_report()
codes, recorded = report.codes_of(labels[::40]), report.recorded(old)
rows = [report.make_row(label) for label, code in codes.items() if code != recorded.get(label)]
problems = [row for row in rows if isinstance(row, str)] or report.compare(old, report.table(rows), labels)
assert not problems, problems
machine_code.code_digest = None
assert report.codes_of(labels[::40]) == codes
"""
# A constant that the variant's code does not depend on changes its source alone.
DIGESTS = """
from benchmarks.lab.compile_report import machine_code, report
launch = next(each for each in report.jobs("sm_90").values() if not each.constants.get("HAS_GRAD", True))
constants, options = launch.constants, launch.options
unused = launch._replace(constants=constants | {"GRAD_STAGES": 7})
others = launch._replace(constants=constants | {"BLOCK_N": 16}), launch._replace(options=options | {"num_warps": 16})
for digest, different in ((machine_code.source_digest, 5), (machine_code.code_digest, 4)):
    found = [*(digest(each, "sm_90") for each in (launch, launch, unused, *others)), digest(launch, "sm_80")]
    assert found[0] == found[1] and len(set(found)) == different, (digest, found)
"""
ALL = "from benchmarks.lab.compile_report.report import main; raise SystemExit(main(['--check', '--arch', '{}']))"


@of_this_triton
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(KEPT, id="sample"),
        pytest.param(DIGESTS, id="digests"),
        *(pytest.param(ALL.format(arch), id=arch, marks=pytest.mark.nightly) for arch in report.DEVICES),
    ],
)
def test_todays_kernels_keep_the_report(code: str, tmp_path: Path) -> None:
    done = python(code, STABLELORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-8000:]
