"""What a redesign must leave as it is, compared between the working tree and a commit, on this machine.

    python -m tests.goldens COMMIT [--only NAME ...]

- api: public names, their signatures, and the templates of all messages;
- launches: of every launch of the compile report, per GPU, its grid, its options and its run-time arguments in any order;
- ops: digests of the results of random calls of every op, on PyTorch's path and in Triton's interpreter;
- optimizer: digests of parameters and state after each of 20 steps, for each row of ``tests/optim/options.py``, by each path.

Each side runs its own tests' helpers in processes of its own. A call that only one side makes is named, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.goldens import parts

ROOT = Path(__file__).resolve().parents[2]
# By name, whether the interpreter runs it.
PARTS: dict[str, tuple[Callable[[], dict[str, object]], bool]] = {
    "api": (parts.api, False),
    "launches": (parts.launches, False),
    "ops": (parts.ops, True),
    "optimizer": (parts.optimizer, True),
}
SHOWN = 20


def record(tree: Path, name: str) -> dict[str, object]:
    """What ``name`` finds in ``tree``, by a process there."""
    code = f"from tests.goldens.__main__ import PARTS; import json; print(json.dumps(PARTS[{name!r}][0]()))"
    # Sets of names are drawn and printed in one order.
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment.pop("TRITON_INTERPRET", None)
    if PARTS[name][1]:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} in {tree}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    found = []
    for key in dict.fromkeys([*before, *now]):
        if key not in now or key not in before:
            found.append(f"{'gone' if key not in now else 'new'}: {key}")
        elif before[key] != now[key]:
            found.append(f"changed: {key}\n    {before[key]}\n    {now[key]}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__.split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="NAME")
    args = parser.parse_args(argv)
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), args.commit], cwd=ROOT, check=True)
        try:
            for name in args.only:
                before, now = record(tree, name), record(ROOT, name)
                found = differences(before, now)
                bad |= bool(found)
                print(f"{name}: {len(before)} before, {len(now)} now, {len(found)} differ", flush=True)
                print("".join(f"  {each}\n" for each in found[:SHOWN]), end="", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
