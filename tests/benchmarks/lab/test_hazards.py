"""Faults in machine code, in PTX and in AMD's assembly: found in small texts and in planted ones, and in
no kernel that any Triton compiles.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")


from benchmarks.common.tritons import PINNED
from benchmarks.lab.compile_report import hazards, machine_code, programs, report
from benchmarks.lab.compile_report.hazards import (
    early_counts,
    early_uses,
    overwritten_operands,
    reloaded_scalars,
    short_buffers,
    unfenced_copies,
    unfenced_stores,
)
from stablelora_kernels.dispatch.backend import judge
from tests.helpers.processes import python

SCALAR = """
    mov.u32 %r1, %tid.x;
    ld.global.b32 { %r2 }, [ %rd1 + 0 ];
    @%p1 st.global.b32 [ %rd1 + 0 ], { %r4 };
"""
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
# A fence that one of two paths goes around, and a wait of inline assembly.
COPIED = """
$L__BB0_1:
	.loc	1 40 32
	cp.async.wait_group 	6;
	@%p2 bra 	$L__BB0_2;
	// begin inline asm
	fence.proxy.async.shared::cta;
$L__BB0_2:
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r9], %r8;
	@!complete bra.uni waitLoop;
	}
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, %p1, 1, 1, 0, 1;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd5 + 0 ], 0x10;
	@%p3 bra 	$L__BB0_1;
	ret;
