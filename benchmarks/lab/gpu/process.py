"""Processes that run sections, seen from the command: started, read, restarted behind a crash, stopped when time is up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lab.gpu.section import FAILED, NOTE_LENGTH, Row

ROOT = Path(__file__).resolve().parents[3]
# What a process may take beyond its time before it is killed: the unit in hand, and a crash's cleaning up.
GRACE = 8.0
# A section whose process dies this often has no hope.
MOST_CRASHES = 5


def environment(dry: bool, section: str = "") -> dict[str, str]:
    """The processes' environment variables: nothing of ours is forced from outside, and a dry run sees no GPU."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("STABLELORA_") and name != "TRITON_INTERPRET"
    }
    if section == "correctness":
        # Asked for by deterministic algorithms, which fill fresh memory with NaN.
        kept.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if dry:
        kept |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept


class Child:
    """One process for a section, or for a part of it, which begins nothing that would not end by ``until`` (monotonic)."""

    def __init__(self, section: str, part: tuple[int, int], skip: int, until: float, dry: bool) -> None:
        self.section, self.part, self.dry = section, part, dry
        self.unit: Row | None = None
        self.heard = time.monotonic()
        self.ended = False
        self.died: float | None = None
        self.messages: queue.Queue[Row | None] = queue.Queue()
        # Read after the process has ended; it goes with this object.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        command = [
            sys.executable,
            "-m",
            "benchmarks.lab.gpu",
            "--child",
            section,
            "--part",
            f"{part[0]}/{part[1]}",
        ]
        command += ["--skip", str(skip), "--until", f"{until:.3f}", "--pipe", str(write)]
        self.process = subprocess.Popen(
            [*command, "--dry-run"] if dry else command,
            cwd=ROOT,
            env=environment(dry, section),
            pass_fds=(write,),
            stdin=subprocess.DEVNULL,
            stdout=self.errors,
            stderr=subprocess.STDOUT,
            # An interrupt from a terminal is for the command, which then stops its processes.
            start_new_session=True,
        )
        os.close(write)
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe) as file:
            for line in file:
                try:
                    self.messages.put(json.loads(line))
                except json.JSONDecodeError:
                    # The last line of a process that was killed.
                    break
        self.messages.put(None)

    def silent(self) -> bool:
        return self.unit is not None and time.monotonic() - self.heard > self.unit["limit"]

    def stop(self) -> None:
        """Kill the process and those that it started, which may outlive it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def gone(self) -> bool:
        """Whether the process has ended and its last messages have had time to come: its own children may hold the pipe."""
        if self.process.poll() is None:
            return False
        self.died = self.died or time.monotonic()
        return time.monotonic() - self.died > 1.0

    def last_words(self) -> str:
        self.errors.seek(0, 2)
        self.errors.seek(max(0, self.errors.tell() - NOTE_LENGTH))
        return self.errors.read().decode(errors="replace").strip()


class Progress:
    """How far a section came."""

    def __init__(self) -> None:
        self.planned = self.done = self.late = 0
        self.seconds = 0.0
        # Why the section ended before its last unit, other than by time.
        self.problem = ""
        self.begun = False


def run_section(
    section: str,
    seconds: float,
    workers: int,
    dry: bool,
    take: Callable[[Row], None],
    say: Callable[[str], None],
    fatal_key: Row,
    progress: Progress,
) -> None:
    """Run a section in ``workers`` processes for at most ``seconds``; every row goes to ``take`` as it comes.

    A process that dies is started again behind the unit it died in, which gets a failed row with the end of what it said.
    ``progress`` says how far it came, whatever ends it.
    """
    begun = time.monotonic()
    progress.begun = True
    until = begun + seconds
    crashes = 0

    def start(part: int, skip: int) -> Child:
        return Child(section, (part, workers), skip, until, dry)

    children: list[Child] = []
    plans: dict[int, int] = {}
    finished: dict[int, int] = dict.fromkeys(range(workers), 0)
    try:
        children += [start(part, 0) for part in range(workers)]
        while children:
            time.sleep(0.02)
            for child in list(children):
                part = child.part[0]
                for message in _pending(child):
                    if message is None:
                        child.process.wait()
                        child.ended = True
                    elif "plan" in message:
                        plans[part] = message["plan"]
                    elif "start" in message:
                        child.unit = message
                    elif "row" in message:
                        take(message["row"])
                    elif "done" in message:
                        finished[part] += 1
                        child.unit = None
                        total = sum(plans.values())
                        say(
                            f"{section} {sum(finished.values())} of {total}, {max(0.0, until - time.monotonic()):.0f} s left"
                        )
                    elif "late" in message:
                        progress.late += 1
                    elif "end" in message:
                        child.unit = None
                child.ended = child.ended or child.gone()
                late = time.monotonic() > until + GRACE
                hangs = child.silent()
                if not child.ended and (late or hangs):
                    child.stop()
                    child.ended = True
                    for message in _pending(child):
                        if message and "row" in message:
                            take(message["row"])
                if not child.ended:
                    continue
                children.remove(child)
                child.stop()
                if late and child.process.returncode == -signal.SIGKILL:
                    progress.problem = progress.problem or "stopped: time was up"
                elif child.process.returncode != 0:
                    crashes += 1
                    unit = child.unit
                    why = "said nothing for too long" if hangs else f"exit status {child.process.returncode}"
                    note = f"the process ended: {why}\n{child.last_words()}"
                    take({**(unit["key"] if unit else fatal_key), "status": FAILED, "note": note})
                    if unit and crashes <= MOST_CRASHES:
                        finished[part] += 1
                        children.append(start(part, unit["start"] + 1))
                    else:
                        progress.problem = note
    finally:
        progress.planned, progress.done = sum(plans.values()), sum(finished.values())
        for child in children:
            child.stop()
        progress.seconds = time.monotonic() - begun


def _pending(child: Child) -> list[Any]:
    """The messages that have come and were not read."""
    messages = []
    while True:
        try:
            messages.append(child.messages.get_nowait())
        except queue.Empty:
            break
    if messages:
        child.heard = time.monotonic()
    return messages


def machine(dry: bool, seconds: float) -> Row:
    """What the machine is, found in a process of its own.

    Raises:
        RuntimeError: that process failed.
    """
    until = time.monotonic() + seconds
    child = Child("machine", (0, 1), 0, until, dry)
    found: Row = {}
    try:
        while time.monotonic() < until:
            message = child.messages.get(timeout=max(0.1, until - time.monotonic()))
            if message is None or "end" in message:
                break
            found |= message.get("row", {})
        child.process.wait(timeout=10)
    except (queue.Empty, subprocess.TimeoutExpired):
        child.stop()
    finally:
        child.stop()
    if not found:
        raise RuntimeError(f"the device could not be looked at: {child.last_words()}")
    return found
