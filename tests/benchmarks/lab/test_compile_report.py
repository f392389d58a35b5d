"""Reading machine code, on small texts; what the committed report promises."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.common.tables import csv_text, write_text
from benchmarks.lab.compile_report import __main__

pytest.importorskip("triton", reason="Triton is not installed on this platform")


from benchmarks.lab.compile_report import report
from benchmarks.lab.compile_report.assembly import GCN_THREAD, PTX_THREAD, parse_gcn, parse_ptx
from benchmarks.lab.compile_report.machine_code import (
    early_counts,
    gcn_resources,
    hot_bits,
    loops,
    products,
    sass_resources,
    serialization,
    serialized,
    varying,
)
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES

# %rd2 differs between threads, %rd1 does not. {inside} is in the loop of the products.
PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.global.b64 	%rd9, [%rd1];
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 16, %rd1;
{before}
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%r20,%r21}}, %rd5, %rd6, %p1, 1, 1, 0, 0;
	// end inline asm
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
{inside}
	setp.lt.s32 	%p2, %r7, 64;
	@%p2 bra 	$L__BB0_1;
	@%p3 st.global.v4.b32 [ %rd2 + 0 ], {{ %r10, %r11, %r12, %r13 }};
	st.global.b32 	[%rd1], %r10;
	ret;
"""
NARROW = "	ld.global.b16 	%rs1, [%rd2+8];"
WIDE = "	@%p4 ld.global.v4.b32 	{%r30, %r31, %r32, %r33}, [%rd2+64];"
TMA = "	@%p5 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r8], [%rd7, {%r3, %r4}], [%r9];"
SASS = """
 Function _kernel:
  REG:168 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
        /*27e0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20], R24 ;
        /*2990*/                   HGMMA.64x16x16.F32.BF16 R152, gdesc[UR20], R152, gsb0 ;
        /*29f0*/                   FFMA R3, R4, R5, R6 ;
"""
GCN = """
_kernel:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 4, v0
	v_mov_b32_e32 v0, 0
	global_load_dword v2, v0, s[6:7]
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]
	s_cbranch_scc1 .LBB0_1
	buffer_store_dwordx2 v[16:17], v1, s[8:11], 0 offen
	global_store_short v0, v2, s[6:7]
	s_endpgm
    .private_segment_fixed_size: 24
    .vgpr_count:     152
"""


def ptx_bits(before: str = "", inside: str = "") -> tuple[int, int]:
    code = parse_ptx(PTX.format(before=before, inside=inside))
    return hot_bits(code, PTX_THREAD, products("HGMMA.64x64x16.F32.BF16", code)[1])


def test_the_narrowest_hot_access() -> None:
    assert ptx_bits() == (128, 128)
    assert ptx_bits(inside=NARROW) == (16, 128)
    # Before the loop, or the same address for all threads, or a small share of the bytes.
    assert ptx_bits(before=NARROW) == (128, 128)
    assert ptx_bits(inside="	ld.global.b16 	%rs1, [%rd1];") == (128, 128)
    assert ptx_bits(inside="\n".join([*[WIDE] * 3, NARROW])) == (128, 128)
    assert ptx_bits(inside=TMA) == (128, 128)
    # A predicated write leaves what was there; a certain one does not.
    assert ptx_bits(before="	@%p1 mov.b64 	%rd2, %rd1;", inside=NARROW) == (16, 128)
    assert ptx_bits(before="	mov.b64 	%rd2, %rd1;", inside=NARROW) == (0, 0)


def test_loops_that_move_little_are_not_hot() -> None:
    small = f"$L__BB0_0:\n	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r40}};\n{NARROW}\n	@%p1 bra 	$L__BB0_0;"
    assert ptx_bits(before=small) == (128, 128)
    assert ptx_bits(before=small.replace(NARROW, "\n".join([NARROW] * 8))) == (16, 128)


def test_hot_accesses_without_products() -> None:
    tile = f"	mov.u32 	%r1, %tid.x;\n	add.s64 	%rd2, %rd1, %r1;\n{WIDE}\n"
    loop = f"$L__BB0_1:\n{NARROW}\n	@%p1 bra 	$L__BB0_1;\n"
    assert hot_bits(parse_ptx(tile + loop), PTX_THREAD, []) == (128, 0)
    assert hot_bits(parse_ptx(tile.replace(WIDE, "") + loop), PTX_THREAD, []) == (16, 0)


