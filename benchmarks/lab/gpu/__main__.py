"""Try this library on an NVIDIA GPU, one step after another, then measure it against rivals.

    python -m benchmarks.lab.gpu [--budget 1500] [--only SECTION ...] [--out DIRECTORY]
    python -m benchmarks.lab.gpu --dry-run

First compute-sanitizer watches the first tests. Then ``bringup`` runs tests by one worker, in an order in which each depends on
those before it. A failure in either ends the run. Then come the other tests, by several workers, times, and bytes by ncu.

Each section is a pytest process of its own, so a crash or a hang loses only that section. Rows are kept as they come; an
interrupt keeps them. ``--dry-run`` executes the same code in Triton's interpreter on a CPU at tiny sizes: it writes nothing into
the repository's results, and measures nothing. The exit status is 1 if a check failed, 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.common.measure import environment
from benchmarks.common.records import write_records
from benchmarks.common.tables import RESULTS, write_text
from benchmarks.lab.gpu import report
from benchmarks.lab.gpu.rows import BEGUN, ENDED, FAILED, INTERRUPTED, NOT_REACHED, NOTE_LENGTH, ROOT, Row, read


class Section(NamedTuple):
    """pytest's arguments, a share of the time, and whether a failure ends the run: what follows would repeat it, or hang."""

    seconds: float
    pytest: Sequence[str]
    ends: bool = False


# Each takes one step beyond those before it, so the first that fails says where to look.
BRING_UP = [f"tests/gpu/test_{name}.py" for name in ("bring_up", "prepared_launches", "cuda_graphs", "graphed_step")]
# Most of the tests' time goes into compiling kernels on the host. loadgroup keeps those that fill the GPU in one process.
WORKERS = ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "loadgroup"] if find_spec("xdist") else []
TOOLS = ["tests/gpu/test_nvidia_tools.py", "-m", "nightly", "-k"]
TIMES = ["benchmarks/lab/gpu/times.py", "--confcutdir", "benchmarks/lab/gpu", "-k"]
# In the order in which they run.
SECTIONS = {
    "memcheck": Section(150, [*TOOLS, "memcheck"], ends=True),
    "synccheck": Section(70, [*TOOLS, "synccheck"], ends=True),
    "initcheck": Section(70, [*TOOLS, "initcheck"], ends=True),
    "racecheck": Section(110, [*TOOLS, "racecheck"], ends=True),
    "bringup": Section(300, [*BRING_UP, "-m", "gpu", "-x"], ends=True),
    "correctness": Section(220, ["tests/gpu", "-m", "gpu", *(f"--ignore={path}" for path in BRING_UP), *WORKERS]),
    "layer": Section(300, [*TIMES, "layer"]),
    "mlp": Section(80, [*TIMES, "mlp"]),
    "projections": Section(30, [*TIMES, "projections"]),
    "captured": Section(50, [*TIMES, "captured"]),
    "step": Section(50, [*TIMES, "step"]),
    "dram": Section(70, [*TOOLS, "fewer_bytes"]),
}
# Of our own settings that may be in the environment.
KEPT = "SLK_GPU_WATCHDOG"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start(name: str, lines: Path, log: Path, seconds: float, dry: bool) -> Row:
    """Run a section, whose rows go to the file ``lines``, for a limited time. Return the row of how it ended."""
    ours = ("STABLELORA_", "SLK_", "TRITON_INTERPRET")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(ours) or k == KEPT}
    # A tool leaves a moment for the report of what it found.
    variables["SLK_GPU_SECONDS"] = str(max(1.0, seconds - 5))
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "SLK_GPU_DRY_RUN": "1"}
    # pytest leaves standard error alone, where the watchdog's dump goes.
    command = [sys.executable, "-m", "pytest", *SECTIONS[name].pytest, "-q", "--capture=sys", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.lab.gpu.rows", "--rows", str(lines.resolve())]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": NOT_REACHED, "note": "time was up"}
        finally:
            # Its own processes (pytest's workers, ncu) must not outlive it.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # A failed test is a failed row already.
    if status == 0 or (status == 1 and any(row["status"] in (FAILED, BEGUN) for row in read(lines))):
        return {"status": ENDED}
    return {"status": FAILED, "note": f"exit status {status}\n{log.read_text(errors='replace')[-NOTE_LENGTH:]}"}


