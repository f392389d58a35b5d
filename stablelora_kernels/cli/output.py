"""Output of every command: tables that fit the terminal, JSON, and one-line errors."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The line width for files and pipes, which need no wrapping.
NO_TERMINAL = 10_000
_UNITS = ("KiB", "MiB", "GiB", "TiB")


class CommandError(Exception):
    """Ends a command with one line on stderr.

    Status 2: the command could not start (a bad argument, a missing file or package). Status 1: it started and failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(printable(" ".join(message.split())))
        self.status = status


class Paragraphs(argparse.HelpFormatter):
    """A help formatter that wraps each paragraph of a description to the terminal's width."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(super(Paragraphs, self)._fill_text(part, width, indent) for part in paragraphs)


def printable(text: str) -> str:
    """``text`` with escapes for control characters, by which a name in a file could hide a line of a terminal or fake one."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width() -> int:
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if known else NO_TERMINAL


def print_json(value: Any) -> None:
    # JSON has neither infinity nor NaN.
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_pairs(pairs: Mapping[str, str], indent: str = "  ") -> None:
    """Print one name and text per line. A long text continues below its first line."""
    column = max(map(len, pairs), default=0) + 2
    for name, text in pairs.items():
        lead = f"{indent}{name:{column}}"
        print(wrapped(lead + text, len(lead)))


def wrapped(text: str, hang: int = 2) -> str:
    """Wrap ``text`` to the terminal's width and indent later lines by ``hang``."""
    return textwrap.fill(printable(text), max(width(), 40), subsequent_indent=" " * hang, break_on_hyphens=False,
                         break_long_words=False, drop_whitespace=True)  # fmt: skip


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Print columns of minimal width; those in ``left`` are left-aligned. In a narrow terminal, the first column shrinks."""
    columns = [[printable(text) for text in (title, *(row[i] for row in rows))] for i, title in enumerate(titles)]
    widths = [max(map(len, column)) for column in columns]
    widths[0] = min(widths[0], max(width() - sum(w + 2 for w in widths[1:]) - 2, len(titles[0]), 12))
    for row in zip(*columns, strict=True):
        cells = [shorten(row[0], widths[0]), *row[1:]]
        cells = [f"{c:{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        print("  " + "  ".join(cells).rstrip())


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a text that is too long. A module's name tells most at its layer number and its end."""
    if len(text) <= length:
        return text
    tail = (length + 1) // 2
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]


def size(count: int) -> str:
    """A number of bytes with a binary unit."""
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log(count, 1024)), 4)
    value = count / 1024**power
    return f"{value:.0f} {_UNITS[power - 1]}" if value >= 99.95 else f"{value:.3g} {_UNITS[power - 1]}"
