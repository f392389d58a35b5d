"""The rows of the compile report: compile every launch that dispatch can make, read the machine code, compare with before."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import pandas as pd

from benchmarks.common.assets import cache_dir
from benchmarks.common.tables import RESULTS, write_text
from benchmarks.lab.compile_report import machine_code
from benchmarks.lab.compile_report.launches import every_launch
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES

REPORT = RESULTS / "compile_report.csv"
# The Triton release of the committed report.
TRITON = "3.9"
LABEL = ["kernel", "variant", "arch", "dtype"]
COLUMNS = [*LABEL, "registers", "spills", "shared_bytes", "mma", "serialized", "load_bits", "store_bits", "occupancy", "code"]
# More registers than this are worse even at the same occupancy: it is the step they are given out in, and compilers' noise.
REGISTERS = 8
# A mean width below this share of the old one is worse. One more scalar changes it by less, a narrow tile by more.
NARROWER = 0.97

Label = tuple[str, ...]
Row = dict[str, Any]


@cache
def jobs(arch: str) -> dict[Label, Any]:
    """The launch of each row. If several pieces of code share a variant, the arguments that differ follow its name."""
    found: dict[tuple[str, str, str], list[tuple[Any, dict[str, str]]]] = defaultdict(list)
    for dtype, launch in every_launch(DEVICES[arch]):
        name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        name = "stable_adamw_square_sums" if name == "square_sums" else name
        alike, values = found[name, launch.variant, dtype], machine_code.values(launch, arch)
        if values not in (other for _, other in alike):
            alike.append((launch, values))
    result = {}
    for (kernel, variant, dtype), alike in found.items():
        names = {name: None for _, values in alike for name in values}
        telling = [name for name in names if len({values.get(name) for _, values in alike}) > 1]
        for launch, values in alike:
            words = [variant, *(values[name] for name in telling if name in values)]
            result[kernel, " ".join(words), arch, dtype] = launch
    return result


class Codes:
    """Digests of intermediate code, which take 0.15 s each, by those of its source, which take none; kept in the cache directory."""

    def __init__(self) -> None:
        self.path = cache_dir() / "compile_report.json"
        self.known: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, label: Label) -> str:
        launch, arch = jobs(label[2])[label], label[2]
        source = machine_code.source_digest(launch, arch)
        if source not in self.known:
            self.known[source] = machine_code.code_digest(launch, arch)[:8]
        return self.known[source]

    def keep(self) -> None:
        write_text(self.path, json.dumps(self.known))


def make_row(label: Label) -> Row:
    """Compile one launch and read what came out."""
    launch, arch = jobs(label[2])[label], label[2]
    compiled = machine_code.compile_launch(launch, arch)
    facts, metadata = machine_code.read(compiled), compiled.metadata
    columns = getattr(metadata, "tmem_size", 0) or 0
    return {
        **dict(zip(LABEL, label, strict=True)),
        **facts,
        "shared_bytes": metadata.shared,
        "occupancy": occupancy(arch, facts["registers"], metadata.shared, metadata.num_warps, columns),
    }


def _work(label: Label) -> Row | str:
    """Runs in a worker, which enumerates launches itself because they can't be pickled. Returns an error in words."""
    try:
        return make_row(label)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(getattr(cause, "error_message", None) or cause).strip() or "no message"
        return f"{type(cause).__name__}: {text.splitlines()[-1]}"[:300]


def _silence() -> None:
    """Suppress output: Triton prints a failing kernel, thousands of lines, also from C++."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def compile_all(labels: Sequence[Label], workers: int) -> Iterator[tuple[Label, Row | str]]:
    """(label, row or problem) in order. Where a compiler crashes, the next rows are compiled one at a time until it is found."""
    done, alone = 0, False
    while done < len(labels):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1 if alone else workers, context, _silence) as pool:
            for future in [pool.submit(_work, label) for label in labels[done : done + 1 if alone else None]]:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    if not alone:
                        alone = True
                        break
                    result = "the compiler crashed"
                yield labels[done], result
                done += 1
            else:
                alone = False


def read_report() -> pd.DataFrame:
    return pd.read_csv(REPORT, keep_default_na=False, dtype={"code": str})


def compare(old: pd.DataFrame, new: pd.DataFrame, labels: Sequence[Label]) -> list[str]:
    """A line for each figure of ``new`` that is worse than in ``old``, and for each of ``labels`` that one side lacks.

    ``labels`` are all that there are now, of which ``new`` may be some.
    """
    before = [*old[LABEL].itertuples(index=False, name=None)]
    lines = [f"{' | '.join(label)}: vanished" for label in before if label not in {*labels}]
    lines += [f"{' | '.join(label)}: not in the committed report" for label in labels if label not in {*before}]
    both = new.merge(old, on=LABEL, suffixes=("", "_old"))
    worse = {
        "registers": both.registers > both.registers_old + REGISTERS,
        "spills": both.spills > both.spills_old,
        "shared_bytes": both.shared_bytes > [DEVICES[arch].shared_limit for arch in both.arch],
        "mma": [not {*a.split()} <= {*b.split()} for a, b in zip(both.mma_old, both.mma, strict=True)],
        "serialized": (both.serialized != "") & (both.serialized_old == ""),
        "load_bits": both.load_bits < NARROWER * both.load_bits_old,
        "store_bits": both.store_bits < NARROWER * both.store_bits_old,
        "occupancy": both.occupancy < both.occupancy_old,
    }
    for column, bad in worse.items():
        for *label, was, is_now in both.loc[bad, [*LABEL, f"{column}_old", column]].itertuples(index=False):
            lines.append(f"{' | '.join(label)}: {column} {was or 'none'} -> {is_now or 'none'}")
    return lines


def write_report(old: pd.DataFrame, new: pd.DataFrame) -> None:
    """``new``, and the rows of ``old`` that it does not replace, without those that vanished."""
    now = pd.DataFrame([label for arch in DEVICES for label in jobs(arch)], columns=LABEL)
    found = now.merge(pd.concat([new, old]).drop_duplicates(LABEL), on=LABEL)
    write_text(REPORT, found[COLUMNS].to_csv(index=False, lineterminator="\n"))
