"""Programs of NVIDIA's that watch another program: ``ncu`` for bytes from memory, ``compute-sanitizer`` for bad accesses.

They run ``benchmarks.lab.gpu.target`` in a process of its own, with a limit of time. Where one is not there, or may not read the
counters, a row says so.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu import target
from benchmarks.lab.gpu.device import Device
from benchmarks.lab.gpu.process import ROOT, environment
from benchmarks.lab.gpu.section import DRY, FAILED, NEEDS_GPU, NOTE_LENGTH, OK, SKIPPED, Clock, Row

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
ELSEWHERE = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda/compute-sanitizer",
)
# Seconds that a tool may take, and that are left for what comes after it.
MOST, SPARE = 110.0, 3.0


def find(program: str) -> str | None:
    """Its path, on PATH or where CUDA's installers put it."""
    paths = [shutil.which(program), *(path for place in ELSEWHERE for path in sorted(glob.glob(f"{place}/{program}")))]
    return next((path for path in paths if path and os.access(path, os.X_OK)), None)


def watch(command: list[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit status, None where time was up, and what was printed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(False), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        status: int | None
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # In the session's process group, which the command kills whole; the tool takes its program with it here.
            process.terminate()
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status = None
        output.seek(0)
        return status, output.read().decode(errors="replace")


def parse_ncu(text: str) -> list[tuple[str, float]]:
    """Kernels and the bytes that each moved from and to memory, in order, from ncu's raw CSV in base units."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        # The line below the heads has the units, and no number.
        if row["ID"].strip():
            moved = sum(float(row[name].replace(",", "")) for name in (READ, WRITTEN))
            found.append((row["Kernel Name"], moved))
    return found


def by_arm(kernels: list[tuple[str, float]]) -> dict[str, list[tuple[str, float]]]:
    """Each arm's kernels: those behind its marker.

    Raises:
        ValueError: there are not as many markers as arms.
    """
    groups: list[list[tuple[str, float]]] = []
    for name, moved in kernels:
        if target.MARKER in name:
            groups.append([])
        elif groups:
            groups[-1].append((name, moved))
    if len(groups) != len(target.ARMS):
        raise ValueError(f"ncu saw {len(groups)} markers among {len(kernels)} kernels, expected {len(target.ARMS)}")
    return dict(zip(target.ARMS, groups, strict=True))


def check_dram(device: Device, s: Shape, clock: Clock) -> Iterator[Row]:
    """GiB from and to memory in forward and backward, by arm."""
    if device.dry:
        target.dram(device, s)
        for name in target.ARMS:
            yield {"what": name, "status": DRY, "note": NEEDS_GPU}
        return
    program = find("ncu")
    if program is None:
        yield {"what": "ncu", "status": SKIPPED, "note": "there is no ncu on PATH or where CUDA installs it"}
        return
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "ncu.csv"
        command = [program, "--csv", "--page", "raw", "--print-units", "base", "--metrics", f"{READ},{WRITTEN}"]
        # Whole names, in which the marker is to be found. The card's settings stay as they are, and L2 as the program leaves it.
        command += [
            "--print-kernel-base",
            "demangled",
            "--clock-control",
            "none",
            "--cache-control",
            "none",
            "--profile-from-start",
            "off",
        ]
        command += ["--log-file", str(log), sys.executable, "-m", "benchmarks.lab.gpu.target", "dram"]
        status, printed = watch(command, min(MOST, clock.left() - SPARE))
        text = log.read_text(errors="replace") if log.exists() else ""
    kernels = parse_ncu(text)
    if status != 0 or not kernels:
        why = "time was up" if status is None else f"ncu ended with status {status} and {len(kernels)} kernels"
        yield {"what": "ncu", "status": SKIPPED, "note": f"{why}\n{(printed + text)[-NOTE_LENGTH:]}"}
        return
    try:
        arms = by_arm(kernels)
    except ValueError as error:
        yield {"what": "ncu", "status": SKIPPED, "note": f"{error}: {kernels}"[:NOTE_LENGTH]}
        return
    for name, own in arms.items():
        note = "GiB, ncu: " + "; ".join(f"{kernel[:40]} {moved / 2**30:.3f}" for kernel, moved in own)
        yield {"what": name, "figure": round(sum(moved for _, moved in own) / 2**30, 4), "note": note[:NOTE_LENGTH]}


SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}


def check_sanitizer(device: Device, tool: str, clock: Clock) -> Iterator[Row]:
    """Errors or hazards that the tool finds in a small run of all kernels."""
    if device.dry:
        target.small(device)
        yield {"what": tool, "status": DRY, "note": NEEDS_GPU}
        return
    program = find("compute-sanitizer")
    if program is None:
        yield {
            "what": tool,
            "status": SKIPPED,
            "note": "there is no compute-sanitizer on PATH or where CUDA installs it",
        }
        return
    command = [program, "--tool", tool, sys.executable, "-m", "benchmarks.lab.gpu.target", "small"]
    # Every tensor an allocation of its own, so that what lies beyond it is out of bounds.
    status, printed = watch(command, min(MOST, clock.left() - SPARE), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    match = SUMMARY[tool].search(printed)
    if match is None or target.FINISHED not in printed:
        why = "time was up" if status is None else f"it ended with status {status} and no summary of a finished run"
        yield {"what": tool, "status": SKIPPED, "note": f"{why}\n{printed[-NOTE_LENGTH:]}"}
        return
    found = int(match[1])
    note = "errors or hazards found" if not found else printed[:NOTE_LENGTH]
    yield {"what": tool, "status": OK if found == 0 else FAILED, "figure": found, "expected": 0, "note": note}
