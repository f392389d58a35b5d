"""Runs the tests that are nearest to a file of the package: first the modules of its name, then those
that must notice the faults planted in it, then its folder's. It stops at the first failure.

    python -m tests.near stablelora_kernels/ops/lora_mlp/torch.py
    python -m tests.near stablelora_kernels/quantized.py --nearest   # without the folder
    python -m tests.near stablelora_kernels/quantized.py -k nf4      # other options are pytest's

Exit status: 0 all passed; 1 a test failed; 2 a bad argument.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from stablelora_kernels.utils.threads import ONE_THREAD
from tests.mutants.__main__ import PLANTED, read

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stablelora_kernels"
# A folder that is an op has files of these names.
OF_AN_OP = ("__init__", "autograd", "call", "torch", "triton", "proof")


class Step(NamedTuple):
    """Tests, as pytest's arguments, and what they are."""

    words: str
    arguments: list[str]


def steps_of(path: Path) -> list[Step]:
    """The tests near a file of the package, the nearest first."""
    inside = path.relative_to(PACKAGE)
    stem = path.parent.name if path.stem in OF_AN_OP else path.stem
    modules = sorted(
        str(test.relative_to(ROOT))
        for test in (ROOT / "tests").rglob("test_*.py")
        if test.stem == f"test_{stem}" or test.stem.startswith(f"test_{stem}_")
    )
    steps = [Step(f"the modules of the name {stem}", modules)] if modules else []
    planted = read(PLANTED.read_text(encoding="utf-8"))
    faults = [fault for fault in planted if fault.file == str(inside)]
    for tests in dict.fromkeys(fault.tests for fault in faults):
        ids = ", ".join(fault.id for fault in faults if fault.tests == tests)
        steps.append(Step(f"what must notice {ids}", shlex.split(tests)))
    folder = ROOT / "tests" / inside.parts[0]
    if folder.is_dir():
        steps.append(Step("the folder", [str(folder.relative_to(ROOT))]))
    return steps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.near",
        description="Runs the tests that are nearest to a file, and stops at the first failure.",
    )
    parser.add_argument("file", help="a file of stablelora_kernels/")
    parser.add_argument("--nearest", action="store_true", help="leave out the folder's tests")
    args, options = parser.parse_known_args(argv)
    path = Path(args.file).resolve()
    if not path.is_file() or PACKAGE not in path.parents:
        parser.error(f"FILE must be a file of {PACKAGE}, got {args.file}")
    steps = [step for step in steps_of(path) if not (args.nearest and step.words == "the folder")]
    if not steps:
        parser.error(f"FILE must have tests near it, got {args.file}, which has none")
    for step in steps:
        print(f"{step.words}: pytest {shlex.join(step.arguments)}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", *step.arguments, *options]
        status = subprocess.run(command, cwd=ROOT, env=ONE_THREAD | os.environ).returncode
        # 5: the options have left no test of this step.
        if status not in (0, 5):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
