"""``pytest benchmarks``: cases of interleaved arms as pytest-benchmark's entries, and a table of who is faster where.

pytest-benchmark times one function after the other, minutes apart on a machine that drifts by more than the arms differ. So
all arms of a case are sampled in turns the first time that one of them is asked for, and each entry is handed its samples.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.common.measure import environment
from benchmarks.suite import rivals, table
from benchmarks.suite.rivals import Case, Outcome
from stablelora_kernels.testing import torch_device

SUITES = ("quick", "full", "tiny")
ITERS = {"quick": 15, "full": 50, "tiny": 3}
CASES = pytest.StashKey[dict[str, Case]]()
OUTCOMES = pytest.StashKey[dict[str, Outcome]]()
LOAD = pytest.StashKey[float]()
DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stablelora-kernels")
    group.addoption("--suite", choices=SUITES, default="quick", help="how many cases; tiny only shows that all runs")
    group.addoption(
        "--rounds", type=_rounds, help=f"samples of each arm (default: {ITERS['quick']}, full {ITERS['full']})"
    )
    group.addoption("--device", help="a torch device (default: the GPU if there is one, else the CPU)")


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 2, got {text!r}")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CASES], config.stash[OUTCOMES] = {}, {}
    config.stash[LOAD] = os.getloadavg()[0]
    try:
        config.stash[DEVICE] = torch_device(config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    config = metafunc.config
    found = metafunc.module.cases(config.getoption("suite"), config.stash[DEVICE])
    config.stash[CASES].update({case.name: case for case in found})
    # Names, not objects, so that --benchmark-group-by=param:case and the JSON can tell them.
    rows = [(case.name, phase, arm) for case in found for phase in case.phases for arm in case.arms]
    metafunc.parametrize(("case", "phase", "arm"), rows, ids=[" - ".join(row) for row in rows])


@dataclass
class Entry:
    """One arm's time for one phase of a case."""

    case: Case
    phase: str
    arm: str
    outcome: Outcome

    def record(self, benchmark: Any) -> None:
        """Hand the samples to pytest-benchmark, or say why there are none."""
        # Set first: a fixture that was not used is warned of. The module's docstring says why it isn't called.
        benchmark._mode = "interleaved"
        if error := self.outcome.errors.get(self.arm):
            raise error
        if reason := self.outcome.skipped.get(self.arm):
            pytest.skip(f"{self.arm}: {reason}")
        if benchmark.disabled:
            return
        if self.case.base not in self.outcome.samples:
            raise RuntimeError(f"{self.case.base!r}, which {self.arm!r} is compared with, did not run")
        benchmark.group = f"{self.case.name}, {self.phase}"
        stats = benchmark._make_stats(iterations=1)
        for seconds in self.outcome.seconds(self.case, self.phase, self.arm):
            stats.update(seconds)
        benchmark.extra_info.update(
            self.case.facts(), case=self.case.name, phase=self.phase, arm=self.arm, ours=self.arm in self.case.ours
        )
        benchmark.extra_info.update(rivals.compare(self.case, self.outcome, self.phase, self.arm))


@pytest.fixture
def entry(request: pytest.FixtureRequest, benchmark: Any, case: str, phase: str, arm: str) -> Iterator[Entry]:
    config, which = request.config, request.config.stash[CASES][case]
    outcomes = config.stash[OUTCOMES]
    if case not in outcomes:
        asked = {
            item.callspec.params["arm"]
            for item in request.session.items
            if isinstance(item, pytest.Function) and item.callspec.params.get("case") == case
        }
        rounds = config.getoption("rounds") or ITERS[config.getoption("suite")]
        outcomes[case] = rivals.sample(which, asked, 0 if benchmark.disabled else rounds)
    yield Entry(which, phase, arm, outcomes[case])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["stablelora_kernels"] = environment() | {"load_average_at_start": round(config.stash[LOAD], 2)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = [
        {"case": case, "arm": arm, "reason": reason}
        for case, outcome in config.stash[OUTCOMES].items()
        for arm, reason in outcome.skipped.items()
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cases, outcomes = config.stash[CASES], config.stash[OUTCOMES]
    sampled = [(cases[name], outcome) for name, outcome in outcomes.items() if outcome.samples]
    if sampled:
        terminalreporter.section("arms, sampled in turns")
        table.write(terminalreporter.write_line, sampled, config.stash[LOAD])
