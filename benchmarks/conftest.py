"""``pytest benchmarks``: each entry of pytest-benchmark is one phase of a case, timed against its rivals round by round."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.common.measure import environment
from benchmarks.suite import scaling, table
from benchmarks.suite.rivals import Case, Race
from stablelora_kernels.testing import torch_device

ROUNDS = {"quick": 15, "full": 50, "tiny": 3}
CASES = pytest.StashKey[dict[str, Case]]()
REPORTS = pytest.StashKey[list[dict[str, Any]]]()
LOAD = pytest.StashKey[float]()
DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stablelora-kernels")
    group.addoption(
        "--suite", choices=ROUNDS, default="quick", help="how many cases; tiny only shows that all of them run"
    )
    group.addoption("--rounds", type=_rounds, help="timed rounds of a case (default: 15, full 50)")
    group.addoption("--device", help="cpu or cuda (default: the GPU if there is one)")
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


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES], config.stash[REPORTS] = {}, []
    config.stash[LOAD] = os.getloadavg()[0]
    try:
        config.stash[DEVICE] = torch_device(config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config, suite = metafunc.config, metafunc.config.getoption("suite")
    found = [
        case
        for case in metafunc.module.cases(suite, config.stash[DEVICE])
        if not case.mark or suite == "tiny" or case.mark in config.option.markexpr
    ]
    config.stash[CASES].update({case.name: case for case in found})
    # Names, not objects: --benchmark-group-by=param:case and the JSON show them.
    rows = [
        pytest.param(
            case.name, phase, marks=[getattr(pytest.mark, case.mark)] if case.mark else [], id=f"{case.name} - {phase}"
        )
        for case in found
        for phase in case.phases
    ]
    metafunc.parametrize(("case", "phase"), rows, scope="module")


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, case: str) -> Iterator[Race]:
    """The arms of a case, built once for all of its phases."""
    config = request.config
    made = Race(config.stash[CASES][case], config.getoption("arm"))
    yield made
    made.close()


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, race: Race, phase: str) -> Callable[[], None]:
    """Time a phase. Fails for an arm that failed, after the others were timed."""
    config, case = request.config, race.case

    def run() -> None:
        if race.target is None and not race.failed.keys() & {*case.ours}:
            pytest.skip("; ".join(f"{arm}: {race.skipped[arm]}" for arm in case.ours))
        if race.target is not None and case.base in race.arms:
            rounds = config.getoption("rounds") or ROUNDS[config.getoption("suite")]
            if report := race.measure(benchmark, phase, rounds):
                benchmark.extra_info.update(report)
                config.stash[REPORTS].append(report)
            case.check()
        for error in race.failed.values():
            raise error
        if case.base not in race.arms:
            raise RuntimeError(f"{case.base!r}, the base of {case.name!r}, did not run: {race.skipped[case.base]}")

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["stablelora_kernels"] = environment() | {"load_average_at_start": round(config.stash[LOAD], 2)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep medians and quartiles, not every round."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
    output_json["exponents"] = scaling.exponents(config.stash[REPORTS])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[REPORTS]:
        terminalreporter.section("arms, timed in turns")
        table.write(terminalreporter.write_line, config.stash[REPORTS], config.stash[LOAD])
