"""How many calls have run in this process, and how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Tally:
    """Calls of an op that ran in one way. Whoever runs one adds it."""

    op: str
    # A strategy, or "torch" for PyTorch's operators.
    strategy: str
    reason: str
    calls: int = 0


_tallies: dict[tuple[str, str, str], Tally] = {}


def tally_of(op: str, strategy: str, reason: str) -> Tally:
    """The tally of these calls."""
    return _tallies.setdefault((op, strategy, reason), Tally(op, strategy, reason))


def tallies() -> list[Tally]:
    """All that have a call."""
    return [tally for tally in [*_tallies.values()] if tally.calls]
