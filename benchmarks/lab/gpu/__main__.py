"""Try this library on an NVIDIA GPU, one step after another, then measure it against rivals.

    python -m benchmarks.lab.gpu [--budget 1500] [--only SECTION ...] [--out DIRECTORY] [--anyway]
    python -m benchmarks.lab.gpu --dry-run

The first row has the versions of torch, Triton and ptxas. If the installed Triton is known to be
wrong for this GPU, the command says so and stops; ``--anyway`` goes on.

What decides most comes first: ``smoke``, three of doctor's checks; ``headline``, the times of one
layer by all arms; ``job``, a fine-tuning run. Then ``doctor``, ``kernels``, ``launches`` and
``correctness`` run the tests, and the other sections take all times. NVIDIA's tools come last: ncu
counts bytes, and compute-sanitizer's tools watch the kernels. Only a failure of ``smoke`` ends the
run.

Each section is a pytest process of its own, so a crash or a hang loses only that section. Rows are
kept as they come. After each section the summary so far, and an archive of all files, are written.
``--dry-run`` executes the same code in Triton's interpreter on a CPU at tiny sizes: it writes
nothing into the repository's results, and measures nothing. The exit status is 1 if a check failed,
130 after an interrupt.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from benchmarks.common.measure import environment
from benchmarks.common.records import read_records, write_records
from benchmarks.common.tables import RESULTS, write_text
from benchmarks.lab.gpu import report, stages
from benchmarks.lab.gpu.rows import (
    BEGUN,
    ENDED,
    FAILED,
    INTERRUPTED,
    NOT_REACHED,
    NOTE_LENGTH,
    OK,
    ROOT,
    Row,
)
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.backend import Capability
from stablelora_kernels.utils.threads import ONE_THREAD

TOOLS = ["tests/gpu/test_nvidia_tools.py", "-m", "nightly", "-k"]
GPU_TESTS = ["-m", "gpu"]
# One worker, which stops at the first failure.
IN_ORDER = [*GPU_TESTS, "-x"]
# Files whose tests are all among the first.
FILES = sorted(
    {test.partition("::")[0] for test in (*stages.DOCTOR, *stages.KERNELS, *stages.LAUNCHES)}
)
# Most of the tests' time goes into compiling kernels on the host. loadgroup keeps those that fill
# the GPU in one process.
WORKERS = (
    ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "loadgroup"]
    if find_spec("xdist")
    else []
)
# An unusable GPU fails every test.
TIMES = ["benchmarks/lab/gpu/times.py", "--confcutdir", "benchmarks/lab/gpu", "--maxfail=3", "-k"]
# Seconds for all sections.
BUDGET = 1500.0
# A share of the time and pytest's arguments, in the order in which they run.
SECTIONS: dict[str, tuple[float, list[str]]] = {
    "smoke": (45, [*stages.SMOKE, *IN_ORDER]),
    "headline": (180, [*TIMES, "headline"]),
    "job": (120, ["benchmarks/lab/gpu/job.py", "--confcutdir", "benchmarks/lab/gpu"]),
    "doctor": (60, [*stages.DOCTOR, *GPU_TESTS, *WORKERS]),
    "kernels": (110, [*stages.KERNELS, *IN_ORDER]),
    "launches": (110, [*stages.LAUNCHES, *IN_ORDER]),
    "correctness": (
        180,
        ["tests/gpu", *GPU_TESTS, *(f"--ignore={path}" for path in FILES), *WORKERS],
    ),
    "layer": (230, [*TIMES, "layer"]),
    "apart": (40, [*TIMES, "apart"]),
    "mlp": (80, [*TIMES, "mlp"]),
    "projections": (30, [*TIMES, "projections"]),
    "captured": (50, [*TIMES, "captured"]),
    "step": (50, [*TIMES, "step"]),
    "dram": (60, [*TOOLS, "fewer_bytes"]),
    "memcheck": (110, [*TOOLS, "memcheck"]),
    "synccheck": (50, [*TOOLS, "synccheck"]),
    "initcheck": (50, [*TOOLS, "initcheck"]),
    "racecheck": (70, [*TOOLS, "racecheck"]),
}
# A failure ends the run: no figure of it would mean anything. Any other failure is only noted,
# because a sanitizer has false alarms, and one wrong kernel says nothing of the others' times.
ENDING = ("smoke",)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ptxas_version(capability: Capability) -> str:
    """Return the version of the ptxas by which Triton assembles code for GPUs of ``capability``."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(10 * capability[0] + capability[1]).path
    printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV(\d+\.\d+\.\d+)", printed)
    return version[1] if version else "unknown"


