"""pytest's plugin that keeps rows of ``benchmarks.lab.gpu`` in a CSV file as tests begin and end: a
crash loses none of them.

A test that hangs or crashes leaves its name. A test's ``record_property`` names columns of its row,
or with "row" whole rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.records import write_records

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]
OK, FAILED, SKIPPED, BEGUN = "ok", "failed", "skipped", "begun"
# How a section ends besides FAILED.
ENDED, NOT_REACHED, INTERRUPTED = "ended", "not reached", "interrupted"
# Keep this many characters of a message, from its end, which says what happened.
NOTE_LENGTH = 1500


def key_of(nodeid: str) -> Row:
    """Return the columns that name a test."""
    test, _, parameters = nodeid.partition("[")
    return {"test": test.rpartition("::")[2], "case": parameters.removesuffix("]")}


class Rows:
    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._begun = path, list[Row](), dict[str, Row]()

    def _write(self) -> None:
        write_records(self._path, [*self._rows, *self._begun.values()], {})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begun[nodeid] = {**key_of(nodeid), "status": BEGUN}
        self._write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        rows = (
            [value for name, value in report.user_properties if name == "row"]
            if report.when == "call"
            else []
        )
        self._rows += [{"status": OK, **row} for row in rows]
        # Setup and teardown matter only when they fail or skip the test.
        if report.failed or report.skipped or (report.when == "call" and not rows):
            row = key_of(report.nodeid) | {"status": OK, "seconds": round(report.duration, 2)}
            row |= {name: value for name, value in report.user_properties if name != "row"}
            if report.failed:
                row |= {"status": FAILED, "note": report.longreprtext[-NOTE_LENGTH:]}
            elif report.skipped:
                row |= {"status": SKIPPED, "note": report.longrepr[2].removeprefix("Skipped: ")}
            self._rows.append(row)
        # "???" is pytest-xdist's report of a crash.
        if report.when in ("teardown", "???"):
            self._begun.pop(report.nodeid, None)
            self._write()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rows", type=Path, help="the CSV file for rows")


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(config.getoption("rows")))