"""
TENSOR_MEMORY = COPIED.replace(
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", "tcgen05.mma.cta_group::1.kind::f16"
)
# A store at the end of a round, and a fence at the start of the next one, on one of two paths.
STORED = """
    %v = ttg.local_alloc : () -> !ttg.memdesc<2x64x16xbf16, #shared, #smem, mutable> loc(#loc1)
    %u = ttg.local_alloc : () -> !ttg.memdesc<2x64x16xbf16, #shared, #smem, mutable> loc(#loc1)
    cf.cond_br %p, ^bb2, ^bb1 loc(#loc1)
  ^bb1:  // pred: ^bb0
    %r:2 = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %cst) -> (tensor<64x16xf32>)  : i32 {
      scf.if %p {
        ttng.fence_async_shared {bCluster = false} loc(#loc1)
      } else {
        %t = tt.load %ptr loc(#loc1)
      } loc(#loc1)
      %b = ttg.memdesc_index %v[%i] : !ttg.memdesc<2x64x16xbf16, #shared> -> !ttg.memdesc<64x16xbf16, #shared> loc("b"(#loc1))
      %d = ttng.warp_group_dot %a, %b, %acc {isAsync = true} : tensor<64x64xbf16> * !ttg.memdesc<64x16xbf16, #shared> loc(#loc1)
      ttg.local_store %x, %v : tensor<64x16xbf16> -> !ttg.memdesc<64x16xbf16, #shared> loc(#loc1)
      scf.yield %d : tensor<64x16xf32> loc(#loc1)
    } loc(#loc1)
    cf.br ^bb2 loc(#loc1)
  ^bb2:  // 2 preds: ^bb0, ^bb1
    tt.return loc(#loc1)
"""
ALLOCATED = STORED.replace("%b = ttg.memdesc_index %v[%i]", "%b = ttg.local_alloc %x").replace(
    "local_store %x, %v", "local_store %x, %u"
)


def found(find, text: str) -> list[str]:
    """The faults of one hazard of the table in code of the kind that it reads."""
    (kind,) = (kind for kind, finds in hazards.HAZARDS.items() if find in finds)
    return [*find(getattr(programs, kind)(text))]


def sass(
    code: str, scoreboards: dict[int, int] | None = None, waits: dict[int, int] | None = None
) -> str:
    """Instructions as cuobjdump prints them, one for each line and 0x10 apart.

    By address: ``scoreboards`` that instructions keep busy until their results are written, and
    those that instructions wait for.
    """
    lines = []
    for place, instruction in enumerate(code.strip().splitlines()):
        address = 16 * place
        upper_word = (scoreboards or {}).get(address, 7) << 46
        if waits and address in waits:
            upper_word |= 1 << 52 + waits[address]
        lines.append(
            f"  /*{address:04x}*/  {instruction.strip()} ;  /* {0:#018x} */\n  /* {upper_word:#018x} */"
        )
    return "\n".join(lines)


# From dX chained, masked, dA, whose loop has 400 instructions more.
IN_FLIGHT = """
    LDSM.16.MT88.4 R32, [R60+0xe000]
    LDSM.16.MT88.4 R36, [R60+0xf000]
    WARPGROUP.ARRIVE
    HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR20].tnspB, R24{}
    HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR24].tnspB, R24, gsb0
    {}
    BSSY B0, 0xa0
    @P1 BRA 0x90
    STG.E.128 desc[UR4][R36.64], R32
    BSYNC B0
    @!P0 BRA 0x0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    IMAD.MOV.U32 R36, RZ, RZ, R24
    EXIT
"""


# From Y of sm_100: one load of two parts, of which the second keeps a scoreboard busy.
LOADED = """
    LDTM.16dp32bit_t0_t15.x8 R4, tmem[UR9]
    LDTM.16dp32bit_t16_t31.x8 R4, tmem[UR9+0x8]
    @P1 BRA 0x50
    IMAD.MOV.U32 R20, RZ, RZ, R21
    FADD R20, R20, R5
    STS.128 [R30], R8
    EXIT
"""


WAITS = "WARPGROUP.DEPBAR.LE gsb0, 0x"


@pytest.mark.parametrize(
    ("find", "text", "of_fault", "mended"),
    [
        (unfenced_copies, COPIED, "@%p2 bra 	$L__BB0_2;", ""),
        (unfenced_copies, COPIED, "cp.async.wait_group 	6;", "cp.async.commit_group;"),
        (unfenced_copies, TENSOR_MEMORY, "waitLoop;", "waitLoop; fence.proxy.async;"),
        (unfenced_stores, STORED, "scf.yield", "ttng.fence_async_shared\n      scf.yield"),
        (unfenced_stores, STORED, "local_store %x, %v", "local_store %x, %u"),
        (unfenced_stores, ALLOCATED, "%d = ttng", "ttng.fence_async_shared\n      %d = ttng"),
        (reloaded_scalars, SCALAR, "@%p1", "bar.sync 0;\n @%p1"),
        (reloaded_scalars, SCALAR.replace("ld", "again: ld"), "@%p1", "bar.sync 0;\n @%p1"),
        (reloaded_scalars, SCALAR, "ld", "add.s64 %rd1, %rd2, %r1;\n ld"),
        (short_buffers, BUFFERS, "memdesc<2x", "memdesc<3x"),
        # The second product is a group of its own, which a wait for the first leaves in flight.
        (overwritten_operands, sass(IN_FLIGHT.format(", gsb0", WAITS + "1")), WAITS + "1", WAITS + "0"),
        # Waits that do not run on every path.
        (overwritten_operands, sass(IN_FLIGHT.format("", "@P3 " + WAITS + "0")), "@P3 ", ""),
        (overwritten_operands, sass(IN_FLIGHT.format("", "@P3 BRA 0xa0")), "@P3 BRA 0xa0", WAITS + "0"),
        (early_uses, sass(LOADED, {0x10: 3}, {0x30: 3}), "STS.128 [R30], R8", "EXIT"),
        (early_uses, sass(LOADED, {0x10: 3}, {0x30: 2, 0x50: 3}), "FADD R20, R20, R5", "NOP"),
        (early_counts, PUBLISHED, "lgkmcnt(0)", "vmcnt(0) lgkmcnt(0)"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_the_mended_text_has_none(
    find, text: str, of_fault: str, mended: str
) -> None:
    assert found(find, text)
    assert found(find, text.replace(of_fault, mended, 1)) == []


@pytest.mark.parametrize(
    ("code", "text", "words"),
    [
        ("ptx", SCALAR, "a late warp may load"),
        ("ttgir", BUFFERS, "2 copies run ahead"),
        ("sass", sass(LOADED), "R5, R8 to R11 of the LDTM"),
    ],
)
def test_no_row_has_a_fault(code: str, text: str, words: str, monkeypatch) -> None:
    codes = {"ptx": "", "ttgir": "", "sass": ""} | {code: text}
    monkeypatch.setattr(
        machine_code, "cuobjdump", lambda cubin: f"REG:168 STACK:0 LOCAL:0\n{codes['sass']}"
    )
    monkeypatch.setattr(machine_code, "serialized", lambda ptx: "")
    asm = {"cubin": b"", "ptx": codes["ptx"], "ttgir": codes["ttgir"], "ttir": ""}
    with pytest.raises(machine_code.HazardError, match=words):
        machine_code.read(SimpleNamespace(asm=asm))


# A chained forward has a ticket, partial sums, flags and the chain's reset.
COMPILED_FOR_AMD = """
import sys, torch
from benchmarks.lab.compile_report.machine_code import compile_launch
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.ops.meta_calls import linear_launches
for arch in ("gfx90a", "gfx942"):
    forward, _ = linear_launches(DEVICES[arch], 2048, 4096, 4096, 16, (torch.bfloat16, torch.float32), 0.0)
    assert "chained" in forward[-1].variant
    open(f"{sys.argv[1]}/{arch}", "w").write(compile_launch(forward[-1], arch).asm["amdgcn"])
"""
# What Triton 3.6 to 3.8 make of a loop around a volatile load.
ENDLESS = ".L:\n\ts_mov_b64 vcc, vcc\n\ts_cbranch_vccz .L\n"
INVALIDATE = r"\tbuffer_(?:inv sc1|wbinvl1_vol)\n"
DONE = r"\ts_waitcnt vmcnt\(0\)[^\n]*\n"
LOOK = r"global_atomic_\w+ (v\d+), .* offset:16 (?:sc0|glc)"


@pytest.fixture(scope="module")
def compiled_for_amd(tmp_path_factory) -> dict[str, str]:
    """By architecture. The code may come from a clone that is gone: Triton's cache does not ask where
    a kernel's file is, but its text names the file.
    """
    directory = tmp_path_factory.mktemp("amd")
    done = python(COMPILED_FOR_AMD.replace("sys.argv[1]", repr(str(directory))))
    assert done.returncode == 0, done.stderr[-8000:]
    clone = re.compile(r'"[^"]*(?=/stablelora_kernels/)')
    return {file.name: clone.sub('"/gone', file.read_text()) for file in directory.iterdir()}


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
@pytest.mark.parametrize(
    ("find", "there", "instead"),
    [
        pytest.param("early_counts", rf"#ASMSTART\n{DONE}", "#ASMSTART\n", id="the program does not wait for its stores"),
        pytest.param("late_releases", rf"(\tbuffer_wbl2 sc1\n){DONE}", r"\1", id="a release does not wait"),
        pytest.param("late_releases", r"\tbuffer_wbl2 sc1\n", "", id="a release does not write back"),
        pytest.param("late_releases", r"buffer_wbl2 sc1", "buffer_wbl2 sc0", id="a release writes back for fewer"),
        pytest.param("early_acquires", INVALIDATE, "", id="an acquire does not invalidate"),
        pytest.param("early_acquires", r"buffer_inv sc1", "buffer_inv sc0", id="an acquire invalidates for fewer"),
        pytest.param("early_acquires", f"({DONE})({INVALIDATE})", r"\2\1", id="an acquire invalidates too early"),
        pytest.param("early_acquires", f"({INVALIDATE})", r"\1\tbuffer_load_dword v1, v2, s[4:7], 0\n", id="a load is unordered"),
        pytest.param("cached_polls", LOOK, r"global_load_dword \1, v2, s[4:5] offset:16", id="a flag is read from a cache"),
        pytest.param("endless_loops", rf"(?=\t{LOOK})", ENDLESS, id="a flag is read once"),
    ],
)  # fmt: skip
def test_faults_planted_in_amds_code_are_found(
    arch: str, find: str, there: str, instead: str, compiled_for_amd: dict[str, str]
) -> None:
    text = compiled_for_amd[arch]
    assert '"/gone/' in text and hazards.faults(gcn=programs.gcn(text)) == []
    places = [*re.finditer(there, text)]
    # gfx90a has one L2 cache, and so nothing to write back.
    assert places or (arch == "gfx90a" and "sc1" in there)
    for match in places:
        planted = text[: match.start()] + match.expand(instead) + text[match.end() :]
        assert found(getattr(hazards, find), planted), f"not found at {match}"


HAZARDS = """
import runpy, sys
sys.argv = ["-m", "--triton", {!r}, "--arch", {!r}]
runpy.run_module("benchmarks.lab.compile_report", run_name="__main__")
"""


@pytest.mark.nightly
@pytest.mark.parametrize("arch", report.ARCHS)
@pytest.mark.parametrize("version", PINNED)
def test_no_triton_compiles_a_hazard(version: str, arch: str) -> None:
    if arch.startswith("sm_") and (
        problem := judge((int(arch[3:-1]), int(arch[-1])), version).problem
    ):
        pytest.skip(f"runs under the Tritons by which the kernels run on this GPU: {problem}")
    done = python(HAZARDS.format(version, arch))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
