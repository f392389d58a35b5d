"""A case of the benchmark suite: arms that do the same work, timed in turns, and how their times compare."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any, ClassVar

from benchmarks.common.measure import shuffled, summarize, synchronize
from benchmarks.common.optimizers import Unavailable

# What one round of an arm does, part by part, in order.
Parts = dict[str, Callable[[], Any]]
# The seconds of each timed part, round by round.
Rounds = list[dict[str, float]]
WARMUP = 3


@dataclass(frozen=True)
class Case(ABC):
    """Arms over the same sizes and numbers. Subclasses are dataclasses, with a ``device`` and perhaps a ``dtype``."""

    # Ratios are to this arm.
    base: ClassVar[str]
    # The arm that ours has to beat: by what each adds to the base, unless the base is the rival itself.
    rival: ClassVar[str]
    # The first of these that runs here is pytest-benchmark's target.
    ours: ClassVar[tuple[str, ...]]
    arms: ClassVar[tuple[str, ...]]
    # The timed parts of each phase, which are added up. Parts before them run untimed.
    phases: ClassVar[dict[str, tuple[str, ...]]]
    # A pytest mark. Marked cases run only if ``-m`` names the mark.
    mark: ClassVar[str] = ""

    # What the arms of an open case share.
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str: ...

    def facts(self) -> dict[str, Any]:
        """Sizes and whatever else explains a figure, besides dtype and device."""
        names = [field.name for field in fields(self) if field.name not in ("dtype", "device", "shared")]
        return {"shape": {name: getattr(self, name) for name in names}}

    @abstractmethod
    def build(self, arm: str) -> Parts:
        """Raises :class:`Unavailable` if the arm can't run here."""

    def open(self) -> None:  # noqa: B027
        """Make what the arms share."""

    def check(self) -> None:  # noqa: B027
        """Raise if an arm did not do the work that the case is about."""

    def close(self) -> None:
        """Drop what the arms shared."""
        self.shared.clear()

    def notes(self, arm: str) -> dict[str, Any]:
        """Figures of an arm that are not times."""
        return {}


class Race:
    """The arms of an open case, each run once: that compiles, and shows which can't run before any is timed."""

    def __init__(self, case: Case, only: Collection[str] = ()) -> None:
        """``only``: the arms to run besides the base, the rival and one of ours, or all if empty."""
        self.case = case
        self.arms: dict[str, Parts] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, Exception] = {}
        case.open()
        for arm in case.arms:
            if not only or arm in {*only, case.base, case.rival}:
                self._add(arm)
        for arm in case.ours:
            if self.target is None and arm not in {*self.skipped, *self.failed}:
                self._add(arm)

    def _add(self, arm: str) -> None:
        try:
            self.arms[arm] = self.case.build(arm)
            for part in self.arms[arm].values():
                part()
        except Unavailable as reason:
            self.skipped[arm] = str(reason)
            self.arms.pop(arm, None)
        except Exception as error:
            self.failed[arm] = error
            self.arms.pop(arm, None)

    def close(self) -> None:
        self.arms.clear()
        self.case.close()

    @property
    def target(self) -> str | None:
        """Our arm that pytest-benchmark times."""
        return next((arm for arm in self.case.ours if arm in self.arms), None)

    def measure(self, benchmark: Any, phase: str, rounds: int) -> dict[str, Any] | None:
        """Time ``rounds`` rounds of all arms; return how they compare, or None if pytest-benchmark is disabled."""
        ours, samples = self.target, {arm: [] for arm in self.arms}
        others = self._others()

        def run_others() -> None:
            for arm in next(others):
                self._prepare(arm, phase)
                samples[arm].append(self._time(arm, phase))
            self._prepare(ours, phase)

        gc.collect()
        benchmark.pedantic(
            lambda: samples[ours].append(self._time(ours, phase)), setup=run_others, rounds=rounds, warmup_rounds=WARMUP
        )
        if benchmark.disabled:
            return None
        for arm, times in samples.items():
            if len(times) < len(samples[ours]):
                self._prepare(arm, phase)
                times.append(self._time(arm, phase))
        return self._report(phase, {arm: times[WARMUP:] for arm, times in samples.items()})

    def _others(self) -> Iterator[list[str]]:
        """The arms to run before each run of ours: those after it in the last round, and those before it in this one.

        Every round has an order of its own, so that each arm runs after each other one.
        """
        left: list[str] = []
        for turn in count(-WARMUP):
            order = shuffled(list(self.arms), turn)
            position = order.index(self.target)
            yield left + order[:position]
            left = order[position + 1 :]

    def _prepare(self, arm: str, phase: str) -> None:
        for name, part in self.arms[arm].items():
            if name == self.case.phases[phase][0]:
                break
            part()
        synchronize()

    def _time(self, arm: str, phase: str) -> dict[str, float]:
        seconds = {}
        for name in self.case.phases[phase]:
            start = time.perf_counter()
            self.arms[arm][name]()
            synchronize()
            seconds[name] = time.perf_counter() - start
        return seconds

    def _report(self, phase: str, samples: Mapping[str, Rounds]) -> dict[str, Any]:
        case = self.case
        arms = {arm: compare(case, samples, arm) | case.notes(arm) for arm in samples}
        return case.facts() | {
            "dtype": getattr(case, "dtype", "fp32"),
            "device": str(case.device),
            "case": case.name,
            "phase": phase,
            "target": self.target,
            "base": case.base,
            "rival": case.rival,
            "arms": arms,
            "skipped": dict(self.skipped),
            "failed": {arm: f"{type(error).__name__}: {error}" for arm, error in self.failed.items()},
        }


def compare(case: Case, samples: Mapping[str, Rounds], arm: str) -> dict[str, Any]:
    """An arm's milliseconds, and its ratios and differences to the base and the rival, taken round by round."""
    seconds = {name: [sum(times.values()) for times in rounds] for name, rounds in samples.items()}
    mine, base = seconds[arm], seconds[case.base]
    found: dict[str, Any] = {
        "ours": arm in case.ours,
        "ms": summarize([1e3 * time for time in mine]),
        "over_base": summarize(ratios(mine, base)),
        "overhead_ms": summarize([1e3 * (one - other) for one, other in zip(mine, base, strict=True)]),
    }
    if len(samples[arm][0]) > 1:
        found["parts"] = {part: _part(samples[arm], samples[case.base], base, part) for part in samples[arm][0]}
    if case.rival in samples:
        rival = seconds[case.rival]
        found["over_rival"] = summarize(ratios(mine, rival))
        theirs = summarize([other - one for other, one in zip(rival, base, strict=True)])["median"]
        # Medians: the overhead of a single round comes near zero.
        if case.rival != case.base and theirs > 0:
            found["overhead_over_rival"] = found["overhead_ms"]["median"] / (1e3 * theirs)
    return found


def _part(mine: Rounds, base: Rounds, whole: Sequence[float], part: str) -> dict[str, Any]:
    """A part's milliseconds, and what it adds to the base's part, in percent of the base's whole round."""
    added = [100 * (m[part] - b[part]) / total for m, b, total in zip(mine, base, whole, strict=True)]
    return {"ms": summarize([1e3 * times[part] for times in mine]), "added_percent": summarize(added)}


def ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, others, strict=True)]


def verdict(over_rival: Mapping[str, float]) -> str:
    """Faster or slower only if three of four rounds say so."""
    if over_rival["q3"] < 1:
        return "faster"
    return "SLOWER" if over_rival["q1"] > 1 else "level"


def size(*sizes: int) -> str:
    return "x".join(map(str, sizes))