def versions(machine: Row, capability: Capability, problem: str) -> Row:
    """Return the first row: the versions that decide which machine code runs. ``problem``: why it
    is known to be wrong, or "".
    """
    arch = f"sm_{capability[0]}{capability[1]}"
    words = (
        f"torch {machine['torch']}, Triton {machine['triton']}, ptxas {machine['ptxas']} for {arch}"
    )
    return {"section": "versions", "case": words, "status": OK, "note": problem}


def variables(seconds: float, dry: bool, out: Path) -> dict[str, str]:
    """Return the environment of a section, with none of our own settings but the tests' watchdog's.

    What first use finds is kept among the results, so that the archive has it.
    """
    ours = ("STABLELORA_", "SLK_", "TRITON_INTERPRET")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(ours) or k == "SLK_GPU_WATCHDOG"
    }
    if dry:
        # The interpreter's arrays are so small that more threads make it slower. The user's own
        # setting has precedence.
        kept = (
            ONE_THREAD
            | kept
            | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "SLK_GPU_DRY_RUN": "1"}
        )
    # A tool leaves a moment for the report of what it found.
    seconds_left = str(max(1.0, seconds - 5))
    return kept | {"SLK_GPU_SECONDS": seconds_left, "STABLELORA_CACHE": str(out.resolve())}


def start(name: str, path: Path, log: Path, seconds: float, dry: bool) -> tuple[str, str]:
    """Run a section, whose rows go to ``path``, for a limited time. Return how it ended, and a
    note.
    """
    # pytest leaves standard error alone, where the watchdog's dump goes.
    command = [
        sys.executable,
        "-m",
        "pytest",
        *SECTIONS[name][1],
        "-q",
        "--tb=short",
        "--capture=sys",
    ]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "benchmarks.lab.gpu.rows",
        "--rows",
        str(path.resolve()),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables(seconds, dry, path.parent), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return NOT_REACHED, "time was up"
        except KeyboardInterrupt:
            return INTERRUPTED, ""
        finally:
            # Its own processes (pytest's workers, ncu) must not outlive it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return (
        FAILED if status else ENDED
    ), f"{log.read_text(errors='replace')[-NOTE_LENGTH:]}\nexit status {status}"


def run_section(name: str, out: Path, seconds: float, machine: Row, dry: bool) -> pd.DataFrame:
    """Run a section. Return its rows, which its CSV file has, too; the last one says how it ended."""
    path, log = out / f"{name}.csv", out / f"{name}.log"
    say(f"{name}: begins, {seconds:.0f} s; its output is in {log}")
    ended, note = start(name, path, log, seconds, dry)
    rows = read_records(path) if path.exists() else pd.DataFrame({"status": []})
    if ended in (ENDED, FAILED):
        rows.loc[rows.status == BEGUN, ["status", "note"]] = (
            FAILED,
            "it began and did not end: it hangs, or it crashed",
        )
    # pytest's status is 1 behind a failed test, which is a failed row already.
    if ended != ENDED and not (note.endswith("\nexit status 1") and (rows.status == FAILED).any()):
        last = {"case": "the section's process", "status": ended, "note": note}
        rows = pd.concat([rows, pd.DataFrame([last])])
    rows = rows.assign(section=name, dry="dry" if dry else "")
    write_records(path, rows.to_dict("records"), machine)
    return rows


def write_archive(out: Path) -> Path:
    """Write all files of ``out`` into one archive in it: a lent machine may return few files."""
    path = out / f"{out.name}.tar.gz"
    partial = path.with_suffix(".part")
    files = sorted(file for file in out.rglob("*") if file.is_file())
    with tarfile.open(partial, "w:gz") as archive:
        for file in files:
            if file not in (path, partial):
                archive.add(file, Path(out.name) / file.relative_to(out))
    partial.replace(path)
    return path


def keep(found: Sequence[pd.DataFrame], out: Path, machine: Row, dry: bool) -> str:
    """Write the summary of the rows so far, and the archive. Return the summary."""
    page = report.page(pd.concat(found, ignore_index=True), machine, dry)
    write_text(out / "summary.md", page)
    write_archive(out)
    return page


