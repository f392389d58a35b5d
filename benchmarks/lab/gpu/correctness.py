"""The first section: ``pytest tests/gpu``. This module is also its plugin, which adds a row for each test as it ends."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.lab.gpu.section import FAILED, NOT_REACHED, NOTE_LENGTH, OK, ROOT, SKIPPED, Clock, Row, Table, parse

COLUMNS = ("check", "case", "status", "figure", "bound", "seconds", "note", "dry")


def workers() -> int:
    """Return how many processes share the GPU. Most of the time goes into compiling kernels on the host."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def row_of(report: Any) -> Row:
    """Return the row for pytest's report of one test."""
    name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
    row: Row = {"check": name, "case": parameters.rpartition("]")[0], "seconds": round(report.duration, 2)}
    row |= dict(report.user_properties)
    if report.passed:
        return row | {"status": OK}
    if report.failed:
        return row | {"status": FAILED, "note": report.longreprtext[-NOTE_LENGTH:]}
    reason = report.longrepr[2].removeprefix("Skipped: ")
    return row | {"status": NOT_REACHED if reason == NOT_REACHED else SKIPPED, "note": reason}


class Rows:
    """The part of the plugin that runs in pytest's main process."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def pytest_runtest_logreport(self, report: Any) -> None:
        # Setup and teardown matter only when they fail or skip the test.
        if report.when == "call" or not report.passed:
            self._table.add(row_of(report))


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rows", help="the CSV file for a row of each test")
    parser.addoption("--rows-dry", action="store_true", help="mark the rows as a dry run's")
    parser.addoption("--until", type=float, help="begin no test after this time on the monotonic clock")


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):
        table = Table(Path(config.getoption("rows")), COLUMNS, config.getoption("rows_dry"))
        config.pluginmanager.register(Rows(table))


def pytest_runtest_setup(item: Any) -> None:
    import pytest

    if Clock(item.config.getoption("until")).left() <= 0:
        pytest.skip(NOT_REACHED)


def main() -> int:
    options = parse()
    if find_spec("pytest") is None:
        note = "pytest is not installed, so no check ran"
        Table(options.file, COLUMNS, options.dry_run).add({"check": "pytest", "status": SKIPPED, "note": note})
        print(f"  {note}", flush=True)
        return 0
    import pytest

    arguments = ["tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.lab.gpu.correctness"]
    arguments += ["--rows", str(options.file), "--until", str(options.until)]
    if options.dry_run:
        os.environ["SLK_GPU_DRY_RUN"] = "1"
        arguments.append("--rows-dry")
    elif find_spec("xdist") is not None:
        # loadgroup keeps the tests that take much of the GPU's memory in one process.
        arguments += ["-n", str(workers()), "--dist", "loadgroup"]
    status = pytest.main(arguments)
    # A failed test is a failed row already.
    return 0 if status == pytest.ExitCode.TESTS_FAILED else int(status)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
