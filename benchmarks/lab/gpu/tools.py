"""NVIDIA's tools that watch a program: ``ncu`` counts bytes from memory, ``compute-sanitizer`` finds bad accesses and races.

They run with a time limit. If a tool is missing or may not read the counters, a row says so. This module is the program that ncu
watches, ``python -m benchmarks.lab.gpu.tools``.
"""

from __future__ import annotations

import csv
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import stablelora_kernels as slk
from benchmarks.lab.gpu.device import CudaDevice, Device
from benchmarks.lab.gpu.layer import TARGET_R, TARGET_SIZE, Layers
from benchmarks.lab.gpu.section import NO_GPU, NOTE_LENGTH, ROOT, SKIPPED, Clock, Row
from benchmarks.lab.predict.rivals import Shape

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
# CUDA's installers put the tools here.
PLACES = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda/compute-sanitizer",
)
# A tool takes at most this many seconds, and leaves this many to the section.
MOST, SPARE = 110.0, 3.0
ARMS = ("frozen", "eager", "ours")
# A kernel with this name, which nothing else here launches, precedes each arm's kernels.
MARKER = "erfinv"


def run_arms(device: Device, s: Shape) -> None:
    """Run forward and backward of each arm once, in a region of its own that is profiled."""
    layers = Layers(s, device)
    marker = torch.zeros(1, device=device.device)
    for name in ARMS:
        run = layers.calls(name, "both")[0]
        for _ in range(0 if device.dry else 2):
            run()
        device.flush()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.start()
        torch.erfinv(marker)
        run()
        device.synchronize()
        if not device.dry:
            torch.cuda.profiler.stop()


def main() -> None:
    with slk.use_backend("triton"):
        run_arms(CudaDevice(), Shape(8192, *TARGET_SIZE, TARGET_R, True))


def find(program: str) -> str | None:
    """Return the program's path, on PATH or where CUDA's installers put it."""
    paths = [shutil.which(program), *(path for place in PLACES for path in sorted(glob.glob(f"{place}/{program}")))]
    return next((path for path in paths if path and os.access(path, os.X_OK)), None)


def watch(command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Run a tool with the program it watches. Return its exit status, None if it ran out of time, and its output.

    A program that outlives its tool ends with this section's process group.
    """
    with tempfile.TemporaryFile() as output:
        try:
            status: int | None = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        return status, output.read().decode(errors="replace")


def skipped(what: str, why: str, details: str = "") -> Row:
    return {"what": what, "status": SKIPPED, "note": f"{why}\n{details[-NOTE_LENGTH:]}".strip()}


def parse_ncu(text: str) -> list[tuple[str, float]]:
    """Return kernels in order, each with the bytes that it moved from and to memory, from ncu's raw CSV in base units."""
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
    """Return each arm's kernels: those after its marker.

    Raises:
        ValueError: the number of markers is not the number of arms.
    """
    groups: list[list[tuple[str, float]]] = []
    for name, moved in kernels:
        if MARKER in name:
            groups.append([])
        elif groups:
            groups[-1].append((name, moved))
    if len(groups) != len(ARMS):
        raise ValueError(f"ncu saw {len(groups)} markers among {len(kernels)} kernels, expected {len(ARMS)}")
    return dict(zip(ARMS, groups, strict=True))


def check_dram(device: Device, s: Shape, clock: Clock) -> Iterator[Row]:
    """Return the GiB that forward and backward move from and to memory, by arm."""
    if device.dry:
        run_arms(device, s)
        yield from ({"what": name, **NO_GPU} for name in ARMS)
        return
    ncu = find("ncu")
    if ncu is None:
        yield skipped("ncu", "ncu is neither on PATH nor where CUDA installs it")
        return
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "ncu.csv"
        command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--metrics", f"{READ},{WRITTEN}"]
        # The marker is part of a demangled name. The card's clocks stay as they are, and L2 as the program leaves it.
        command += ["--print-kernel-base", "demangled", "--clock-control", "none", "--cache-control", "none"]
        command += ["--profile-from-start", "off", "--log-file", str(log)]
        command += [sys.executable, "-m", "benchmarks.lab.gpu.tools"]
        status, printed = watch(command, min(MOST, clock.left() - SPARE))
        text = log.read_text(errors="replace") if log.exists() else ""
    kernels = parse_ncu(text)
    if status != 0 or not kernels:
        why = "time was up" if status is None else f"ncu ended with status {status} and {len(kernels)} kernels"
        yield skipped("ncu", why, printed + text)
        return
    try:
        arms = by_arm(kernels)
    except ValueError as error:
        yield skipped("ncu", str(error), str(kernels))
        return
    for name, own in arms.items():
        note = "GiB, ncu: " + "; ".join(f"{kernel[:40]} {moved / 2**30:.3f}" for kernel, moved in own)
        yield {"what": name, "figure": round(sum(moved for _, moved in own) / 2**30, 4), "note": note[:NOTE_LENGTH]}


if __name__ == "__main__":
    main()
