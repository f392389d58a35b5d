"""Plant faults in a copy of the package, one at a time, and see that tests notice each.

    python -m tests.mutants [ID or part of an ID ...]

``planted.txt`` has the faults: a line with an ID, a file of the package and what pytest runs; the
text, its lines marked "-"; and what takes its place, marked "+". "(2)" behind the file means the
text's second occurrence; otherwise it has one alone. Exit status 1: a fault went unnoticed, or the
tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).with_name("planted.txt")
COPIED = (
    "stablelora_kernels",
    "tests",
    "benchmarks",
    "examples",
    "docs",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
)
# A fault may also make a loop endless.
SECONDS = 600


class Fault(NamedTuple):
    id: str
    file: str
    occurrence: int | None
    tests: str
    old: str
    new: str


def read(text: str) -> Iterator[Fault]:
    """The faults of ``planted.txt``, which blank lines keep apart."""
    for block in text.strip().split("\n\n"):
        head, *changes = (line for line in block.splitlines() if not line.startswith("#"))
        id, file, tests = head.split(maxsplit=2)
        occurrence = int(file[-2]) if file.endswith(")") else None
        sides = ["\n".join(line[1:] for line in changes if line[0] == sign) for sign in "-+"]
        yield Fault(id, file.partition("(")[0], occurrence, tests, *sides)


def planted(source: str, fault: Fault) -> str:
    """The source of a file with the fault in it."""
    parts = source.split(fault.old)
    if fault.occurrence is None and len(parts) != 2:
        raise SystemExit(
            f"{fault.id}: {fault.file} must have its text once, got {len(parts) - 1} times"
        )
    at = fault.occurrence or 1
    if at >= len(parts):
        raise SystemExit(f"{fault.id}: {fault.file} has its text {len(parts) - 1} times, not {at}")
    return fault.old.join(parts[:at]) + fault.new + fault.old.join(parts[at:])


def run(tree: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *shlex.split(tests),
    ]
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    return subprocess.run(
        command,
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def verdict(tree: Path, fault: Fault) -> str:
    """Which test noticed the fault, or how none did."""
    path = tree / "stablelora_kernels" / fault.file
    source = path.read_text(encoding="utf-8")
    path.write_text(planted(source, fault), encoding="utf-8")
    try:
        done = run(tree, fault.tests)
    except subprocess.TimeoutExpired:
        return "noticed: the tests did not end"
    finally:
        path.write_text(source, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # pytest's own statuses from 2 on mean that it did not run; a signal's are negative, and a crash
    # is noticed.
    if done.returncode in (1, *range(-64, 0)):
        return f"noticed: {failed[0] if failed else f'exit status {done.returncode}'}"
    return "UNNOTICED" if done.returncode == 0 else f"NOT RUN: {(done.stdout + done.stderr)[-400:]}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "ids", nargs="*", metavar="ID", help="only faults whose IDs begin with one of these"
    )
    args = parser.parse_args(argv)
    faults = [
        f
        for f in read(PLANTED.read_text(encoding="utf-8"))
        if f.id.startswith(tuple(args.ids) or "")
    ]
    if not faults:
        parser.error(f"ID must begin one of {PLANTED.name}'s, got {' '.join(args.ids)}")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        for fault in faults:
            planted((tree / "stablelora_kernels" / fault.file).read_text(encoding="utf-8"), fault)
        for tests in tqdm(sorted({fault.tests for fault in faults}), desc="without faults"):
            if (done := run(tree, tests)).returncode:
                tqdm.write(
                    f"FAILS WITHOUT A FAULT: {tests}\n{done.stdout[-2000:]}", file=sys.stdout
                )
                bad += 1
        for fault in tqdm(faults, desc="faults"):
            found = verdict(tree, fault)
            tqdm.write(f"{fault.id:6} {found}", file=sys.stdout)
            bad += not found.startswith("noticed")
    print(
        f"{len(faults)} faults, {bad} of them or of their tests are wrong"
        if bad
        else f"{len(faults)} faults noticed"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
