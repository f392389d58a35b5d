"""Reading machine code, on small texts; what the committed report promises, and what kernels keep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import triton

from benchmarks.lab.compile_report import machine_code, report
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES
from tests.helpers.processes import python

of_this_triton = pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."),
    reason=f"runs under Triton {report.TRITON}, whose code is reported",
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
        (
            "",
            "",
            "",
            {"registers": 168, "mma": "", "serialized": "", "load_bits": 128, "store_bits": 128},
        ),
        (NARROW, "", "", {"load_bits": 72, "store_bits": 128}),
        (TILE + NARROW, "", "", {"load_bits": 91}),
        (UNIFORM, "", "", {"load_bits": 128, "store_bits": 128}),
        ("	st.global.b32 	[%rd2+4], %r10;\n", "", "", {"store_bits": 80}),
        (
            "",
            "HGMMA.64x256x16.F32 R24 ; HGMMA.64x16x16.F32 R2",
            "",
            {"mma": "HGMMA.64x16x16 HGMMA.64x256x16"},
        ),
        (
            "",
            "@P0 UTCHMMA gdesc[UR4] ; HMMA.16816.F32.BF16 R4, R8",
            "",
            {"mma": "HMMA.16816 UTCHMMA"},
        ),
        ("", 32 * "FFMA R3, R4, R5, R6 ; FFMA2 R4, R6, R8", "", {"mma": "FFMA FFMA2"}),
        ("", "FFMA R3, R4, R5, R6", "", {"mma": ""}),
        # A stack that no instruction uses is not one of spills.
        ("", "MOV R1, R2", "", {"spills": 0}),
        ("", "@P0 STL [R1+0x8], R3 ;", "", {"spills": 16}),
        ("wgmma", "", LOG, {"serialized": "C7511 X"}),
        ("wgmma", "", "Used 200 registers", {"serialized": ""}),
    ],
)
def test_what_is_read(
    more: str, machine: str, log: str, expected: dict[str, object], monkeypatch
) -> None:
    monkeypatch.setattr(
        machine_code, "cuobjdump", lambda cubin: f"REG:168 STACK:16 LOCAL:0\n {machine}"
    )
    monkeypatch.setattr(machine_code, "_run", lambda *_: SimpleNamespace(stderr=log))
    asm = {"cubin": b"", "ptx": PTX + more, "ttgir": "", "ttir": "tt.dot"}
    assert expected.items() <= machine_code.read(SimpleNamespace(asm=asm)).items()


def test_amds_assembly() -> None:
    found = machine_code.read(SimpleNamespace(asm={"amdgcn": GCN, "ttir": "tt.dot"}))
    expected = {
        "registers": 152,
        "spills": 24,
        "mma": "v_mfma_f32_32x32x8",
        "load_bits": 80,
        "store_bits": 16,
    }
    assert found == expected | {"serialized": ""}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # 255 registers are given out as 256; the system takes 1 KiB from a program; halves of the
        # tensor memory.
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
    label, other = ("lora_down", "r16", "sm_90", "bf16"), ("lora_down", "r32", "sm_90", "bf16")
    figures = 96, 0, 65_536, "HGMMA.64x16x16 HGMMA.64x64x16", "", 128, 64, 0.25
    row = dict(zip([*report.LABEL, *report.FIGURES], [*label, *figures], strict=True))
    old, limit = pd.DataFrame([row]), {"shared_limit": 232_448}
    (line,) = report.compare(old, report.table([row | limit | {column: worse}]), [label])
    assert line.startswith(f"lora_down | r16 | sm_90 | bf16: {column} ")
    assert report.compare(old, report.table([row | limit | {column: as_good}]), [label]) == []
    lines = report.compare(old, report.table([]), [other])
    assert [line.split(": ")[1] for line in lines] == ["vanished", "not in the committed report"]


def test_what_the_report_promises() -> None:
    rows = report.read_report()
    assert [*rows] == report.COLUMNS and not rows[report.LABEL].duplicated().any()
    lora = rows.kernel.str.startswith("lora")
    nvidia = rows.arch.str.startswith("sm_")
    hopper = rows.arch == "sm_90"
    low, small = rows.dtype.str.startswith(("bf16", "fp16")), rows.variant.str.startswith("small")
    assert {*rows.arch} == {*report.ARCHS}
    assert (rows.shared_bytes <= [DEVICES[arch].shared_limit for arch in rows.arch]).all()
    assert (rows.occupancy > 0).all()
    # Without matrix instructions, a kernel is one that the compiler gave up on without a word, as
    # it does when accumulators outgrow Blackwell's tensor memory. Exact products of float32 have
    # none on NVIDIA's GPUs.
    assert rows.mma[lora].str.contains("MMA|mfma|FFMA").all() and (rows.serialized == "").all()
    assert not rows.mma[lora & (low | ~nvidia)].str.contains(r"\bFFMA").any()
    assert rows.mma[lora & low & hopper & ~small].str.contains("HGMMA").all()
    # A few bytes around the epilogue are harmless; a spill inside the main loop is hundreds. AMD's
    # scratch has scalar registers, too, of which a chained launch has many.
    allowed = (
        pd.Series(64, rows.index)
        .mask(~nvidia & rows.variant.str.contains("chained"), 96)
        .mask(hopper, 0)
    )
    assert (rows.spills <= allowed).all(), rows[rows.spills > allowed]
    # Values of NF4 are looked up one by one. A kernel with TMA has few accesses for a tile, and as
    # many as others for a bias.
    least = rows.kernel.map({"lora_linear_quantized": 40, "lora_linear_tma": 48}).fillna(90)
    # A mask's words have 32 bits, and are half of the loads beside a product that another launch
    # computed, or beside dS. S stores bytes of it.
    least = least.mask(
        rows.variant.str.match("dx r(?:16|32) (?:alone|fused) masked"), least.clip(upper=56)
    )
    # A branch without a product has as few, of which a bias's are narrow.
    least = least.mask(rows.variant.str.contains(" alone .* bias"), least.clip(upper=64))
    stored = pd.Series(96, rows.index).mask(
        (rows.kernel == "lora_down") & rows.variant.str.endswith("dropout"), 80
    )
    assert (rows.load_bits >= least)[lora & nvidia].all() and (rows.store_bits >= stored)[
        lora & nvidia
    ].all()


# Of all rows one in 40: changed code is compiled and compared, other code is as recorded. Then no
# digest is computed again. Last, what a digest tells apart: a constant that the variant's code does
# not depend on changes its source alone.
KEPT = """
from benchmarks.lab.compile_report import machine_code, report
labels, old = [label for arch in report.ARCHS for label in report.jobs(arch)], report.read_report()
codes, recorded = report.codes_of(labels[::40]), report.recorded(old)
rows = [report.make_row(label) for label, code in codes.items() if code != recorded.get(label)]
problems = [row for row in rows if isinstance(row, str)] or report.compare(old, report.table(rows), labels)
assert not problems, problems
digests, machine_code.code_digest = (machine_code.source_digest, machine_code.code_digest), None
assert report.codes_of(labels[::40]) == codes
launch = next(each for label, each in report.jobs("sm_90").items() if " ".join(label).startswith("lora_linear y r64 alone"))
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
        *(
            pytest.param(ALL.format(arch), id=arch, marks=pytest.mark.nightly)
            for arch in report.ARCHS
        ),
    ],
)
def test_todays_kernels_keep_the_report(code: str, tmp_path: Path) -> None:
    done = python(code, STABLELORA_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-8000:]
