"""NVIDIA's tools over the kernels: compute-sanitizer's report no error in ours, and ncu counts the
bytes from and to memory.

They take minutes, so name them: ``pytest -m nightly tests/gpu/test_nvidia_tools.py``. All tools
together end after ``SLK_GPU_SECONDS``.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.testing import layer_arms
from stablelora_kernels.testing.cases import BF16
from tests.helpers.gpu_checks import DEVICE, SMALL

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).resolve().parents[2]
END = time.monotonic() + float(os.environ.get("SLK_GPU_SECONDS", "600"))
# What compute-sanitizer watches: all kernels, and each way of launching in a test that takes
# seconds without it.
BRING_UP, PREPARED = "tests/gpu/test_bring_up.py", "tests/gpu/test_prepared_launches.py"
WATCHED = {
    "kernels": [f"{BRING_UP}::test_{name}" for name in ("doctor", "down", "linear", "other_ops")],
    "launches": [
        f"{PREPARED}::test_the_third_call_is_prepared",
        "tests/gpu/test_cuda_graphs.py::test_a_call",
        "tests/gpu/test_captured_step_in_graphs.py::test_on_the_default_stream",
        f"{BRING_UP}::test_optimizer",
        f"{PREPARED}::test_streams_share_a_plan_and_not_its_counters",
    ],
}
# The share of the time left that a tool may take over these tests.
SHARES = {"kernels": 0.65, "launches": 1.0}
# CUDA's installers put the tools here.
PLACES = (
    "/usr/local/cuda*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda*/compute-sanitizer",
)
# A report's first line begins one column behind the bar, perhaps on pytest's own line; the others
# deeper.
REPORT = re.compile(r"={9} (\S.*)\n(?:=+  .*\n)+")
OURS = re.compile(r"\b_[a-z_]+_kernel\b")
TEST = re.compile(r"^tests/gpu/\w+\.py::(\S+)", re.MULTILINE)
BYTES = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
ARMS = ("frozen", "eager", "ours")


def run_tool(
    program: str, *arguments: str, share: float = 1.0, **variables: str
) -> tuple[int | None, str]:
    """Return the tool's exit status, None if it ran out of time, and what it printed. Skip the test
    if it is not here.
    """
    places = [place for pattern in PLACES for place in sorted(glob.glob(pattern))]
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *places]))
    if SMALL or found is None:
        pytest.skip(
            "needs a CUDA GPU"
            if SMALL
            else f"{program} is neither on PATH nor where CUDA installs it"
        )
    try:
        done = subprocess.run(
            [found, *arguments], cwd=ROOT, env=os.environ | variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=max(1.0, share * (END - time.monotonic())),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def last_test(printed: str) -> str:
    return (TEST.findall(printed) or ["no test"])[-1]


def errors(printed: str) -> tuple[Counter[str], int]:
    """Return the errors in our kernels, with test, kernel and kind, and the number of other
    reports.
    """
    ours, others = Counter[str](), 0
    for report in REPORT.finditer(printed):
        kernel = OURS.search(report[0])
        if kernel is None or report[1].startswith("Warning"):
            others += 1
        else:
            ours[f"{last_test(printed[: report.start()])}, {kernel[0]}: {report[1]}"] += 1
    return ours, others


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("tool", ("memcheck", "synccheck", "initcheck", "racecheck"))
def test_no_errors_in_our_kernels(tool, watched, record_property):
    # Without the caching allocator each tensor is an allocation of its own, and memory beyond it is
    # out of bounds. A CUDA graph can't be captured without it.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if watched == "kernels" else {}
    status, printed = run_tool(
        "compute-sanitizer", "--tool", tool, sys.executable, "-m", "pytest", *WATCHED[watched],
        "-v", "-s", "-p", "no:cacheprovider",
        share=SHARES[watched],
        **memory,
        # The tests' watchdog would take a slow tool for a kernel that hangs.
        SLK_GPU_WATCHDOG="0",
        PYTHONUNBUFFERED="1",
    )  # fmt: skip
    ours, others = errors(printed)
    record_property("note", f"{others} warnings and errors in others' kernels")
    assert not ours, "\n".join(f"{count}x {report}" for report, count in ours.most_common())
    if status is None:
        pytest.skip(f"time was up in {last_test(printed)}")
    assert status == 0 and " SUMMARY: " in printed, (
        f"status {status} after {last_test(printed)}\n{printed[-4000:]}"
    )


def run_once(arm: str) -> None:
    """Run forward and backward of one arm, 8192 rows by 4096 x 4096 with dropout, in a region that
    ncu watches.
    """
    rows, size, r = (70, 32, 8) if SMALL else (8192, 4096, 16)
    layer = dict(zip(ARMS, layer_arms(size, size, r, 0.1, BF16, DEVICE), strict=True))[arm]
    x, grad = (torch.randn(rows, size, device=DEVICE, dtype=BF16) for _ in range(2))
    wanted = (x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad))
    # Twice the size of any L2.
    flush = torch.ones(2**8 if SMALL else 2**28, dtype=torch.uint8, device=DEVICE)
    for turn in range(3):
        flush.max()
        if turn == 2 and not SMALL:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        torch.autograd.grad(layer(x), wanted, grad)
    if not SMALL:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def gib_moved(text: str) -> float:
    """Return the GiB of all kernels in ncu's raw CSV in base units."""
    table = "\n".join(line for line in text.splitlines() if line.startswith('"'))
    # The line below the heads has the units, and no number.
    kernels = pd.read_csv(io.StringIO(table), dtype=str).dropna(subset=["ID"])
    return (
        kernels[BYTES]
        .apply(lambda column: column.str.replace(",", "").astype(float))
        .to_numpy()
        .sum()
        / 2**30
    )


def test_fewer_bytes_than_eager(tmp_path, record_property):
    moved = {}
    for arm in ARMS if SMALL else ():
        run_once(arm)
    for arm in ARMS:
        log = tmp_path / f"{arm}.csv"
        # The card's clocks stay as they are, and L2 as the program leaves it.
        status, printed = run_tool(
            "ncu", "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(BYTES), "--log-file", str(log),
            "--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off",
            sys.executable, "-m", "tests.gpu.test_nvidia_tools", arm,
        )  # fmt: skip
        text = log.read_text() if log.exists() else ""
        if status != 0 or '"ID"' not in text:
            pytest.skip(f"ncu ended with status {status}\n{(printed + text)[-1000:]}")
        moved[arm] = gib_moved(text)
    record_property("figure", round(moved["ours"], 4))
    record_property("note", f"GiB of one forward and backward: {moved}")
    assert moved["ours"] < moved["eager"]


if __name__ == "__main__":
    with slk.settings(backend="triton"):
        run_once(sys.argv[1])
