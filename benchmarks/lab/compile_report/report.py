"""Machine code of every kernel and config that dispatch can pick, compiled for GPUs that need not
be present.

    python -m benchmarks.lab.compile_report [--arch sm_90 ...] [--kernel lora_down] [--csv FILE]
    python -m benchmarks.lab.compile_report --check     compare with the committed report; exit with 1 if something got worse
    python -m benchmarks.lab.compile_report --write     renew the rows of the committed report
        --quick or --missing: only the rows that it lacks and those whose code has changed since
    python -m benchmarks.lab.compile_report --hazards   print only faults, under any Triton; exit with 1 if there is one

The committed report is benchmarks/results/compile_report.csv. Its rows are from one release of
Triton, and are compared only under that. Columns: registers a thread; spills, bytes of local memory
a thread; bytes of shared memory a program; the matrix instructions; serialized, why ptxas lets each
of Hopper's wait for the last, or empty; the mean bits of a load and of a store, see
``machine_code.read``; occupancy, the share of a processor's warps that are resident; a digest of
the intermediate code. Rows with a hazard or without code are listed at the end, and the exit status
is 1. A row takes 1 to 5 s of one core, 0.5 s once Triton has it in its cache; its digest takes 0.15
s, once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import triton

from benchmarks.common import tritons
from benchmarks.common.assets import cache_dir
from benchmarks.common.tables import RESULTS, write_text
from benchmarks.lab.compile_report import machine_code
from benchmarks.lab.compile_report.launches import every_launch
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES

REPORT = RESULTS / "compile_report.csv"
# Without sm_86, whose 212 rows equalled sm_89's (--arch sm_86 --csv FILE).
ARCHS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
# The Triton release of the committed report.
TRITON = "3.9"
LABEL = ["kernel", "variant", "arch", "dtype"]
FIGURES = [
    "registers",
    "spills",
    "shared_bytes",
    "mma",
    "serialized",
    "load_bits",
    "store_bits",
    "occupancy",
]
COLUMNS = [*LABEL, *FIGURES, "code"]
# More registers than this are worse even at the same occupancy: it is the step they are given out
# in, and compilers' noise.
REGISTERS = 8
# A mean width below this share of the old one is worse; a tile that comes in narrower pieces lowers
# it by more.
NARROWER = 0.97

Label = tuple[str, ...]


@cache
def jobs(arch: str) -> dict[Label, Any]:
    """The launch of each row. If several pieces of code share a variant, the arguments that differ
    follow its name.
    """
    found: dict[tuple[str, str, str], dict[tuple[str, ...], Any]] = defaultdict(dict)
    for dtype, launch in every_launch(DEVICES[arch]):
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        kernel = "stable_adamw_square_sums" if kernel == "square_sums" else kernel
        found[kernel, launch.variant, dtype].setdefault(machine_code.words(launch, arch), launch)
    result = {}
    for (kernel, variant, dtype), alike in found.items():
        shared = set.intersection(*map(set, alike))
        for words, launch in alike.items():
            result[
                kernel,
                " ".join([variant, *(word for word in words if word not in shared)]),
                arch,
                dtype,
            ] = launch
    return result


def codes_of(labels: Sequence[Label]) -> dict[Label, str]:
    """Digests of the rows' intermediate code. The cache directory has them by digests of the
    source, which take no time.
    """
    path = cache_dir() / "compile_report.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found = {}
    for label in labels:
        launch, arch = jobs(label[2])[label], label[2]
        source = machine_code.source_digest(launch, arch)
        if source not in known:
            known[source] = machine_code.code_digest(launch, arch)[:7]
        found[label] = known[source]
    write_text(path, json.dumps(known))
    return found


def make_row(label: Label) -> dict[str, Any] | str:
    """Compile one launch and read what came out, or say in words what is wrong."""
    launch, arch = jobs(label[2])[label], label[2]
    try:
        compiled = machine_code.compile_launch(launch, arch)
        facts, metadata = machine_code.read(compiled), compiled.metadata
    except machine_code.HazardError as error:
        return str(error)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"not compiled: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    columns = getattr(metadata, "tmem_size", 0) or 0
    facts["occupancy"] = occupancy(
        arch, facts["registers"], metadata.shared, metadata.num_warps, columns
    )
    memory = {"shared_bytes": metadata.shared, "shared_limit": DEVICES[arch].shared_limit}
    return {**dict(zip(LABEL, label, strict=True)), **facts, **memory}


def make_rows(labels: Sequence[Label]) -> Iterator[tuple[Label, dict[str, Any] | str]]:
    """Each label and what :func:`make_row` returns for it, with the progress on stderr."""
    # The compiler runs without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (label, row) in enumerate(
            zip(labels, pool.map(make_row, labels), strict=True), start=1
        ):
            yield label, row
            if number % 50 == 0 or number == len(labels):
                print(f"{number} of {len(labels)}", file=sys.stderr)


def print_faults(labels: Sequence[Label]) -> int:
    """Print each row with a hazard, without code or with serialized WGMMAs; return the number of
    these rows.
    """
    faulty = 0
    for label, row in make_rows(labels):
        fault = (
            row
            if isinstance(row, str)
            else row["serialized"] and f"serialized: {row['serialized']}"
        )
        if fault:
            faulty += 1
            print(f"{' | '.join(label)}: {fault}", flush=True)
    print(f"Triton {triton.__version__}: {faulty} of {len(labels)} rows have a fault")
    return faulty


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """With the GPU's limit, which is not recorded."""
    return pd.DataFrame(rows, columns=[*COLUMNS, "shared_limit"])


