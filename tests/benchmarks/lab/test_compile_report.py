"""Reading machine code and finding its faults, on small texts; what the committed report promises, and what kernels keep."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton

from benchmarks.lab.compile_report import hazards_amd, machine_code, report
from benchmarks.lab.compile_report.hazards import reloaded_scalars, short_buffers, store_round_trips
from benchmarks.lab.compile_report.hazards_amd import early_counts
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES
from tests.helpers.processes import python

of_this_triton = pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."), reason=f"the report is of Triton {report.TRITON}'s compiler"
)
# %rd2 differs between threads, %rd1 does not.
PTX = """
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 16, %rd1;
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	@%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r10, %r11, %r12, %r13 };
"""
NARROW = "	@%p4 ld.global.b16 	%rs1, [%rd2+8];\n"
TILE = "	@%p5 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r8], [%rd7, {%r3, %r4}], [%r9];\n"
UNIFORM = "	ld.global.b16 	%rs1, [%rd1];\n	st.global.b32 	[%rd3], %r10;\n"
GCN = """
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]
	buffer_load_dword v1, s[4:7], 0 offen lds
	global_store_short v0, v2, s[6:7]
    .private_segment_fixed_size: 24
    .vgpr_count:     152
"""
LOG = "(C7511) Potential Loss: wgmma.mma_async instructions are serialized due to X in the function '_kernel'"


@pytest.mark.parametrize(
    ("more", "machine", "log", "expected"),
    [
        ("", "", "", {"registers": 168, "mma": "", "serialized": "", "load_bits": 128, "store_bits": 128}),
        (NARROW, "", "", {"load_bits": 72, "store_bits": 128}),
        (TILE + NARROW, "", "", {"load_bits": 91}),
        (UNIFORM, "", "", {"load_bits": 128, "store_bits": 128}),
        ("	st.global.b32 	[%rd2+4], %r10;\n", "", "", {"store_bits": 80}),
        ("", "HGMMA.64x256x16.F32 R24 ; HGMMA.64x16x16.F32 R2", "", {"mma": "HGMMA.64x16x16 HGMMA.64x256x16"}),
        ("", "@P0 UTCHMMA gdesc[UR4] ; HMMA.16816.F32.BF16 R4, R8", "", {"mma": "HMMA.16816 UTCHMMA"}),
        ("", 32 * "FFMA R3, R4, R5, R6 ; FFMA2 R4, R6, R8", "", {"mma": "FFMA FFMA2"}),
        ("", "FFMA R3, R4, R5, R6", "", {"mma": ""}),
        # A stack that no instruction uses is not one of spills.
        ("", "MOV R1, R2", "", {"spills": 0}),
        ("", "@P0 STL [R1+0x8], R3 ;", "", {"spills": 16}),
        ("wgmma", "", LOG, {"serialized": "C7511 X"}),
        ("wgmma", "", "Used 200 registers", {"serialized": ""}),
    ],
)
def test_what_is_read(more: str, machine: str, log: str, expected: dict[str, object], monkeypatch) -> None:
    monkeypatch.setattr(machine_code, "cuobjdump", lambda cubin: f"REG:168 STACK:16 LOCAL:0\n {machine}")
    monkeypatch.setattr(machine_code, "_run", lambda *_: SimpleNamespace(stderr=log))
    asm = {"cubin": b"", "ptx": PTX + more, "ttgir": "", "ttir": "tt.dot"}
    assert expected.items() <= machine_code.read(SimpleNamespace(asm=asm)).items()


def test_amds_assembly() -> None:
    found = machine_code.read(SimpleNamespace(asm={"amdgcn": GCN, "ttir": "tt.dot"}))
    expected = {"registers": 152, "spills": 24, "mma": "v_mfma_f32_32x32x8", "load_bits": 80, "store_bits": 16}
    assert found == expected | {"serialized": ""}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # 255 registers are given out as 256; the system takes 1 KiB from a program; halves of the tensor memory.
        (("sm_80", 255, 0, 8), 0.125), (("sm_86", 32, 49_152, 4), 0.167), (("sm_100", 32, 0, 4, 256), 0.125),
        (("sm_90", 32, 240_000, 8), 0.0), (("gfx942", 128, 0, 4), 0.5), (("gfx90a", 64, 32_768, 4), 0.25),
        (("gfx942", 32, 0, 1), 1.0),
    ],
)  # fmt: skip
def test_occupancy(given: tuple[str, int, int, int], expected: float) -> None:
    assert occupancy(*given) == expected


@pytest.mark.parametrize(
    ("column", "worse", "as_good"),
    [
        ("registers", 105, 104),
        ("spills", 4, 0),
        ("shared_bytes", 232_449, 232_448),
        ("mma", "HGMMA.64x64x16", "HGMMA.64x128x16 HGMMA.64x16x16 HGMMA.64x64x16"),
        ("serialized", "C7511 insufficient register resources", ""),
        ("load_bits", 124, 125),
        ("store_bits", 61, 128),
        ("occupancy", 0.188, 0.5),
    ],
)
def test_a_worse_row_is_found(column: str, worse: object, as_good: object) -> None:
    label, other = ("lora_shrink", "r16", "sm_90", "bf16"), ("lora_shrink", "r32", "sm_90", "bf16")
    figures = 96, 0, 65_536, "HGMMA.64x16x16 HGMMA.64x64x16", "", 128, 64, 0.25
    row = dict(zip([*report.LABEL, *report.FIGURES], [*label, *figures], strict=True))
    old, limit = pd.DataFrame([row]), {"shared_limit": 232_448}
    (line,) = report.compare(old, report.table([row | limit | {column: worse}]), [label])
    assert line.startswith(f"lora_shrink | r16 | sm_90 | bf16: {column} ")
    assert report.compare(old, report.table([row | limit | {column: as_good}]), [label]) == []
    lines = report.compare(old, report.table([]), [other])
    assert [line.split(": ")[1] for line in lines] == ["vanished", "not in the committed report"]


def test_what_the_report_promises() -> None:
    rows = report.read_report()
    assert [*rows] == report.COLUMNS and not rows[report.LABEL].duplicated().any()
    lora, nvidia, hopper = rows.kernel.str.startswith("lora"), rows.arch.str.startswith("sm_"), rows.arch == "sm_90"
    low, small = rows.dtype.str.startswith(("bf16", "fp16")), rows.variant.str.startswith("small")
    assert {*rows.arch} == {*report.ARCHS}
    assert (rows.shared_bytes <= [DEVICES[arch].shared_limit for arch in rows.arch]).all()
    assert (rows.occupancy > 0).all()
    # Without matrix instructions, a kernel is one that the compiler gave up on without a word, as it does when accumulators
    # outgrow Blackwell's tensor memory. Exact products of float32 have none on NVIDIA's GPUs.
    assert rows.mma[lora].str.contains("MMA|mfma|FFMA").all() and (rows.serialized == "").all()
    assert not rows.mma[lora & (low | ~nvidia)].str.contains(r"\bFFMA").any()
    assert rows.mma[lora & low & hopper & ~small].str.contains("HGMMA").all()
    # A few bytes around the epilogue are harmless; a spill inside the main loop is hundreds. AMD's scratch has scalar registers,
    # too, of which a chained launch has many.
    allowed = pd.Series(64, rows.index).mask(~nvidia & rows.variant.str.contains("chained"), 96).mask(hopper, 0)
    assert (rows.spills <= allowed).all(), rows[rows.spills > allowed]
    # Values of NF4 are looked up one by one. A kernel with TMA has few accesses for a tile, and as many as others for a bias.
    least = rows.kernel.map({"lora_linear_quantized": 40, "lora_linear_tma": 48}).fillna(90)
    # A mask's words have 32 bits, and are half of the loads beside a product that another launch computed, or beside dS. S stores
    # bytes of it.
    least = least.mask(rows.variant.str.match("dx r(?:16|32) (?:alone|fused) masked"), least.clip(upper=56))
    stored = pd.Series(96, rows.index).mask((rows.kernel == "lora_shrink") & rows.variant.str.endswith("dropout"), 80)
    assert (rows.load_bits >= least)[lora & nvidia].all() and (rows.store_bits >= stored)[lora & nvidia].all()


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


# A chained forward has a ticket, partial sums, flags and the chain's reset.
COMPILED_FOR_AMD = """
import sys, torch
from benchmarks.lab.compile_report.machine_code import compile_launch
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.explanation import linear_launches
for arch in ("gfx90a", "gfx942"):
    forward, _ = linear_launches(DEVICES[arch], 2048, 4096, 4096, 16, (torch.bfloat16, torch.float32), 0.0)
    assert "chained" in forward[-1].variant
    open(f"{sys.argv[1]}/{arch}", "w").write(compile_launch(forward[-1], arch).asm["amdgcn"])
