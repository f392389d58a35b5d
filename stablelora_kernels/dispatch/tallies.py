"""How many calls have run in this process, and how."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from weakref import WeakKeyDictionary


@dataclass(eq=False, slots=True)
class Tally:
    """Calls of one op that ran in one way. Whoever runs one adds it.

    Attributes:
        op: "lora_linear_fwd", "lora_linear_bwd", "lora_mlp_fwd", ..., "stable_adamw" for the
            optimizer's steps. On PyTorch's operators forward and backward are one, "lora_linear".
        strategy: "one_launch", "branch_first", ...; "torch" for PyTorch's operators.
        reason: why, or what first use measured.
        calls: how many, since the process began.
    """

    op: str
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


# By module: the reasons why another library's forward computed its calls, and how often.
_fallbacks: WeakKeyDictionary[object, Counter[str]] = WeakKeyDictionary()


def note_fallback(module: object, reason: str) -> None:
    """Count a call that another library's forward computes."""
    _fallbacks.setdefault(module, Counter())[reason] += 1


def fallbacks_of(module: object) -> Counter[str]:
    """How many calls of ``module`` another library's forward has computed, by reason."""
    return _fallbacks.get(module, Counter())