def compare(old: pd.DataFrame, new: pd.DataFrame, labels: Sequence[Label]) -> list[str]:
    """A line for each figure of ``new`` that is worse than in ``old``, and for each of ``labels``
    that one side lacks.

    ``labels`` are all that there are now, of which ``new`` may be some.
    """
    before, now = dict.fromkeys(old.set_index(LABEL).index), dict.fromkeys(labels)
    lines = [f"{' | '.join(label)}: vanished" for label in before if label not in now]
    lines += [
        f"{' | '.join(label)}: not in the committed report" for label in now if label not in before
    ]
    both = new.merge(old, on=LABEL, suffixes=("", "_old"))
    worse = {
        "registers": both.registers > both.registers_old + REGISTERS,
        "spills": both.spills > both.spills_old,
        "shared_bytes": both.shared_bytes > both.shared_limit,
        "mma": [
            not {*a.split()} <= {*b.split()} for a, b in zip(both.mma_old, both.mma, strict=True)
        ],
        "serialized": (both.serialized != "") & (both.serialized_old == ""),
        "load_bits": both.load_bits < NARROWER * both.load_bits_old,
        "store_bits": both.store_bits < NARROWER * both.store_bits_old,
        "occupancy": both.occupancy < both.occupancy_old,
    }
    for column, bad in worse.items():
        for *label, was, found in both.loc[bad, [*LABEL, f"{column}_old", column]].itertuples(
            index=False
        ):
            lines.append(f"{' | '.join(label)}: {column} {was or 'none'} -> {found or 'none'}")
    return lines


def read_report() -> pd.DataFrame:
    """The committed rows."""
    return pd.read_csv(REPORT, keep_default_na=False, dtype={"code": str})


def recorded(old: pd.DataFrame) -> dict[Label, str]:
    """The digest of each row's code."""
    return old.set_index(LABEL)["code"].to_dict()


def write_report(old: pd.DataFrame, new: pd.DataFrame) -> None:
    """``new``, and the rows of ``old`` that it does not replace, without those that vanished."""
    now = pd.DataFrame([label for arch in ARCHS for label in jobs(arch)], columns=LABEL)
    found = now.merge(pd.concat([new, old]).drop_duplicates(LABEL), on=LABEL)
    write_text(REPORT, found[COLUMNS].to_csv(index=False, lineterminator="\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lab.compile_report", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--arch", action="append", choices=DEVICES, help="only this GPU; may be repeated")
    add("--kernel", default="", metavar="PREFIX", help="only kernels whose names begin so")
    add("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    add(
        "--check",
        action="store_true",
        help="compare with the committed report; exit with 1 if something got worse",
    )
    add("--write", action="store_true", help="renew the rows of the committed report")
    add(
        "--quick",
        "--missing",
        action="store_true",
        help="only rows that it lacks or whose code has changed",
    )
    add(
        "--hazards",
        action="store_true",
        help="print only faults, under any Triton; exit with 1 if there is one",
    )
    tritons.add_option(parser)
    args = parser.parse_args(argv)
    tritons.run_again("benchmarks.lab.compile_report", args.triton, argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error(
            "TRITON_INTERPRET is set: Triton would interpret the kernels, not compile them; unset it"
        )
    if args.hazards and (args.write or args.check or args.quick or args.csv):
        parser.error("--hazards compares with no report and writes none")
    if (args.write or args.check) and not triton.__version__.startswith(f"{TRITON}."):
        parser.error(f"the committed report is from Triton {TRITON}, this is {triton.__version__}")
    archs = args.arch or ARCHS
    labels = [label for arch in archs for label in jobs(arch) if label[0].startswith(args.kernel)]
    if args.hazards:
        return 1 if print_faults(labels) else 0
    old, codes = read_report(), codes_of(labels)
    known = recorded(old) if args.quick else {}
    todo = [label for label in labels if codes[label] != known.get(label)]
    rows, problems = [], []
    for label, row in make_rows(todo):
        if isinstance(row, str):
            problems.append(f"{' | '.join(label)}: {row}")
        else:
            rows.append(row | {"code": codes[label]})
    new = table(rows)
    print(new.to_string(index=False) if rows else "no row to compile")
    if args.csv:
        write_text(args.csv, new.to_csv(index=False, lineterminator="\n"))
    if args.write and not problems:
        write_report(old, new)
    if args.check:
        chosen = old["arch"].isin(archs) & old["kernel"].str.startswith(args.kernel)
        problems += compare(old[chosen], new, labels)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0