def run_section(name: str, out: Path, seconds: float, machine: Row, dry: bool) -> list[Row]:
    """Run a section. Return its rows, which are in its CSV file then; the last one says how it ended."""
    lines, log, ended = out / f"{name}.jsonl", out / f"{name}.log", {"status": INTERRUPTED}
    say(f"{name}: begins, {seconds:.0f} s; its output is in {log}")
    # An earlier run's rows must not pass for this one's.
    lines.unlink(missing_ok=True)
    with suppress(KeyboardInterrupt):
        ended = start(name, lines, log, seconds, dry)
    rows = [{"section": name, **row} for row in (*read(lines), {"case": "the section's process", **ended})]
    for row in rows:
        if row["status"] == BEGUN:
            hung = ended["status"] in (ENDED, FAILED)
            row |= (
                {"status": FAILED, "note": "it began and did not end: it hangs, or its process crashed"} if hung else {}
            )
        if dry:
            row["dry"] = "dry"
    write_records(out / f"{name}.csv", rows, machine)
    lines.unlink(missing_ok=True)
    return rows


def run(sections: Sequence[str], out: Path, budget: float, machine: Row, dry: bool) -> list[Row]:
    """Run the sections until one ends the run. Return all rows."""
    begun, total, passed, found = time.monotonic(), sum(SECTIONS[name].seconds for name in sections), 0.0, list[Row]()
    for name in sections:
        (out / f"{name}.csv").unlink(missing_ok=True)
    for name in sections:
        # Its share, and what earlier sections left over.
        passed += SECTIONS[name].seconds
        seconds = begun + budget * passed / total - time.monotonic()
        if seconds <= 0:
            found.append({"section": name, "status": NOT_REACHED, "note": "time was up"})
            continue
        found += run_section(name, out, seconds, machine, dry)
        failed = [row for row in found if row["section"] == name and row["status"] == FAILED]
        if found[-1]["status"] == INTERRUPTED or (failed and SECTIONS[name].ends):
            say(f"{name} failed or was interrupted, so the run ends here. --only names sections to run in spite of it.")
            break
    return found


def interrupt(*_: object) -> None:
    # Another interrupt must not lose the report.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=float, default=1500.0, help="seconds for all sections (default: %(default)g)")
    add("--only", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS), help="run only these sections")
    add("--out", type=Path, help="where to write (default: benchmarks/results/<the GPU's name>)")
    add("--commit", help="the commit that is measured, if this is not a git checkout")
    add("--dry-run", action="store_true", help="run the same code in the interpreter on a CPU, at tiny sizes")
    options = parser.parse_args(given)
    dry, machine = options.dry_run, environment()
    if options.budget <= 0:
        parser.error(f"--budget must be above 0, got {options.budget:g}")
    if dry and options.out and options.out.resolve().is_relative_to(RESULTS.resolve()):
        parser.error(f"--out must lie outside {RESULTS} in a dry run, got {options.out}")
    if not dry and machine["gpu"] is None:
        say("torch finds no NVIDIA GPU here. --dry-run runs the same code in Triton's interpreter.")
        return 2
    machine |= {"commit": options.commit} if options.commit else {}
    slug = "" if dry else re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if dry else RESULTS / slug)
    out.mkdir(parents=True, exist_ok=True)
    # A time limit sends SIGTERM; treat it as an interrupt. A shell starts background processes with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    rows = run([name for name in SECTIONS if name in options.only], out, options.budget, machine, dry)
    page = report.page(pd.DataFrame(rows), machine, dry)
    print(page, f"Files in {out}", sep="\n", flush=True)
    write_text(out / "summary.md", page)
    if rows[-1]["status"] == INTERRUPTED:
        return 130
    return int(any(row["status"] == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