def test_loops_of_nested_and_waiting_code() -> None:
    code = parse_ptx("""
	mov.b32 	%r1, 0;
$L__BB0_1:
	add.s32 	%r1, %r1, 1;
$L__BB0_2:
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r20}, %rd5, %rd6;
	@%p1 bra 	$L__BB0_2;
	@%p2 bra 	$L__BB0_1;
	@!%p3 bra 	$L__BB0_4;
	ret;
$L__BB0_4:
	@!%p3 bra 	$L__BB0_4;
	ret;
""")
    assert sorted(sorted(loop.body) for loop in loops(code)) == [[1, 2, 3, 4], [2, 3], [7]]
    assert [sorted(loop.body) for loop in products("HGMMA.64x64x16", code)[1]] == [[2, 3]]


def test_products_by_their_names() -> None:
    code = parse_ptx(PTX.format(before="", inside="	fma.rn.f32 	%r50, %r51, %r52, %r50;"))
    assert products(SASS, code)[0] == "HGMMA.64x16x16 HGMMA.64x256x16"
    assert products("HMMA.16816.F32.BF16 R4, R8", code)[0] == "HMMA.16816"
    assert products("@P0 UTCHMMA gdesc[UR4], gdesc[UR6]", code)[0] == "UTCHMMA"
    assert products("FFMA R3, R4, R5, R6 ; FFMA2 R4, R6, R8", code)[0] == "FFMA FFMA2"
    # FFMA outside loops is no product: such a kernel is an empty one.
    assert products("FFMA R3, R4, R5, R6", parse_ptx("	fma.rn.f32 	%r50, %r51, %r52, %r50;\n	ret;")) == (
        "",
        [],
    )


def test_amds_assembly() -> None:
    code = parse_gcn(GCN)
    name, inner = products(GCN, code)
    assert name == "v_mfma_f32_32x32x8"
    assert hot_bits(code, GCN_THREAD, inner) == (128, 64)
    # v0 was overwritten before it was an address.
    assert [code[i].op for i, varies in enumerate(varying(code, GCN_THREAD)) if varies] == [
        "buffer_load_dwordx4",
        "buffer_store_dwordx2",
    ]
    to_shared = GCN.replace(
        "buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen", "buffer_load_dword v1, s[4:7], 0 offen lds"
    )
    assert hot_bits(parse_gcn(to_shared), GCN_THREAD, inner) == (32, 64)


def test_why_ptxas_serializes() -> None:
    log = """
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register \
resources for the wgmma pipeline in the function '_kernel'
ptxas info    : Used 200 registers, used 1 barriers
""".replace("\\\n", "")
    assert serialization(log) == "C7511 insufficient register resources for the wgmma pipeline"
    assert serialization("ptxas info    : Used 200 registers") == ""
    assert serialized("no matrix instruction") == ""


PUBLISHED = """
    buffer_store_dwordx4 v[6:9], v10, s[52:55], 0 offen
    WAIT
    s_barrier
    s_barrier
    s_and_saveexec_b64 s[16:17], s[0:1]
    s_cbranch_execz .LBB0_24
    buffer_wbl2 sc1
    s_waitcnt vmcnt(0)
    global_atomic_add v11, v11, v13, s[14:15] sc0
"""


def test_stores_are_waited_for_before_they_are_published() -> None:
    assert early_counts(PUBLISHED.replace("WAIT", "s_waitcnt vmcnt(0)")) == 0
    assert early_counts(PUBLISHED.replace("WAIT", "s_waitcnt vmcnt(0) lgkmcnt(0)")) == 0
    assert early_counts(PUBLISHED.replace("WAIT", "s_waitcnt lgkmcnt(0)")) == 1
    assert early_counts(2 * PUBLISHED.replace("WAIT", "")) == 2


