"""Tables as text, CSV and Markdown, files written whole or not at all, and the directory of results."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def aligned(cells: list[list[str]], left: int = 1) -> list[str]:
    """Rows of equal length as lines, with a rule under the first; the first ``left`` columns are flush left, the others right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    lines = [line(row) for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def markdown(cells: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are flush left, the others right."""
    head, *rows = cells
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_zipped(path: Path, text: str) -> None:
    """Write compressed text; equal texts give equal bytes."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def csv_text(rows: Sequence[dict[str, Any]], columns: Iterable[str] = ()) -> str:
    """Records as CSV, with ``columns`` or those of all records in order of appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*columns] or [*dict.fromkeys(key for row in rows for key in row)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Iterable[str] = ()) -> None:
    path.write_text(csv_text(rows, columns), encoding="utf-8", newline="")


def read_csv(path: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))]
