"""Tables as text, CSV and Markdown, files written whole or not at all, and the directory of results."""

from __future__ import annotations

import csv
import gzip
import io
import json
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


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, and its directory; compressed if its name ends with .gz. Equal texts give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    content = text.encode()
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    os.replace(partial, path)
    return path


def write_files(directory: Path, texts: dict[str, str]) -> list[Path]:
    return [write_text(directory / name, text) for name, text in texts.items()]


def json_text(found: Any) -> str:
    return json.dumps(found, indent=1) + "\n"


def csv_text(rows: Sequence[dict[str, Any]], columns: Iterable[str] = ()) -> str:
    """Records as CSV, with ``columns`` or those of all records in order of appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*columns] or [*dict.fromkeys(key for row in rows for key in row)], lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rounded(row: dict[str, Any], digits: int) -> dict[str, Any]:
    """Floats to so many significant digits."""
    return {name: float(f"{value:.{digits}g}") if isinstance(value, float) else value for name, value in row.items()}


def read_csv(path: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))]
