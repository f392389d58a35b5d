"""``pytest tests/gpu``: first by one worker in the order of STAGES (``--part bringup``), then the rest of it by several.

This module is also pytest's plugin. From a test's begin to its end there is a row that says so, besides those of its results: a
test that hangs or crashes leaves its name. In the first part no test begins behind a stage that has failed.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.lab.gpu.section import FAILED, NOT_REACHED, NOTE_LENGTH, OK, ROOT, SKIPPED, Clock, Row, Table, parse

COLUMNS = ("stage", "check", "case", "status", "figure", "bound", "seconds", "note", "dry")
TESTS = "tests/gpu/"
# Each stage takes one step beyond those before it, so the first that fails says where to look.
STAGES = {
    "shrink": ["test_bring_up.py::test_shrink"],
    "product by pointers": ["test_bring_up.py::test_product_by_pointers"],
    "product by TMA": ["test_bring_up.py::test_product_by_tma"],
    "programmatic dependent launch": ["test_bring_up.py::test_dependent_launch"],
    "fused and split-K": ["test_bring_up.py::test_fused", "test_bring_up.py::test_split_k"],
    "chained": ["test_bring_up.py::test_chained_forward", "test_bring_up.py::test_chained_backward"],
    "groups": ["test_bring_up.py::test_group"],
    "gated MLP": ["test_bring_up.py::test_mlp"],
    "quantized": ["test_bring_up.py::test_quantized"],
    "prepared": ["test_prepared_launches.py::test_operands_that_moved_are_read_where_they_are"],
    "CUDA graphs": ["test_cuda_graphs.py"],
    "GraphedStep": ["test_graphed_step.py"],
    "optimizer": ["test_bring_up.py::test_optimizer"],
    "two streams": [
        "test_prepared_launches.py::test_streams_share_a_plan_and_not_its_counters",
        "test_competing_stream.py",
    ],
    "two GPUs": ["test_prepared_launches.py::test_a_second_gpu_has_a_key_of_its_own"],
}
PATHS = {TESTS + path: stage for stage, paths in STAGES.items() for path in paths}


def workers() -> int:
    """Return how many processes share the GPU. Most of the time goes into compiling kernels on the host."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def key_of(nodeid: str) -> Row:
    """Return the columns that name a test."""
    path, _, parameters = nodeid.partition("[")
    stage = PATHS.get(path) or PATHS.get(path.partition("::")[0], "")
    return {"stage": stage, "check": path.rpartition("::")[2], "case": parameters.rpartition("]")[0]}


def row_of(report: Any) -> Row:
    """Return the row for pytest's report of one test."""
    row: Row = key_of(report.nodeid) | {"seconds": round(report.duration, 2)} | dict(report.user_properties)
    if report.passed:
        return row | {"status": OK}
    if report.failed:
        return row | {"status": FAILED, "note": report.longreprtext[-NOTE_LENGTH:]}
    reason = report.longrepr[2].removeprefix("Skipped: ")
    return row | {"status": NOT_REACHED if reason == NOT_REACHED else SKIPPED, "note": reason}


class Rows:
    """The part of the plugin that runs in pytest's main process. Without workers it also stops behind a stage that failed."""

    def __init__(self, table: Table) -> None:
        self._table, self._failed = table, ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._table.begin(nodeid, key_of(nodeid))

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if self._failed and key_of(item.nodeid)["stage"] != self._failed:
            pytest.skip(NOT_REACHED)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._table.end(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        # Setup and teardown matter only when they fail or skip the test.
        if report.when == "call" or not report.passed:
            self._table.add(row_of(report))
        if report.when == "???":
            # pytest-xdist's report of a crash, behind which there is no end.
            self._table.end(report.nodeid)
        if report.failed:
            self._failed = self._failed or key_of(report.nodeid)["stage"]


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

    first = options.part == "bringup"
    arguments = [*PATHS] if first else [TESTS, *(word for path in PATHS for word in ("--deselect", path))]
    # pytest leaves standard error alone, where the watchdog's dump goes.
    arguments += ["-m", "gpu", "-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "benchmarks.lab.gpu.correctness"]
    arguments += ["--rows", str(options.file), "--until", str(options.until)]
    if options.dry_run:
        os.environ["SLK_GPU_DRY_RUN"] = "1"
        arguments.append("--rows-dry")
    elif not first and find_spec("xdist") is not None:
        # loadgroup keeps the tests that take much of the GPU's memory in one process.
        arguments += ["-n", str(workers()), "--dist", "loadgroup"]
    status = pytest.main(arguments)
    # A failed test is a failed row already.
    return 0 if status == pytest.ExitCode.TESTS_FAILED else int(status)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
