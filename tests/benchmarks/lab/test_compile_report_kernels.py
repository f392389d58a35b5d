"""Today's kernels keep what the committed report promises. Triton compiles, in processes of their own."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton

from benchmarks.lab.compile_report import report
from tests.helpers.processes import printed, python

of_this_triton = pytest.mark.skipif(
    not triton.__version__.startswith(f"{report.TRITON}."), reason=f"the report is of Triton {report.TRITON}'s compiler"
)


# Compiles for minutes. By day, the committed report's widths of loads are checked, and that the kernels have kept their code.
@pytest.mark.nightly
def test_quantized_weights_are_loaded_16_bytes_at_a_time() -> None:
    """In the main loop, asynchronously: the other copies there are of 4 bytes, the nested scales of a block."""
    code = """
import json, re
from benchmarks.lab.compile_report import launches, machine_code
from stablelora_kernels.dispatch.problem import DEVICES
for arch in ("sm_80", "sm_90", "sm_100"):
    found = {}
    for dtype, launch in launches.quantized_lora_linear_launches(DEVICES[arch], (16, 64)):
        if dtype == "bf16/fp32" and "nf4" in launch.variant and "TRANS_W" in launch.constants and launch.variant not in found:
            ptx = machine_code.compile_launch(launch, arch).asm["ptx"]
            found[launch.variant] = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global \\[[^]]*\\], \\[[^]]*\\], (0x\\w+)", ptx)
    print(json.dumps(found))
"""
    lines = printed(code).splitlines()
    assert len(lines) == 3, lines
    for found in map(json.loads, lines):
        assert len(found) >= 12
        for variant, sizes in found.items():
            assert set(sizes) == {"0x10", "0x4"} and sizes.count("0x10") > sizes.count("0x4"), (variant, sizes)


@of_this_triton
@pytest.mark.parametrize(
    "arguments", [["--quick", "--check"], pytest.param(["--check"], marks=pytest.mark.nightly)], ids=" ".join
)
def test_kernels_keep_the_report(arguments: list[str]) -> None:
    """All rows of sm_90 that differ from what was recorded, and a sample of the rest; without ``--quick`` all are compiled."""
    done = python(f"from benchmarks.lab.compile_report.__main__ import main; raise SystemExit(main({arguments}))")
    assert done.returncode == 0, done.stderr[-8000:]


DIGESTS = """
from benchmarks.lab.compile_report import report
from benchmarks.lab.compile_report.machine_code import code_digest, source_digest
from benchmarks.lab.compile_report.report import Digests
jobs = report.jobs(report.FULL)
places = range(len(jobs))
kept = {report.job_name(job): Digests(source_digest(job.launch, report.FULL), "none") for job in jobs}
kept[report.job_name(jobs[1])] = Digests("another", "another")
# Another source with the same code.
kept[report.job_name(jobs[2])] = Digests("another", code_digest(jobs[2].launch, report.FULL))
del kept[report.job_name(jobs[3])]
chosen = [place for place in places if report.in_sample(report.FULL, place, kept)]
assert chosen == [place for place in places if place % report.EVERY_KEPT == 0 or place in (1, 3)], chosen
assert all(report.in_sample(report.FULL, place, {}) for place in places)
others = report.jobs("sm_80")
assert sum(report.in_sample("sm_80", place, {}) for place in range(len(others))) >= len(others) // report.EVERY
known = {report.job_name(job): Digests(source_digest(job.launch, "sm_80"), "none") for job in others}
assert sum(report.in_sample("sm_80", place, known) for place in range(len(others))) <= len(others) // report.EVERY_KEPT + 1
launch = jobs[1].launch
name = next(name for name, value in launch.constants.items() if name.startswith("BLOCK"))
other = launch._replace(constants=launch.constants | {name: 2 * launch.constants[name]})
warps = launch._replace(options=launch.options | {"num_warps": 2 * launch.options["num_warps"]})
for digest in (source_digest, code_digest):
    found = [digest(each, report.FULL) for each in (launch, launch, other, warps)] + [digest(launch, "sm_80")]
    assert found[0] == found[1] and len(set(found)) == 4, (digest, found)
# A constant that the variant's code does not depend on: the source differs, the code does not.
unused = next(job.launch for job in jobs if not job.launch.constants.get("HAS_GRAD", True))
same = unused._replace(constants=unused.constants | {"GRAD_STAGES": 7})
assert source_digest(unused, report.FULL) != source_digest(same, report.FULL)
assert code_digest(unused, report.FULL) == code_digest(same, report.FULL)
"""


@of_this_triton
def test_what_has_not_changed_is_sampled_and_what_has_is_compiled() -> None:
    done = python(DIGESTS)
    assert done.returncode == 0, done.stderr[-8000:]
