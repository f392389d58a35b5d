"""What the commands share: one-line errors, arguments, and a report that prints itself as text or
as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from stablelora_kernels.testing import torch_device


class CommandError(Exception):
    """Ends a command with one line on stderr.

    Status 2: the command could not start (a bad argument, a missing file or package). Status 1: it
    started and failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(printable(" ".join(message.split())))
        self.status = status


@contextmanager
def failing(*kinds: type[Exception], status: int = 2, before: str = "") -> Iterator[None]:
    """End the command if the body raises an error of these kinds, with its message after
    ``before``.
    """
    try:
        yield
    except kinds as error:
        raise CommandError(f"{before}{error}", status) from None


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names; without it, the GPU if there is one, else the CPU."""
    with failing(ValueError, before="--"):
        return torch_device(args.device)


class Report:
    """What a command found: text, printed as it comes, or with ``--json`` the object ``data``,
    printed at the end.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.data: dict[str, Any] = {}

    def text(self, *lines: str, hang: int = 2) -> None:
        """Print each text, wrapped to the terminal's width, with later lines indented by ``hang``."""
        for text in () if self.as_json else lines:
            print(textwrap.fill(printable(text), max(width(), 40), subsequent_indent=" " * hang, break_on_hyphens=False,
                                break_long_words=False))  # fmt: skip

    def pairs(self, pairs: Mapping[str, str]) -> None:
        """Print one name and text per line. A long text continues below its first line."""
        column = max(map(len, pairs), default=0) + 2
        for name, text in pairs.items():
            self.text(f"  {name:{column}}{text}", hang=column + 2)

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
    ) -> None:
        """Print columns of minimal width; those in ``left`` are left-aligned. In a narrow terminal,
        the first one shrinks.
        """
        lines = [[printable(text) for text in row] for row in (titles, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        widths[0] = min(
            widths[0], max(width() - sum(w + 2 for w in widths[1:]) - 2, len(titles[0]), 12)
        )
        for first, *rest in () if self.as_json else lines:
            cells = zip((shorten(first, widths[0]), *rest), widths, strict=True)
            aligned = (
                f"{text:{w}}" if i in left else f"{text:>{w}}" for i, (text, w) in enumerate(cells)
            )
            print("  " + "  ".join(aligned).rstrip())

    def progress(self, text: str) -> None:
        """Show ``text`` in the terminal until the next output."""
        if not self.as_json and sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print the object, with the names of infinity and NaN, which JSON does not have."""
        if self.as_json:
            finite = json.loads(json.dumps(self.data), parse_constant=lambda name: str(float(name)))
            print(json.dumps(finite, indent=1, allow_nan=False))


def printable(text: str) -> str:
    """``text`` with escapes for control characters, by which a name in a file could hide a line of
    a terminal or fake one.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width() -> int:
    """The terminal's width. Files and pipes need no wrapping."""
    return shutil.get_terminal_size(fallback=(10_000, 24)).columns


def shorten(text: str, length: int) -> str:
    """Cut the middle out of a text that is too long. A module's name tells most at its layer number
    and its end.
    """
    if len(text) <= length:
        return text
    tail = (length + 1) // 2
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]
