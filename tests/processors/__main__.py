"""Run the tests of the CPU's operators as other processors would.

    python -m tests.processors                         tests/ops, tests/nn and tests/integrations as every kind: hours
    python -m tests.processors --kind avx2 --kind amd  as these kinds only
    python -m tests.processors --list                  the kinds
    python -m tests.processors --kind avx2 --sample 40 tests/ops/test_ops_oracle.py
    python -m tests.processors -- -x -k float16        pytest gets what is behind --

Each kind has a process of its own, one after the other, because libraries choose their instructions
once, when they are loaded. The process first checks that it is of its kind. The last lines say of
each kind how many tests passed and failed. Exit status 1: a test failed, or a kind ran none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.processors.kinds import KINDS, VARIABLES, Kind

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/ops", "tests/nn", "tests/integrations")


class Result(NamedTuple):
    """How one kind's run ended. ``status`` is pytest's exit status; a run that broke has no
    ``outcomes``.
    """

    kind: Kind
    status: int
    seconds: float
    outcomes: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items())
        verdict = "" if self.status == 0 else f"; exit status {self.status}"
        return f"{self.kind.name:12} {counts or 'no result'}, {self.seconds:.0f} s{verdict}"


def environment(kind: Kind, directory: Path) -> dict[str, str]:
    """This process's environment without GPUs, and of libraries' instructions and threads only the
    kind's settings.

    Inductor's cache would give a kind the code that it made for another one's instructions: the
    kind's is in ``directory``. PyTorch's threads sleep while they wait: on a busy machine, they
    would take the cores from those that they wait for.
    """
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    more = {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor")}
    return {"OMP_WAIT_POLICY": "passive"} | kept | kind.variables() | more


def run(kind: Kind, arguments: Sequence[str]) -> Result:
    """Run pytest with ``arguments`` in a process of ``kind``, which prints where this one prints."""
    with tempfile.TemporaryDirectory(prefix="processors-") as name:
        directory = Path(name)
        outcomes = directory / "outcomes.json"
        plugin = [
            "-p",
            "tests.processors.plugin",
            "--processor",
            kind.name,
            "--outcomes",
            str(outcomes),
        ]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, *arguments]
        started = time.perf_counter()
        status = subprocess.run(command, cwd=ROOT, env=environment(kind, directory)).returncode
        seconds = time.perf_counter() - started
        counts = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else {}
    return Result(kind, status, seconds, counts)


def main(argv: Sequence[str] | None = None) -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tests.processors",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="only this kind; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the kinds, and stop")
    parser.add_argument("--sample", type=int, metavar="N", help="N tests, evenly spread over all")
    parser.add_argument(
        "tests", nargs="*", metavar="TEST", help=f"files or folders of tests ({', '.join(TESTS)})"
    )
    words = list(sys.argv[1:] if argv is None else argv)
    separator = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:separator])
    if args.list:
        for kind in KINDS.values():
            variables = " ".join(f"{name}={value}" for name, value in kind.variables().items())
            print(f"{kind.name:12} {kind.description}. {variables}".rstrip())
        return 0
    sample = [] if args.sample is None else ["--sample", str(args.sample)]
    arguments = [*(args.tests or TESTS), *sample, *words[separator + 1 :]]
    results = []
    for name in args.kind or KINDS:
        print(f"== {name}: {KINDS[name].description}", flush=True)
        results.append(run(KINDS[name], arguments))
    print("\n".join(map(str, results)))
    return int(any(result.status for result in results))


if __name__ == "__main__":
    sys.exit(main())