def test_resources() -> None:
    # A stack that no instruction uses is not one of spills.
    assert sass_resources(SASS) == {"registers": 168, "spills": 0}
    assert sass_resources(SASS + "        /*2a00*/    @P0 STL [R1+0x8], R3 ;") == {"registers": 168, "spills": 16}
    assert gcn_resources(GCN) == {"registers": 152, "spills": 24}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "expected"),
    [
        ("sm_80", 32, 0, 8, 0, 1.0),
        # 255 registers are given out as 256: two warps fit into each part, so one program of eight.
        ("sm_80", 255, 0, 8, 0, 0.125),
        ("sm_90", 168, 65_536, 4, 0, 0.188),
        ("sm_90", 32, 0, 1, 0, 0.5),
        # Two programs of 48 KiB and the system's 1 KiB each.
        ("sm_86", 32, 49_152, 4, 0, 0.167),
        ("sm_90", 32, 232_448, 8, 0, 0.125),
        ("sm_90", 32, 240_000, 8, 0, 0.0),
        # Half of the tensor memory each.
        ("sm_100", 32, 0, 4, 256, 0.125),
        ("gfx942", 128, 0, 4, 0, 0.5),
        ("gfx942", 64, 0, 4, 0, 1.0),
        ("gfx90a", 64, 32_768, 4, 0, 0.25),
        ("gfx942", 32, 0, 1, 0, 1.0),
    ],
)  # fmt: skip
def test_occupancy(arch: str, registers: int, shared: int, warps: int, columns: int, expected: float) -> None:
    assert occupancy(arch, registers, shared, warps, columns) == expected


def row(**changes: object) -> report.Row:
    start = {
        "kernel": "lora_shrink", "variant": "r16", "arch": "sm_90", "dtype": "bf16", "registers": 96, "spills": 0,
        "shared_bytes": 65_536, "shared_limit": 232_448, "mma": "HGMMA.64x16x16 HGMMA.64x64x16", "serialized": "",
        "load_bits": 128, "store_bits": 64, "occupancy": 0.25,
    }  # fmt: skip
    assert changes.keys() <= start.keys()
    return start | changes


def compare(old: report.Row, new: report.Row) -> list[str]:
    return report.compare([old], [new], [report.label_of(new)])


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 105},
        {"spills": 4},
        {"shared_bytes": 232_449},
        {"mma": "HGMMA.64x64x16"},
        {"mma": ""},
        {"serialized": "C7511 insufficient register resources"},
        {"load_bits": 64},
        {"store_bits": 32},
        {"occupancy": 0.188},
    ],
)
def test_a_worse_row_is_found(change: dict[str, object]) -> None:
    (line,) = compare(row(), row(**change))
    assert line.startswith("lora_shrink | r16 | sm_90 | bf16: ") and next(iter(change)) in line


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 104},
        {"registers": 40, "occupancy": 0.5},
        {"shared_bytes": 232_448},
        {"mma": "HGMMA.64x128x16 HGMMA.64x16x16 HGMMA.64x64x16"},
        {"store_bits": 128},
    ],
)
def test_a_row_that_is_not_worse_is_not_found(change: dict[str, object]) -> None:
    assert compare(row(), row(**change)) == []


def test_rows_that_vanish_and_appear_are_found() -> None:
    assert report.compare([row()], [], []) == ["lora_shrink | r16 | sm_90 | bf16: vanished"]
    labels = [report.label_of(row()), report.label_of(row(variant="r32"))]
    assert report.compare([row()], [], labels) == ["lora_shrink | r32 | sm_90 | bf16: not in the committed report"]


def test_a_csv_gives_the_rows_back(tmp_path: Path) -> None:
    rows = [row(), row(variant='r32, "odd"', mma="")]
    write_text(tmp_path / "report.csv", csv_text(rows, report.KEYS))
    assert report.read_csv(tmp_path / "report.csv") == rows


def test_kernels_names() -> None:
    def name(function: str) -> str:
        return report.kernel_name(SimpleNamespace(kernel=SimpleNamespace(__name__=function)))

    assert name("_lora_linear_tma_kernel") == "lora_linear_tma"
    assert name("_stable_adamw_kernel") == "stable_adamw"
    assert name("_square_sums_kernel") == "stable_adamw_square_sums"


