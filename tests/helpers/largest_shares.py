"""The largest error as a share of its bound, over all cases of a run: pytest prints it at the end."""

from __future__ import annotations

from typing import Any

import pytest

PROPERTY = "largest share of a bound"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    shares: list[tuple[float, str]] = []
    for report in terminalreporter.stats.get("passed", []):
        properties: dict[str, Any] = dict(report.user_properties)
        if PROPERTY in properties:
            shares.append(tuple(properties[PROPERTY]))
    if shares:
        share, of = max(shares)
        terminalreporter.section("errors against float64")
        terminalreporter.line(
            f"{len(shares)} cases; the largest error is {share:.2f} of its bound: {of}"
        )
