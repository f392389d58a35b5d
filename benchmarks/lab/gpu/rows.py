"""pytest's plugin that writes rows of ``benchmarks.lab.gpu``, lines of JSON, as tests begin and end: a crash loses none of them.

A test that hangs or crashes leaves its name. A test's ``record_property`` names columns of its row, or with "row" whole rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]
OK, FAILED, SKIPPED, BEGUN = "ok", "failed", "skipped", "begun"
# How a section ends besides FAILED.
ENDED, NOT_REACHED, INTERRUPTED = "ended", "not reached", "interrupted"
# Keep this many characters of a message, from its end, which says what happened.
NOTE_LENGTH = 1500


def add(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Return the rows. Those of tests that began and have not ended have the status BEGUN."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    ended = {line["ended"] for line in lines if "ended" in line}
    return [line for line in lines if "ended" not in line and line.pop("begun", None) not in ended]


def key_of(nodeid: str) -> Row:
    """Return the columns that name a test."""
    test, _, parameters = nodeid.partition("[")
    return {"test": test.rpartition("::")[2], "case": parameters.removesuffix("]")}


class Rows:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        add(self._path, {"begun": nodeid, **key_of(nodeid), "status": BEGUN})

    def pytest_runtest_logreport(self, report: Any) -> None:
        rows = [value for name, value in report.user_properties if name == "row"] if report.when == "call" else []
        for row in rows:
            add(self._path, {"status": OK, **row})
        # Setup and teardown matter only when they fail or skip the test.
        if report.failed or report.skipped or (report.when == "call" and not rows):
            row = key_of(report.nodeid) | {"status": OK, "seconds": round(report.duration, 2)}
            row |= {name: value for name, value in report.user_properties if name != "row"}
            if report.failed:
                row |= {"status": FAILED, "note": report.longreprtext[-NOTE_LENGTH:]}
            elif report.skipped:
                row |= {"status": SKIPPED, "note": report.longrepr[2].removeprefix("Skipped: ")}
            add(self._path, row)
        # "???" is pytest-xdist's report of a crash.
        if report.when in ("teardown", "???"):
            add(self._path, {"ended": report.nodeid})


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rows", type=Path, help="the file for rows")


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(config.getoption("rows")))
