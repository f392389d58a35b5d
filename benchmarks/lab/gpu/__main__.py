"""Try this library on an NVIDIA GPU, one step after another, then measure it against rivals.

    python -m benchmarks.lab.gpu [--budget 1500] [--only SECTION ...] [--out DIRECTORY]
    python -m benchmarks.lab.gpu --dry-run

First compute-sanitizer watches the first tests. Then ``bringup`` runs tests by one worker, in an order in which each depends on
those before it. A failure in either ends the run, with a verdict. Then come the other tests, by several workers, and times.

Each section is a process of its own, so a crash or a hang loses only that section. Rows go to CSV files as they come; an
interrupt keeps them, and the summary lists what was not reached. ``--dry-run`` executes the same code in Triton's interpreter on
a CPU at tiny sizes: it writes nothing into the repository's results, and measures nothing. The exit status is 1 if a check
failed, 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from benchmarks.common.tables import RESULTS, read_csv
from benchmarks.lab.gpu import report
from benchmarks.lab.gpu.report import Outcome
from benchmarks.lab.gpu.section import BEGUN, FAILED, NOTE_LENGTH, ROOT, Row


class Section(NamedTuple):
    """A module of this package, and the part of it that runs."""

    module: str
    # Its share of the time.
    seconds: float
    part: str = ""
    # Whether a failure ends the run: what follows would only repeat it, or hang.
    ends: bool = False


# In the order in which they run. Regret times what is most in doubt, and begins with chained launches against pairs.
SECTIONS = {
    "memcheck": Section("sanitizers", 150, "memcheck", ends=True),
    "synccheck": Section("sanitizers", 70, "synccheck", ends=True),
    "initcheck": Section("sanitizers", 70, "initcheck", ends=True),
    "racecheck": Section("sanitizers", 110, "racecheck", ends=True),
    "bringup": Section("correctness", 300, "bringup", ends=True),
    "correctness": Section("correctness", 220),
    "regret": Section("regret", 170),
    "mlp": Section("mlp", 80),
    "captured": Section("captured", 50),
    "layer": Section("layer", 150),
    "step": Section("step", 50),
    "profile": Section("profile", 80),
}
# torch's import, the GPU's start and two short measurements.
MACHINE_SECONDS = 60.0
# A section begins no unit that would end late. One that still runs this long after its time hangs, or is far too slow.
GRACE = 20.0


def environment(dry: bool) -> dict[str, str]:
    """Return the environment of our processes: of our own settings the watchdog's alone, and in a dry run without a GPU."""
    ours = ("STABLELORA_", "SLK_", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) or k == "SLK_GPU_WATCHDOG"}
    return kept | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else kept


def machine(dry: bool) -> Row:
    """Describe the machine, in a process of its own: this one must not occupy the GPU.

    Raises:
        RuntimeError: the process failed, or ran out of time.
    """
    command = [sys.executable, "-m", "benchmarks.lab.gpu.device"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(dry), capture_output=True, text=True, timeout=MACHINE_SECONDS
        )
        done.check_returncode()
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the GPU did not answer within {MACHINE_SECONDS:g} s") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"could not describe the machine: {error.stderr.strip()[-NOTE_LENGTH:]}") from error
    return json.loads(done.stdout.strip().splitlines()[-1])


def deadlines(sections: Sequence[str], budget: float) -> dict[str, float]:
    """Return the seconds from the start by which each section ends: its share, and what earlier sections left over."""
    total, passed, ends = sum(SECTIONS[name].seconds for name in sections), 0.0, {}
    for name in sections:
        passed += SECTIONS[name].seconds
        ends[name] = budget * passed / total
    return ends


def number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read(path: Path) -> list[Row]:
    """Return the rows of a section's file, numbers as numbers and without empty cells."""
    rows = read_csv(path) if path.exists() else []
    return [{key: number(value) for key, value in row.items() if value} for row in rows]


