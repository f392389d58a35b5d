"""Names of modules and parameters, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

# How the keys of a pattern dict are matched: as regular expressions for a dotted name or its end
# after a dot.
PATTERN = r"(.*\.)?({})$"


def ends_of(name: str) -> list[str]:
    """A dotted name and what follows each of its dots: the names of ``target_modules`` that match
    it.
    """
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def unmatched_names(names: object, matched: Iterable[str], what: str = "target_modules") -> str:
    """A message on those of ``target_modules``, or ``what``, that match none of the dotted names
    ``matched``, or an empty one.

    A regular expression has no parts to look at.
    """
    if not isinstance(names, (list, tuple, set, frozenset)):
        return ""
    missed = sorted(set(names).difference(*map(ends_of, matched)))
    verb = "matches" if len(missed) == 1 else "match"
    return f"{what} {', '.join(map(repr, missed))} {verb} nothing" if missed else ""


def check_regex(name: str, value: str) -> str:
    """``value``, which must be a regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from None
    return value


def check_patterns(name: str, value: Any) -> dict[str, Any]:
    """A copy of the dict ``value``, whose keys must be regular expressions; None gives an empty
    one.
    """
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
def compile_patterns(
    keys: tuple[str, ...],
) -> tuple[re.Pattern[str], list[tuple[str, re.Pattern[str]]]]:
    """An expression for names that any of ``keys`` may match, and one for each key. Python itself
    keeps 512 of them.
    """
    each = []
    for key in keys:
        # By itself as well: ")(" is none.
        re.compile(key)
        each.append((key, re.compile(PATTERN.format(key))))
    # A key's groups have other numbers among other keys, and may refer to them.
    return re.compile("" if "(" in "".join(keys) else PATTERN.format("|".join(keys))), each


def lookup_pattern(patterns: Mapping[str, Any], names: Collection[str], default: Any) -> Any:
    """The value of the first key of ``rank_pattern`` or the like that matches one of ``names``, or
    ``default``.
    """
    any_key, each = compile_patterns(tuple(patterns))
    if any(map(any_key.match, names)):
        return next(
            (patterns[key] for key, pattern in each if any(map(pattern.match, names))), default
        )
    return default


def unmatched_patterns(patterns: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The keys of ``rank_pattern`` or the like that match none of ``names``."""
    return [
        key
        for key, pattern in compile_patterns(tuple(patterns))[1]
        if not any(map(pattern.match, names))
    ]
