"""The rows of the compile report: compile every launch that dispatch can make, and read the machine code."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import tables
from benchmarks.common.tables import RESULTS, aligned
from benchmarks.lab.compile_report import machine_code
from benchmarks.lab.compile_report.launches import FULL, every_launch
from benchmarks.lab.compile_report.occupancy import occupancy
from stablelora_kernels.dispatch.problem import DEVICES

REPORT = RESULTS / "compile_report.csv"
# Rows that passed the check, with their digests.
DIGESTS = REPORT.with_name("compile_report_digests.json")
# The Triton release of the committed report.
TRITON = "3.9"
# --quick compiles all rows of FULL and one in EVERY of each other GPU, not the same ones of each; but of those with their
# recorded digest only one in EVERY_KEPT, a multiple of EVERY.
EVERY, EVERY_KEPT = 20, 120

Row = dict[str, Any]
_TYPES: dict[str, Callable[[str], Any]] = {
    "kernel": str, "variant": str, "arch": str, "dtype": str, "registers": int, "spills": int, "shared_bytes": int,
    "shared_limit": int, "mma": str, "serialized": str, "load_bits": int, "store_bits": int, "occupancy": float,
}  # fmt: skip
KEYS = tuple(_TYPES)
LABEL = KEYS[:4]
# More registers than this are worse even at the same occupancy: it is the step they are given out in, and compilers' noise.
REGISTERS = 8


class Job(NamedTuple):
    """A future row: its first columns, and its launch."""

    label: tuple[str, str, str, str]
    launch: Any


def kernel_name(launch: Any) -> str:
    name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    return "stable_adamw_square_sums" if name == "square_sums" else name


@cache
def jobs(arch: str) -> tuple[Job, ...]:
    """One job for each piece of code. If several pieces share a variant, the arguments that differ follow its name."""
    found: dict[tuple[str, str, str], list[tuple[Any, dict[str, str]]]] = defaultdict(list)
    for dtype, launch in every_launch(DEVICES[arch]):
        alike, values = found[kernel_name(launch), launch.variant, dtype], machine_code.values(launch, arch)
        if values not in (other for _, other in alike):
            alike.append((launch, values))
    result = []
    for (kernel, variant, dtype), alike in found.items():
        names = {name: None for _, values in alike for name in values}
        telling = [name for name in names if len({values.get(name) for _, values in alike}) > 1]
        for launch, values in alike:
            words = [variant, *(values[name] for name in telling if name in values)]
            result.append(Job((kernel, " ".join(words), arch, dtype), launch))
    return tuple(result)


def make_row(job: Job) -> Row:
    """Compile one launch and read what came out."""
    arch = job.label[2]
    compiled = machine_code.compile_launch(job.launch, arch)
    facts, metadata = machine_code.read(compiled), compiled.metadata
    columns = getattr(metadata, "tmem_size", 0) or 0
    row = dict(zip(LABEL, job.label, strict=True)) | facts
    row["shared_bytes"], row["shared_limit"] = metadata.shared, DEVICES[arch].shared_limit
    row["occupancy"] = occupancy(arch, facts["registers"], metadata.shared, metadata.num_warps, columns)
    return {key: row[key] for key in KEYS}


def _work(arch: str, place: int) -> Row | str:
    """Runs in a worker, which enumerates launches itself because they can't be pickled. Returns an error in words."""
    try:
        return make_row(jobs(arch)[place])
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


def compile_all(tasks: Sequence[tuple[str, int]], workers: int) -> Iterator[tuple[tuple[str, int], Row | str]]:
    """(task, row or problem) in order; a compiler that crashes loses only its own row."""
    left, now = list(tasks), workers
    while left:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(now, context, _silence) as pool:
            futures = [pool.submit(_work, *task) for task in left]
            done = 0
            try:
                for task, future in zip(left, futures, strict=True):
                    yield task, future.result()
                    done += 1
            except BrokenProcessPool:
                # A single worker takes tasks in order, so the crashing task is known.
                if now == 1:
                    yield left[done], "the compiler crashed"
                    done += 1
                now = 1 if now > 1 else workers
        left = left[done:]


