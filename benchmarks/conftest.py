"""``pytest benchmarks``: each entry of pytest-benchmark is one phase of a case, timed against its
rivals round by round.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.measure import environment
from benchmarks.common.records import write_records
from benchmarks.suite import table
from benchmarks.suite.rivals import Case, Race, Row
from stablelora_kernels.testing import torch_device

ROUNDS = {"quick": 15, "full": 50, "tiny": 3}
CASES = pytest.StashKey[dict[str, Case]]()
ROWS = pytest.StashKey[list[Row]]()
LOAD = pytest.StashKey[float]()
DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stablelora-kernels")
    group.addoption(
        "--suite",
        choices=ROUNDS,
        default="quick",
        help="how many cases; tiny only shows that all of them run",
    )
    group.addoption("--rounds", type=_rounds, help="timed rounds of a case (default: 15, full 50)")
    group.addoption("--device", help="cpu or cuda (default: the GPU if there is one)")
    group.addoption(
        "--records", type=Path, metavar="FILE", help="write every figure as a row of a CSV file"
    )
    group.addoption(
        "--arm",
        action="append",
        default=[],
        metavar="NAME",
        help="besides base, rival and ours run only this arm; may be repeated",
    )


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, got {text!r}")
    return int(text)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES], config.stash[ROWS] = {}, []
    config.stash[LOAD] = os.getloadavg()[0]
    try:
        config.stash[DEVICE] = torch_device(config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None
    option = config.option
    # pytest-benchmark's own table has our arm alone. It also compares runs, and draws histograms.
    wanted = option.benchmark_compare or option.benchmark_histogram or option.benchmark_cprofile
    option.benchmark_quiet = option.benchmark_quiet or not wanted


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, suite = metafunc.config, metafunc.config.getoption("suite")
    rows = []
    for case in metafunc.module.cases(suite, config.stash[DEVICE]):
        mark = "scaling" if case.axis else case.mark
        if mark and suite != "tiny" and mark not in config.option.markexpr:
            continue
        config.stash[CASES][case.name] = case
        marks = [getattr(pytest.mark, mark)] if mark else []
        for phase in [*case.phases][-1 if case.axis else 0 :]:
            # Names, not objects: --benchmark-group-by=param:case and the JSON show them.
            rows.append(pytest.param(case.name, phase, marks=marks, id=f"{case.name} - {phase}"))
    metafunc.parametrize(("case", "phase"), rows, scope="module")


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, case: str) -> Iterator[Race]:
    """The arms of a case, built once for all of its phases."""
    config = request.config
    of = config.stash[CASES][case]
    made = Race(of, config.getoption("arm") or ([of.base] if of.axis else []))
    yield made
    made.close()


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, race: Race, phase: str
) -> Callable[[], None]:
    """Time a phase. Fails for an arm that failed, after the others were timed."""
    config, case = request.config, race.case

    def run() -> None:
        if race.target is None and not race.failed.keys() & {*case.ours}:
            pytest.skip("; ".join(f"{arm}: {race.skipped[arm]}" for arm in case.ours))
        if race.target is not None and case.base in race.arms:
            rounds = config.getoption("rounds") or ROUNDS[config.getoption("suite")]
            config.stash[ROWS].extend(race.measure(benchmark, phase, rounds))
            case.check()
        for error in race.failed.values():
            raise error
        if case.base not in race.arms:
            raise RuntimeError(
                f"{case.base!r}, the base of {case.name!r}, did not run: {race.skipped[case.base]}"
            )

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if rows := config.stash[ROWS]:
        if file := config.getoption("records"):
            command = shlex.join(
                ["python", "-m", "pytest", *map(str, config.invocation_params.args)]
            )
            header = environment() | {
                "load_average_at_start": round(config.stash[LOAD], 2),
                "command": command,
            }
            write_records(file, rows, header)
        terminalreporter.section("arms, timed in turns")
        table.write(terminalreporter.write_line, rows, config.stash[LOAD])
