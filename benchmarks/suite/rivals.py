"""A case of the benchmark suite: arms that do the same work, sampled together, and what their samples say."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from benchmarks.common.measure import interleave_parts, summarize
from benchmarks.common.optimizers import Unavailable

# One arm: what a round of it does, part by part. A part named "prepare" is timed by nobody.
Parts = dict[str, Callable[[], None]]
WARMUP = 3


class Case(ABC):
    """Arms over the same sizes and numbers. Subclasses are frozen dataclasses: equal cases are sampled once."""

    # Ratios are to this arm, which adds nothing that could be saved.
    base: ClassVar[str]
    # The arm that ours has to beat: by what each adds to the base, where the base is not the rival itself.
    rival: ClassVar[str]
    ours: ClassVar[tuple[str, ...]]
    # What is reported, as the parts whose times are added up.
    phases: ClassVar[dict[str, tuple[str, ...]]]

    arms: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Shape, dtype and whatever else a figure needs beside it."""

    @abstractmethod
    def build(self, arm: str) -> Parts:
        """Raises :class:`Unavailable` where the arm can't run here."""

    def open(self) -> None:  # noqa: B027
        """Make what the arms share."""

    def close(self) -> None:  # noqa: B027
        """Raise if the arms have not been what they were to be; let go of what they shared."""


@dataclass
class Outcome:
    """What sampling a case gave: samples by arm and part, and why an arm has none."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)

    def seconds(self, case: Case, phase: str, arm: str) -> list[float]:
        parts = self.samples[arm]
        return [sum(times) for times in zip(*(parts[part] for part in case.phases[phase]), strict=True)]


def sample(case: Case, wanted: Collection[str], iters: int) -> Outcome:
    """All ``wanted`` arms of ``case``, and those they are compared with, in turns. With ``iters`` 0 each runs only once."""
    try:
        return _sample(case, wanted, iters)
    except Exception as error:
        # Past an arm's first round nothing is one arm's matter alone.
        return Outcome(errors=dict.fromkeys(case.arms, error))


def _sample(case: Case, wanted: Collection[str], iters: int) -> Outcome:
    arms: dict[str, Parts] = {}
    outcome = Outcome()
    case.open()
    try:
        for arm in case.arms:
            if arm not in {*wanted, case.base, case.rival}:
                continue
            try:
                arms[arm] = case.build(arm)
                # The first round compiles, and tells which arms can't run before any has been timed.
                for part in arms[arm].values():
                    part()
            except Unavailable as reason:
                outcome.skipped[arm] = str(reason)
                arms.pop(arm, None)
            except Exception as error:
                outcome.errors[arm] = error
                arms.pop(arm, None)
        if iters and arms:
            gc.collect()
            outcome.samples = interleave_parts(arms, warmup=WARMUP, iters=iters)
    finally:
        arms.clear()
        case.close()
    return outcome


def compare(case: Case, outcome: Outcome, phase: str, arm: str) -> dict[str, Any]:
    """What goes beside an arm's samples: everything relative, round by round."""
    seconds, base = (outcome.seconds(case, phase, name) for name in (arm, case.base))
    found: dict[str, Any] = {
        "base": case.base,
        "over_base": summarize(ratios(seconds, base)),
        "overhead_ms": summarize([1e3 * (one - other) for one, other in zip(seconds, base, strict=True)]),
        "parts_ms": {part: 1e3 * summarize(outcome.samples[arm][part])["median"] for part in case.phases[phase]},
    }
    if case.rival in outcome.samples:
        rival = outcome.seconds(case, phase, case.rival)
        found |= {"rival": case.rival, "over_rival": summarize(ratios(seconds, rival))}
        theirs = summarize([other - one for other, one in zip(rival, base, strict=True)])["median"]
        # Of medians: single rounds' overheads come near zero.
        if case.rival != case.base and theirs > 0:
            found["overhead_over_rival"] = found["overhead_ms"]["median"] / (1e3 * theirs)
    return found


def ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, others, strict=True)]


def verdict(over_rival: Mapping[str, float]) -> str:
    """Faster or slower only where three of four rounds say so."""
    if over_rival["q3"] < 1:
        return "faster"
    return "SLOWER" if over_rival["q1"] > 1 else "level"


def size(*sizes: int) -> str:
    return "x".join(map(str, sizes))