"""
# What Triton 3.6 to 3.8 make of a loop around a volatile load.
ENDLESS = ".L:\n\ts_mov_b64 vcc, vcc\n\ts_cbranch_vccz .L\n"
STORE = "\tglobal_store_dword v1, v2, s[4:5]\n"
INVALIDATE = r"\tbuffer_(?:inv sc1|wbinvl1_vol)\n"
DONE = r"\ts_waitcnt vmcnt\(0\)[^\n]*\n"
LOOK = r"global_atomic_\w+ (v\d+), .* offset:16 (?:sc0|glc)"


@pytest.fixture(scope="module")
def compiled_for_amd(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("amd")
    done = python(COMPILED_FOR_AMD.replace("sys.argv[1]", repr(str(directory))))
    assert done.returncode == 0, done.stderr[-8000:]
    return directory


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
@pytest.mark.parametrize(
    ("find", "there", "instead"),
    [
        pytest.param("early_counts", rf"#ASMSTART\n{DONE}", "#ASMSTART\n", id="the program does not wait for its stores"),
        pytest.param("late_releases", rf"(\tbuffer_wbl2 sc1\n){DONE}", r"\1", id="a release does not wait"),
        pytest.param("late_releases", rf"{DONE}(?=\tglobal_atomic_add)", STORE, id="a release does not wait for a store"),
        pytest.param("late_releases", r"\tbuffer_wbl2 sc1\n", "", id="a release does not write back"),
        pytest.param("late_releases", r"buffer_wbl2 sc1", "buffer_wbl2 sc0", id="a release writes back for fewer"),
        pytest.param("late_releases", rf"(\tbuffer_wbl2 sc1\n)({DONE})", r"\2\1", id="a release writes back too late"),
        pytest.param("early_acquires", INVALIDATE, "", id="an acquire does not invalidate"),
        pytest.param("early_acquires", r"buffer_inv sc1", "buffer_inv sc0", id="an acquire invalidates for fewer"),
        pytest.param("early_acquires", f"({DONE})({INVALIDATE})", r"\2\1", id="an acquire invalidates too early"),
        pytest.param("early_acquires", f"({DONE})({INVALIDATE})", r"\2", id="an acquire does not wait"),
        pytest.param("early_acquires", f"({INVALIDATE})", r"\tbuffer_load_dword v1, v2, s[4:7], 0\n\1", id="a load is early"),
        pytest.param("early_acquires", f"({INVALIDATE})", r"\1\tbuffer_load_dword v1, v2, s[4:7], 0\n", id="a load is unordered"),
        pytest.param("cached_polls", LOOK, r"global_load_dword \1, v2, s[4:5] offset:16", id="a flag is read from a cache"),
        pytest.param("endless_loops", rf"(?=\t{LOOK})", ENDLESS, id="a flag is read once"),
    ],
)  # fmt: skip
def test_faults_planted_in_amds_code_are_found(
    arch: str, find: str, there: str, instead: str, compiled_for_amd: Path
) -> None:
    text = (compiled_for_amd / arch).read_text()
    assert [*hazards_amd.faults(text)] == []
    places = len(re.findall(there, text))
    # gfx90a has one L2 cache, and so nothing to write back.
    assert places > 0 or (arch == "gfx90a" and "sc1" in there)
    for place in range(places):
        planted = _replaced(text, there, instead, place)
        assert [*getattr(hazards_amd, find)(planted)], f"not found at match {place}"


def _replaced(text: str, there: str, instead: str, place: int) -> str:
    """``text`` with ``instead`` at the ``place``-th match alone."""
    match = [*re.finditer(there, text)][place]
    return text[: match.start()] + match.expand(instead) + text[match.end() :]


# Of all rows one in 40: changed code is compiled and compared, other code is as recorded. Then no digest is computed again. Last,
# what a digest tells apart: a constant that the variant's code does not depend on changes its source alone.
KEPT = """
from benchmarks.lab.compile_report import machine_code, report
labels, old = [label for arch in report.ARCHS for label in report.jobs(arch)], report.read_report()
codes, recorded = report.codes_of(labels[::40]), report.recorded(old)
rows = [report.make_row(label) for label, code in codes.items() if code != recorded.get(label)]
problems = [row for row in rows if isinstance(row, str)] or report.compare(old, report.table(rows), labels)
assert not problems, problems
digests, machine_code.code_digest = (machine_code.source_digest, machine_code.code_digest), None
assert report.codes_of(labels[::40]) == codes
launch = next(each for label, each in report.jobs("sm_90").items() if " ".join(label).startswith("lora_linear y r16 alone"))
constants, options = launch.constants, launch.options
# The branch alone has no product.
changes = {"PRECISION": "tf32"}, {"BLOCK_N": 16}
tiles = [constants | {"TILE": constants["TILE"]._replace(**change)} for change in changes]
unused, wider = (launch._replace(constants=each) for each in tiles)
others = wider, launch._replace(options=options | {"num_warps": 16})
for digest, different in zip(digests, (5, 4), strict=True):
    found = [*(digest(each, "sm_90") for each in (launch, launch, unused, *others)), digest(launch, "sm_80")]
    assert found[0] == found[1] and len(set(found)) == different, (digest, found)
"""
ALL = "from benchmarks.lab.compile_report.report import main; raise SystemExit(main(['--check', '--arch', '{}']))"


@of_this_triton
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(KEPT, id="sample"),
        *(pytest.param(ALL.format(arch), id=arch, marks=pytest.mark.nightly) for arch in report.ARCHS),
    ],
)
def test_todays_kernels_keep_the_report(code: str, tmp_path: Path) -> None:
    done = python(code, STABLELORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-8000:]
