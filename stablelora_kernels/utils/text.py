"""Words for messages and reports."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """``number`` and ``noun``, in the plural unless it is one: "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def ends_of(name: str) -> list[str]:
    """A dotted name and what follows each of its dots: the names of ``target_modules`` that match it."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def unmatched_names(names: object, matched: Iterable[str]) -> str:
    """A message on those of ``target_modules`` that match none of the dotted names ``matched``, or an empty one.

    A regular expression has no parts to look at.
    """
    if not isinstance(names, (list, tuple, set, frozenset)):
        return ""
    missed = sorted(set(names).difference(*map(ends_of, matched)))
    verb = "matches" if len(missed) == 1 else "match"
    return f"target_modules {', '.join(map(repr, missed))} {verb} nothing" if missed else ""