def run_section(name: str, path: Path, seconds: float, dry: bool) -> str:
    """Run a section, which writes its rows to ``path``. Return why it ended, if by a crash or a hang, otherwise nothing."""
    until = f"{time.monotonic() + seconds:.3f}"
    section = SECTIONS[name]
    command = [sys.executable, "-m", f"benchmarks.lab.gpu.{section.module}", str(path.resolve()), "--until", until]
    command += ["--part", section.part]
    with tempfile.TemporaryFile() as errors:
        # Progress goes to the terminal. The session is for killpg.
        process = subprocess.Popen(
            [*command, "--dry-run"] if dry else command,
            cwd=ROOT, env=environment(dry), stdin=subprocess.DEVNULL, stdout=2, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds + GRACE)
            problem = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped {GRACE:g} s after its time"
        finally:
            # The section's own processes (pytest's workers, ncu) must not outlive it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - NOTE_LENGTH))
        last_words = errors.read().decode(errors="replace").strip()
    return f"the process ended: {problem}\n{last_words}" if problem else ""


def failed(outcome: Outcome) -> bool:
    return any(row.get("status") == FAILED for row in outcome.rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(sections: Sequence[str], out: Path, budget: float, begun: float, dry: bool) -> tuple[dict[str, Outcome], bool]:
    """Run the sections. Return what each has, and whether an interrupt came."""
    outcomes = {name: Outcome([], 0.0, "not reached") for name in sections}
    paths = {name: out / f"{name}.csv" for name in sections}
    for path in paths.values():
        # An earlier run's rows must not pass for this one's.
        path.unlink(missing_ok=True)
    try:
        for name, end in deadlines(sections, budget).items():
            start, problem = time.monotonic(), "interrupted"
            seconds = begun + end - start
            if seconds <= 0:
                say(f"{name}: not reached, time is up")
                continue
            say(f"{name}: begins, {seconds:.0f} s")
            try:
                problem = run_section(name, paths[name], seconds, dry)
            finally:
                outcomes[name] = Outcome(read(paths[name]), time.monotonic() - start, problem)
            for row in outcomes[name].rows:
                if row.get("status") == BEGUN:
                    row |= {"status": FAILED, "note": "it began and did not end: it hangs, or its process crashed"}
            if problem:
                outcomes[name].rows.append({"what": "the section's process", "status": FAILED, "note": problem})
            if SECTIONS[name].ends and failed(outcomes[name]):
                say(f"{name} failed, so the run ends here. --only names sections to run in spite of it.")
                break
    except KeyboardInterrupt:
        say("interrupted: the rows so far are kept")
        return outcomes, True
    return outcomes, False


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--budget", type=float, default=1500.0, help="seconds for all sections (default: %(default)g)")
    found.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="run only these sections")
    found.add_argument("--out", type=Path, help="where to write (default: benchmarks/results/<the GPU's name>)")
    found.add_argument("--commit", help="the commit that is measured, if this is not a git checkout")
    found.add_argument(
        "--dry-run", action="store_true", help="run the same code in the interpreter on a CPU, at tiny sizes"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(given)
    if options.budget <= 0:
        parser().error(f"--budget must be above 0, got {options.budget:g}")
    dry, out = options.dry_run, options.out
    if dry and out and out.resolve().is_relative_to(RESULTS.resolve()):
        parser().error(f"--out must lie outside {RESULTS} in a dry run, got {out}")
    # A time limit sends SIGTERM; treat it as an interrupt. A shell starts background processes with SIGINT ignored.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, interrupt)
    try:
        found = machine(dry)
    except KeyboardInterrupt:
        say("interrupted before anything was measured")
        return 130
    except RuntimeError as error:
        say(str(error))
        return 2
    if not dry and found["gpu"] is None:
        say("torch finds no NVIDIA GPU here. --dry-run runs the same code in Triton's interpreter.")
        return 2
    if options.commit:
        found["commit"] = options.commit
    sections = [name for name in SECTIONS if options.only is None or name in options.only]
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if dry else RESULTS / slug(found["gpu"])
    out.mkdir(parents=True, exist_ok=True)
    outcomes, interrupted = run(sections, out, options.budget, begun, dry)
    # The report takes seconds. Another interrupt must not lose it.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    summary = report.Summary(outcomes, found, dry, interrupted)
    command, seconds = "python -m benchmarks.lab.gpu " + " ".join(given), time.monotonic() - begun
    (out / "summary.md").write_text(summary.page(command, seconds), encoding="utf-8")
    print("\n".join([*summary.printed(), f"{summary.headline()} {seconds:.0f} s, files in {out}"]), flush=True)
    if interrupted:
        return 130
    return int(any(map(failed, outcomes.values())))


if __name__ == "__main__":
    sys.exit(main())
