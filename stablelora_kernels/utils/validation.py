"""Argument checks, and words for messages. Each check raises an error that names the argument and
its value.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import TypeVar

T = TypeVar("T")


def check_bool(name: str, value: object) -> bool:
    """``value`` as a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def check_tiles(name: str, value: object) -> bool | int:
    """``value`` as a bool, or as a tile's rows, an int of at least 1."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, int):
        raise TypeError(
            f"{name} must be a bool or a tile's rows, got {value!r} of type {type(value).__name__}"
        )
    return check_int(name, value, minimum=1)


def check_int(name: str, value: object, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    return value


def check_float(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
) -> float:
    """``value`` as a finite float of at least ``low``, or above it with ``low_open``, and below
    ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        # An int beyond the largest float.
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    above = number > low if low_open else number >= low
    # Not math.isfinite: torch.compile cannot trace it for a number that it has made symbolic.
    if not (-math.inf < number < math.inf and above and number < high):
        bracket = "(" if low_open or low == -math.inf else "["
        raise ValueError(
            f"{name} must be a finite number in {bracket}{low:g}, {high:g}), got {shown(value)}"
        )
    return number


def check_choice(name: str, value: T, choices: Sequence[T]) -> T:
    """``value``, which must be one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def no_argument(owner: str, name: str, known: Collection[str]) -> str:
    """The message that ``owner`` has no argument ``name``: it suggests the most similar known name,
    or else lists all of them.
    """
    similar = difflib.get_close_matches(name, known, 1)
    if similar:
        return f"{owner} has no argument {name!r}; did you mean {similar[0]!r}?"
    return f"{owner} has no argument {name!r}, which takes {', '.join(known)}"


def shown(value: object) -> str:
    """``value`` for a message; of a number with hundreds of digits the first."""
    try:
        text = str(value)
    except ValueError:
        # Python prints no int of more than 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}… ({len(text)} characters)"


def counted(number: int, noun: str) -> str:
    """``number`` and ``noun``, in the plural unless it is one: "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