def worse(old: Row, new: Row) -> list[str]:
    """The columns in which ``new`` is worse than ``old``, in words."""
    found = [
        f"{key} {old[key] or 'no'} -> {new[key]}" if key == "serialized" else f"{key} {old[key]} -> {new[key]}"
        for key, bad in (
            ("registers", new["registers"] > old["registers"] + REGISTERS),
            ("spills", new["spills"] > old["spills"]),
            ("mma", not set(old["mma"].split()) <= set(new["mma"].split())),
            ("serialized", bool(new["serialized"]) and not old["serialized"]),
            ("load_bits", new["load_bits"] < old["load_bits"]),
            ("store_bits", new["store_bits"] < old["store_bits"]),
            ("occupancy", new["occupancy"] < old["occupancy"]),
        )
        if bad
    ]
    if new["shared_bytes"] > new["shared_limit"]:
        found.append(f"shared_bytes {new['shared_bytes']} > {new['shared_limit']}")
    return found


def label_of(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in LABEL)


def compare(old: Sequence[Row], new: Sequence[Row], labels: Sequence[tuple[str, ...]]) -> list[str]:
    """A line for each row of ``new`` that is worse than in ``old``, and for each of ``labels`` that one side lacks.

    ``labels`` are all that there are now, of which ``new`` may be some.
    """
    before, now = {label_of(row): row for row in old}, set(labels)
    lines = [f"{' | '.join(label)}: vanished" for label in before if label not in now]
    lines += [f"{' | '.join(label)}: not in the committed report" for label in labels if label not in before]
    for row in new:
        label = label_of(row)
        if label in before and (problems := worse(before[label], row)):
            lines.append(f"{' | '.join(label)}: {', '.join(problems)}")
    return lines


def read_csv(path: Path) -> list[Row]:
    return [{key: _TYPES[key](value) for key, value in row.items()} for row in tables.read_csv(path)]


def table(rows: Sequence[Row]) -> str:
    return "\n".join(aligned([list(KEYS), *([str(row[key]) for key in KEYS] for row in rows)], left=len(LABEL)))


class Digests(NamedTuple):
    """Of a row that passed the check: its compiler input, and its intermediate code."""

    source: str
    code: str


def read_digests() -> dict[str, Digests]:
    found = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    return {name: Digests(*words.split()) for name, words in found.items()}


def write_digests(done: Iterable[tuple[str, int]], wanted: Iterable[tuple[str, int]]) -> None:
    """Record the tasks ``done``, refresh those of ``wanted`` that were recorded with the same code, and drop what vanished."""
    kept = read_digests()
    now = {job_name(job) for arch in DEVICES for job in jobs(arch)}
    found = {name: digests for name, digests in kept.items() if name in now}
    fresh = set(done)
    for arch, place in wanted:
        job = jobs(arch)[place]
        name, source = job_name(job), machine_code.source_digest(job.launch, arch)
        recorded = kept.get(name)
        if (arch, place) in fresh or (recorded is not None and recorded.source != source):
            code = machine_code.code_digest(job.launch, arch)
            if (arch, place) in fresh or (recorded is not None and recorded.code == code):
                found[name] = Digests(source, code)
    lines = {name: " ".join(digests) for name, digests in found.items()}
    tables.write_text(DIGESTS, json.dumps(lines, indent=0, sort_keys=True) + "\n")


def job_name(job: Job) -> str:
    return " | ".join(job.label)


def in_sample(arch: str, place: int, kept: Mapping[str, Digests]) -> bool:
    number = place if arch == FULL else place + 5 * list(DEVICES).index(arch)
    if number % EVERY_KEPT == 0:
        return True
    if arch != FULL and number % EVERY:
        return False
    return has_changed(arch, place, kept)


def has_changed(arch: str, place: int, kept: Mapping[str, Digests]) -> bool:
    """Whether the code of a row is other than the recorded one, or none is recorded."""
    job = jobs(arch)[place]
    recorded = kept.get(job_name(job))
    if recorded is None:
        return True
    if recorded.source == machine_code.source_digest(job.launch, arch):
        return False
    return recorded.code != machine_code.code_digest(job.launch, arch)
