"""Argument checks. Each raises an error that names the argument and its value, before anything changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

# How the keys of rank_pattern and alpha_pattern are matched: as regular expressions for a dotted name or its end after a dot.
PATTERN = r"(.*\.)?({})$"


def check_bool(name: str, value: Any) -> bool:
    """``value`` as a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def check_int(name: str, value: Any, *, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    return value


def check_float(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = True,
) -> float:
    """``value`` as a finite float in the interval from ``low`` to ``high``; an infinite end is no bound."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        # An int beyond the largest float.
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    # Not math.isfinite: torch.compile cannot trace it for a number that it has made symbolic.
    if not (-math.inf < number < math.inf and above and below):
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{name} must be a finite number in {left}{low:g}, {high:g}{right}, got {shown(value)}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value``, which must be one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_regex(name: str, value: str) -> str:
    """``value``, which must be a regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from None
    return value


def check_patterns(name: str, value: Any) -> dict[str, Any]:
    """A copy of the dict ``value``, whose keys must be regular expressions; None gives an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dict of name patterns, got {value!r}")
    try:
        compile_patterns(tuple(value))
    except (re.error, OverflowError, RecursionError) as error:
        for key in value:
            check_regex(name, key)
        # As it is matched: a flag like (?i) may only begin a whole expression.
        pattern = getattr(error, "pattern", None)
        raise ValueError(
            f"{name} must be a regular expression that may follow other text, got {pattern!r}: {error}"
        ) from None
    return dict(value)


@lru_cache(8)
def compile_patterns(keys: tuple[str, ...]) -> tuple[re.Pattern[str], list[tuple[str, re.Pattern[str]]]]:
    """An expression for names that any of ``keys`` may match, and one for each key. Python itself keeps 512 of them."""
    each = []
    for key in keys:
        # By itself as well: ")(" is none.
        re.compile(key)
        each.append((key, re.compile(PATTERN.format(key))))
    # A key's groups have other numbers among other keys, and may refer to them.
    return re.compile("" if "(" in "".join(keys) else PATTERN.format("|".join(keys))), each


def shown(value: Any) -> str:
    """``value`` for a message; of a number with hundreds of digits the first."""
    try:
        text = str(value)
    except ValueError:
        # Python prints no int of more than 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:40]}… ({len(text)} characters)"
