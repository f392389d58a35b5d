"""Markdown tables, files written whole or not at all, and the directory of results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def markdown(cells: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns are flush left, the others right."""
    head, *rows = cells
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def with_quartiles(row: Mapping[str, Any]) -> str:
    """A record's median, and its quartiles in parentheses."""
    return f"{row['median']:.2f} ({row['q1']:.2f} to {row['q3']:.2f})"


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, and its directory. Equal texts give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text.encode())
    os.replace(partial, path)
    return path
