"""Tables on the screen, files written whole or not at all, and where results are kept."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def aligned(cells: list[list[str]], left: int = 1) -> list[str]:
    """Rows of equally many cells as lines, a rule under the first; the ``left`` first columns flush left, the others right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    lines = [line(row) for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_zipped(path: Path, text: str) -> None:
    """The same bytes for the same text."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write records as CSV; the columns are those of all records, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
