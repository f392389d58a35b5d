"""Reading machine code, on small texts; the bounds of the compile report's check, and that kernels
keep them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

import triton

from benchmarks.lab.compile_report import machine_code, report
from tests.helpers.processes import python

of_this_triton = pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."),
    reason=f"runs under Triton {report.TRITON}, whose code keeps the bounds",
)
# %rd2 differs between threads, %rd1 does not.
PTX = """
	mov.u32 	%r1, %tid.x;
	mad.wide.u32 	%rd2, %r1, 16, %rd1;
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	@%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r10, %r11, %r12, %r13 };
"""
NARROW = "	@%p4 ld.global.b16 	%rs1, [%rd2+8];\n"
GCN = """
	buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen
	v_mfma_f32_32x32x8_bf16 v[16:31], v[4:5], v[6:7], v[16:31]
	buffer_load_dword v1, s[4:7], 0 offen lds
	global_store_short v0, v2, s[6:7]
    .private_segment_fixed_size: 24
    .vgpr_count:     152
"""
# Until stores of tiles are in memory; and until their shared memory has been read.
# Until stores of tiles are in memory; and until their shared memory has been read.
WAIT = "\tcp.async.bulk.wait_group \t0;\n\tcp.async.bulk.wait_group.read \t0;\n"
LOG = "(C7511) Potential Loss: wgmma.mma_async instructions are serialized due to X in the function '_kernel'"


@pytest.mark.parametrize(
    ("more", "machine", "log", "expected"),
    [
        (NARROW, "", "", {"registers": 168, "mma": "", "load_bits": 72, "store_bits": 128}),
        ("	st.global.b32 	[%rd2+4], %r10;\n", "", "", {"store_bits": 80}),
        ("", "HGMMA.64x256x16.F32 R24 ; @P0 UTCHMMA R2", "", {"mma": "HGMMA.64x256x16 UTCHMMA"}),
        ("", 32 * "FFMA R3, R4, R5, R6 ; FFMA2 R4, R6, R8", "", {"mma": "FFMA FFMA2"}),
        # A stack that no instruction uses is not one of spills.
        ("", "MOV R1, R2", "", {"spills": 0}),
        ("", "@P0 STL [R1+0x8], R3 ;", "", {"spills": 16}),
        ("wgmma", "", LOG, {"serialized": "C7511 X"}),
        (2 * WAIT, "", "", {"store_waits": 2}),
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
    assert found == expected | {"serialized": "", "store_waits": 0}


CLEAN = {
    "registers": 96,
    "spills": 0,
    "shared_bytes": 65_536,
    "mma": "HGMMA.64x16x16 HGMMA.64x64x16",
    "serialized": "",
    "store_waits": 0,
    "load_bits": 128,
    "store_bits": 96,
}
HOPPER = "lora_linear | y r16 | sm_90 | bf16"
AMD = "lora_linear | y r16 chained | gfx942 | bf16"
ON_AMD = {"mma": "v_mfma_f32_32x32x8", "load_bits": 1, "store_bits": 1}


def label_of(words: str) -> report.Label:
    return report.Label(*words.split(" | "))


@of_this_triton
@pytest.mark.parametrize(
    ("label", "bad", "good", "fault"),
    [
        (HOPPER, {"spills": 4}, {"spills": 0}, "4 bytes of spills a thread, at most 0"),
        (AMD, ON_AMD | {"spills": 100}, ON_AMD | {"spills": 96}, "at most 96"),
        (HOPPER, {"shared_bytes": 232_449}, {"shared_bytes": 232_448}, "the GPU has 232448"),
        (HOPPER, {"serialized": "C7511 X"}, {}, "serialized: C7511 X"),
        (HOPPER, {"mma": "HMMA.16816"}, {"mma": "HGMMA.64x8x16"}, "they must be HGMMA"),
        (HOPPER.replace("y", "small y"), {"mma": ""}, {"mma": "HMMA.16816"}, "are none"),
        (AMD, ON_AMD | {"mma": "FFMA"}, ON_AMD, "MMA or mfma"),
        (HOPPER, {"store_waits": 2}, {}, "2 waits for the end of stores of tiles"),
        (HOPPER, {"load_bits": 89}, {"load_bits": 90}, "load_bits 89, at least 90"),
        (HOPPER, {"store_bits": 95}, {"store_bits": 96}, "store_bits 95, at least 96"),
    ],
)  # fmt: skip
def test_a_bound_that_is_not_kept_is_a_fault(
    label: str, bad: dict[str, object], good: dict[str, object], fault: str
) -> None:
    (line,) = report.faults_of(label_of(label), CLEAN | bad)
    assert fault in line
    assert [*report.faults_of(label_of(label), CLEAN | good)] == []


@pytest.mark.parametrize(("version", "faults"), [("3.6.0", 1), ("3.8.0", 0), ("3.9.0", 1)])
def test_waits_for_stores_are_faults_but_of_triton_3_8(
    version: str, faults: int, monkeypatch
) -> None:
    monkeypatch.setattr(report.triton, "__version__", version)
    assert len([*report.faults_of(label_of(HOPPER), CLEAN | {"store_waits": 2})]) == faults


def test_a_fault_of_one_launch_fails_the_command(monkeypatch, capsys) -> None:
    """A launch's figures are printed, if it has any, and all faults at the end. Code that does not
    compile, or may be wrong, is a fault.
    """
    errors = {
        "clean": None,
        "lost": ValueError("reason"),
        "raced": machine_code.HazardError("race"),
    }
    by_label = {label_of(f"lora_down | {word} | sm_90 | bf16"): word for word in errors}

    def compiled(word: str, arch: str) -> SimpleNamespace:
        if errors[word]:
            raise errors[word]
        return SimpleNamespace(metadata=SimpleNamespace(shared=65_536, tmem_size=768))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(report, "jobs", lambda arch: by_label)
    monkeypatch.setattr(machine_code, "compile_launch", compiled)
    monkeypatch.setattr(machine_code, "read", lambda compiled: {**CLEAN})
    assert report.main(["--arch", "sm_90"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "lora_down | clean | sm_90 | bf16: registers 96, shared_bytes 65536, "
        "mma HGMMA.64x16x16 HGMMA.64x64x16, load_bits 128, store_bits 96",
        "",
        "lora_down | clean | sm_90 | bf16: 768 columns of tensor memory, the GPU has 512",
        "lora_down | lost | sm_90 | bf16: not compiled: ValueError: reason",
        "lora_down | raced | sm_90 | bf16: race",
        f"Triton {triton.__version__}: 3 faults in 3 launches",
    ]
    assert report.main(["--arch", "sm_90", "--kernel", "lora_linear"]) == 0


# Of all launches one in 500, and those that have spilled: float32's, of 64 rows. The nightly
# test_hazards.py has them all, under every Triton.
SAMPLE = """
from benchmarks.lab.compile_report import report
few_rows = [
    label
    for label in report.labels_of(["sm_80", "sm_90"], "lora_linear_split_k")
    if label.dtype == "fp32" and label.variant.startswith("small y r16 chained 64x")
]
assert len(few_rows) == 4
raise SystemExit(report.run([*few_rows, *report.labels_of(report.ARCHS)[::500]]))
"""


@of_this_triton
def test_a_sample_of_todays_kernels_has_no_fault() -> None:
    done = python(SAMPLE)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