@pytest.mark.parametrize(
    ("interpret", "arguments", "message"),
    [
        ("1", [], "TRITON_INTERPRET is set"),
        ("0", ["--write", "--kernel", "lora_shrink"], "takes no --kernel"),
        ("", ["--arch", "sm_70"], "invalid choice"),
    ],
)
def test_what_the_command_line_refuses(interpret, arguments, message, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(SystemExit) as exit_:
        __main__.parse(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# The committed report.


@pytest.fixture(scope="module")
def rows() -> list[report.Row]:
    return report.read_csv(report.REPORT)


def broken(rows: list[report.Row], rule: Callable[[report.Row], bool]) -> list[report.Row]:
    return [row for row in rows if not rule(row)]


def is_nvidia(row: report.Row) -> bool:
    return row["arch"].startswith("sm_")


def is_low(row: report.Row) -> bool:
    return row["dtype"].startswith(("bf16", "fp16"))


def test_the_report_is_whole(rows: list[report.Row]) -> None:
    assert report.KEYS == (
        "kernel", "variant", "arch", "dtype", "registers", "spills", "shared_bytes", "shared_limit", "mma", "serialized",
        "load_bits", "store_bits", "occupancy",
    )  # fmt: skip
    assert report.REPORT.read_text(encoding="utf-8").splitlines()[0] == ",".join(report.KEYS)
    assert len({report.label_of(row) for row in rows}) == len(rows)
    lora = {f"lora_{name}" for name in ("linear_split_k", "shrink", "weight_grads", "linear_quantized")}
    for arch in DEVICES:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert lora | {"dequantize", "stable_adamw"} <= kernels, arch
    assert not broken(rows, lambda row: row["shared_bytes"] <= row["shared_limit"] == DEVICES[row["arch"]].shared_limit)
    assert not broken(rows, lambda row: row["occupancy"] > 0)


def test_the_report_has_matrix_instructions(rows: list[report.Row]) -> None:
    # Without any, a kernel is one that the compiler gave up on without a word, as it does when accumulators outgrow
    # Blackwell's tensor memory. Exact products of float32 have no matrix instruction on NVIDIA's GPUs.
    lora = [row for row in rows if row["kernel"].startswith("lora")]
    assert not broken(lora, lambda row: re.search("MMA|mfma|FFMA", row["mma"]) is not None)
    low = [row for row in lora if is_low(row) or not is_nvidia(row)]
    assert not broken(low, lambda row: re.search(r"\bFFMA", row["mma"]) is None)
    hopper = [row for row in lora if is_low(row) and row["arch"] == "sm_90" and not row["variant"].startswith("small")]
    assert hopper
    assert not broken(hopper, lambda row: "HGMMA" in row["mma"])


def test_the_report_has_no_spills_that_matter(rows: list[report.Row]) -> None:
    # A few bytes around the epilogue are harmless; a spill inside the main loop is hundreds.
    def allowed(row: report.Row) -> int:
        if row["arch"] != "sm_90":
            # AMD's scratch has scalar registers, too, of which a chained launch has many.
            return 64 if is_nvidia(row) or "chained" not in row["variant"] else 96
        # dX with a mask in the widest tile: two to four of its loop's invariants are stored once, and loaded once a tile of Y.
        return 16 if re.match(r"dx r(16|32) .*masked .*128x256x64", row["variant"]) else 0

    assert not broken(rows, lambda row: row["spills"] <= allowed(row))


def test_no_matrix_instruction_of_the_report_is_serialized(rows: list[report.Row]) -> None:
    assert not broken(rows, lambda row: not row["serialized"])


def test_the_report_has_wide_loads(rows: list[report.Row]) -> None:
    lora = [row for row in rows if row["kernel"].startswith("lora")]
    # Of the kernel with pointers, whose programs have twice as many threads, A's tile for 16 ranks is 64 bits a thread.
    # Values of NF4 are looked up one by one; how the weight itself is loaded is below.
    # So are A's and dS's of a group, where masks leave room for a small tile only.
    least = {"lora_linear": 64, "lora_linear_quantized": 32, "lora_shrink_group": 64, "lora_weight_grads_group": 64}
    nvidia = [row for row in lora if is_nvidia(row)]
    # A chained launch has as many threads for S's tiles, and the kernel for few rows in its widest tile: 64 bits there, too.
    thin = [row for row in nvidia if re.search(r"\br16 (chained|fused 128x128)", row["variant"])]
    assert not broken(thin, lambda row: row["load_bits"] >= 64)
    # Without a product, dA's loop is all there is. Its step under a mask has 32 rows: dS's tile for 16 ranks is 32 bits a thread.
    scant = [row for row in nvidia if "r16 alone masked dA" in row["variant"]]
    assert not broken(scant, lambda row: row["load_bits"] >= 32)
    nvidia = [row for row in nvidia if row not in (*thin, *scant)]
    assert not broken(nvidia, lambda row: row["load_bits"] >= least.get(row["kernel"], 128))
    # On AMD's GPUs some threads load the same block's nested scale, a byte, for each of its elements.
    assert not broken(lora, lambda row: row["load_bits"] >= (8 if " nf4 " in row["variant"] else 32))
    adamw = [row for row in rows if row["kernel"].startswith("stable_adamw") and not row["variant"].startswith("un")]
    assert not broken(adamw, lambda row: row["load_bits"] == 128 and row["store_bits"] in (0, 128))
