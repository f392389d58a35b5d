"""A pytest plugin: pytest's process is of a kind of processor, and writes down how many tests
passed and failed.

``python -m tests.processors`` loads it with ``-p tests.processors.plugin`` and sets the kind's
environment variables.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("processors")
    group.addoption(
        "--processor", metavar="KIND", required=True, help="a name of tests/processors/kinds.py"
    )
    group.addoption(
        "--outcomes", metavar="FILE", required=True, help="for the counts of outcomes, as JSON"
    )
    group.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="run N tests, evenly spread over those that are collected",
    )


def pytest_configure(config: pytest.Config) -> None:
    # tests/conftest.py, which sets the threads of NumPy's OpenBLAS, is loaded by now.
    from tests.processors.kinds import KINDS, differences, set_up

    kind = KINDS[config.getoption("processor")]
    set_up(kind)
    if different := [*differences(kind)]:
        raise pytest.UsageError(f"this process is not of kind {kind.name}. {'; '.join(different)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    from tests.processors.kinds import KINDS, properties

    kind = KINDS[config.getoption("processor")]
    return [f"processor: {kind.name}", *(f"  {one.name}: {one.actual}" for one in properties(kind))]


def spread(count: int, size: int) -> list[int]:
    """``size`` places among ``count``, as far apart as they can be, or all of them."""
    size = min(size, count)
    return [number * count // size for number in range(size)]


# After tests/conftest.py has left out what runs at night.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    size = config.getoption("sample")
    if size is None:
        return
    kept = spread(len(items), size)
    config.hook.pytest_deselected(
        items=[item for place, item in enumerate(items) if place not in kept]
    )
    items[:] = [items[place] for place in kept]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    counts = {outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in OUTCOMES}
    Path(config.getoption("outcomes")).write_text(json.dumps(counts), encoding="utf-8")
