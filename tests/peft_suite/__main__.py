"""PEFT's own test suite as the judge of ``accelerate_peft``: its LoRA tests without acceleration and with it.

    python -m tests.peft_suite            every file below; writes benchmarks/results/peft_suite.csv
    python -m tests.peft_suite --quick    custom models and the low-level API, under 3 minutes; writes nothing
    python -m tests.peft_suite --dry      say what would be run

The tests come from the installed PEFT's source distribution on PyPI, which is downloaded once, checked against
its SHA-256 and unpacked into a temporary directory. Both runs go on side by side, one thread each. In the second, the
harness (``plugin.py``) calls ``accelerate_peft`` on every model that PEFT has put an adapter into; the tests do not
know. A test that asks the hub for a tiny model gets one of the same architecture (``hub.py``);
nothing is downloaded. Tests that need more (tokenizers, data, trained adapters) fail in both runs and are counted.
The exit status is 1 if a test's outcome differs between them. It takes the ``peft-suite`` extra.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pandas as pd

from benchmarks.common.assets import Asset, AssetError, fetch
from benchmarks.common.tables import write_text
from tests.peft_suite.judge import (
    FILES,
    LORA,
    NEEDED,
    QUICK,
    RESULTS,
    SHA256,
    command,
    differences,
    parse,
    rows,
    run_both,
    unpack,
)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    files = args.files or (QUICK if args.quick else FILES)
    if args.dry:
        print(" ".join(command(files, args.keyword)))
        return 0
    version = metadata.version("peft")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"PEFT's tests import {', '.join(missing)}: pip install -e '.[peft-suite]'", file=sys.stderr)
        return 2
    if version not in SHA256:
        print(
            f"peft {version} is installed, but the hash of its tests is known for {', '.join(SHA256)}", file=sys.stderr
        )
        return 2
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as scratch:
        directory = args.keep or Path(scratch)
        try:
            unpack(fetch(Asset("peft", version, 1, SHA256[version], sdist=True))[0], directory)
            off, on = run_both(directory, files, args.keyword, args.backend)
        except (AssetError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
    table, found = rows(off["outcomes"], on["outcomes"]), differences(off["outcomes"], on["outcomes"])
    print(
        f"PEFT {version}, backend {args.backend}, {time.perf_counter() - started:.0f} s; counts without/with acceleration"
    )
    for row in table:
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items() if value not in ("0/0", 0)))
    print("with acceleration: " + ", ".join(f"{count} {name}" for name, count in on["counts"].items()))
    print(f"{len(found)} tests differ" + "".join(f"\n  {test}: {before}/{after}" for test, before, after in found))
    if not (args.quick or args.files or args.keyword != LORA or args.backend != "torch"):
        write_text(RESULTS, pd.DataFrame(table).to_csv(index=False, lineterminator="\n"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