def run(
    sections: Sequence[str], out: Path, budget: float, machine: Row, dry: bool, first: Row
) -> pd.DataFrame:
    """Run the sections until one ends the run, and keep what is known after each. Return all rows,
    of which ``first`` is the first.
    """
    begun = time.monotonic()
    total = sum(SECTIONS[name][0] for name in sections)
    passed = 0.0
    found = [pd.DataFrame([first])]
    for name in sections:
        # An earlier run's rows must not pass for this one's.
        (out / f"{name}.csv").unlink(missing_ok=True)
    for name in sections:
        # Its share, and what earlier sections left over.
        passed += SECTIONS[name][0]
        seconds = begun + budget * passed / total - time.monotonic()
        if seconds <= 0:
            found.append(pd.DataFrame([{"section": name, "status": NOT_REACHED}]))
            continue
        rows = run_section(name, out, seconds, machine, dry)
        found.append(rows)
        statuses = {*rows.status}
        keep(found, out, machine, dry)
        if INTERRUPTED in statuses or (name in ENDING and FAILED in statuses):
            say(
                f"{name} failed or was interrupted, so the run ends here. --only names sections to run in spite of it."
            )
            break
    return pd.concat(found, ignore_index=True)


def interrupt(*_: object) -> None:
    # Another interrupt must not lose the report.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--budget",
        type=float,
        default=BUDGET,
        help="seconds for all sections (default: %(default)g)",
    )
    add(
        "--only",
        nargs="+",
        choices=tuple(SECTIONS),
        default=tuple(SECTIONS),
        help="run only these sections",
    )
    add("--out", type=Path, help="where to write (default: benchmarks/results/<the GPU's name>)")
    add("--commit", help="the commit that is measured, if this is not a git checkout")
    add(
        "--anyway",
        action="store_true",
        help="go on if the installed Triton is known to be wrong for this GPU",
    )
    add(
        "--dry-run",
        action="store_true",
        help="run the same code in the interpreter on a CPU, at tiny sizes",
    )
    options = parser.parse_args(given)
    dry, machine = options.dry_run, environment()
    if options.budget <= 0:
        parser.error(f"--budget must be above 0, got {options.budget:g}")
    if dry and options.out and options.out.resolve().is_relative_to(RESULTS.resolve()):
        parser.error(f"--out must lie outside {RESULTS} in a dry run, got {options.out}")
    if not dry and machine["gpu"] is None:
        say("torch finds no NVIDIA GPU here. --dry-run runs the same code in Triton's interpreter.")
        return 2
    if backend.TRITON_PROBLEM is not None:
        say(f"The kernels can't run here: {backend.TRITON_PROBLEM}.")
        return 2
    if options.commit:
        machine["commit"] = options.commit
    slug = re.sub(r"[^a-z0-9]+", "-", str(machine["gpu"]).lower()).strip("-")
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if dry else RESULTS / slug)
    out.mkdir(parents=True, exist_ok=True)
    # A time limit sends SIGTERM; treat it as an interrupt. A shell starts background processes with
    # SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    # In a dry run the interpreter stands in for an H100.
    capability = (9, 0) if dry else torch.cuda.get_device_capability()
    verdict = backend.UNKNOWN if dry else backend.verdict_of(torch.cuda.current_device())
    machine["ptxas"] = ptxas_version(capability)
    first = versions(machine, capability, verdict.problem) | {"dry": "dry" if dry else ""}
    write_records(out / "versions.csv", [first], machine)
    say(first["case"])
    if verdict.problem and not options.anyway:
        remedy = f"; {verdict.remedy}" if verdict.remedy else ""
        say(f"{verdict.problem}{remedy}. --anyway runs it all the same.")
        return 2
    sections = [name for name in SECTIONS if name in options.only]
    rows = run(sections, out, options.budget, machine, dry, first)
    page = (out / "summary.md").read_text(encoding="utf-8")
    print(page, f"Files in {out}, and all of them in its {out.name}.tar.gz", sep="\n", flush=True)
    return 130 if INTERRUPTED in {*rows.status} else int(FAILED in {*rows.status})


if __name__ == "__main__":
    sys.exit(main())
