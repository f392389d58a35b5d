"""A case of the benchmark suite: arms that do the same work, timed in turns, and how their times
compare.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import numpy as np

from benchmarks.common.measure import seconds_of, shuffled, synchronize
from benchmarks.common.optimizers import Unavailable
from benchmarks.common.records import record

# What one round of an arm does, part by part, in order.
Parts = dict[str, Callable[[], Any]]
# The seconds of each timed part, round by round.
Rounds = list[dict[str, float]]
Row = dict[str, Any]
WARMUP = 3
# In place of a metric: why an arm was not timed.
REASONS = ("skipped", "FAILED")


@dataclass(frozen=True)
class Case(ABC):
    """Arms over the same sizes and numbers. Subclasses are dataclasses with a ``device``."""

    # Ratios are to this arm.
    base: ClassVar[str]
    # The arm that ours has to beat: by what each adds to the base, unless the base is the rival
    # itself.
    rival: ClassVar[str]
    # The first of these that runs here is pytest-benchmark's target.
    ours: ClassVar[tuple[str, ...]]
    arms: ClassVar[tuple[str, ...]]
    # The timed parts of each phase, which are added up. Parts before them run untimed.
    phases: ClassVar[dict[str, tuple[str, ...]]]
    # A pytest mark. Marked cases run only if ``-m`` names the mark.
    mark: ClassVar[str] = ""
    # A timed part makes so many calls; reported times are of one call.
    calls: ClassVar[int] = 1

    # The size that varies, if the case is one point of an axis of sizes. Of such a case only the
    # last phase, the base, the rival and one of our arms run.
    axis: str = field(default="", kw_only=True)
    # What the arms of an open case share.
    shared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str: ...

    def facts(self) -> dict[str, Any]:
        """Further columns of the case's records."""
        return {}

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
        """Figures of an arm besides its times; a list has several samples."""
        return {}


class Race:
    """The arms of an open case, each run once: that compiles, and shows which can't run before any
    is timed.
    """

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
            parts = self.case.build(arm)
            for part in parts.values():
                part()
        except Unavailable as reason:
            self.skipped[arm] = str(reason)
        except Exception as error:
            self.failed[arm] = error
        else:
            self.arms[arm] = parts

    def close(self) -> None:
        self.arms.clear()
        self.case.close()

    @property
    def target(self) -> str | None:
        """Our arm that pytest-benchmark times."""
        return next((arm for arm in self.case.ours if arm in self.arms), None)

    def measure(self, benchmark: Any, phase: str, rounds: int) -> list[Row]:
        """Time ``rounds`` rounds of all arms; return the records, of which there are none if
        pytest-benchmark is disabled.
        """
        ours, samples = self.target, {arm: [] for arm in self.arms}
        # Every round has an order of its own, so that each arm runs after each other one.
        schedule = (arm for turn in count(-WARMUP) for arm in shuffled([*self.arms], turn))

        def run_others() -> None:
            for arm in schedule:
                self._prepare(arm, phase)
                if arm == ours:
                    break
                samples[arm].append(self._time(arm, phase))

        gc.collect()
        benchmark.pedantic(
            lambda: samples[ours].append(self._time(ours, phase)),
            setup=run_others,
            rounds=rounds,
            warmup_rounds=WARMUP,
        )
        if benchmark.disabled:
            return []
        for arm, times in samples.items():
            # Arms after ours in the last round.
            if len(times) < len(samples[ours]):
                self._prepare(arm, phase)
                times.append(self._time(arm, phase))
        return self.records(phase, {arm: times[WARMUP:] for arm, times in samples.items()})

    def _prepare(self, arm: str, phase: str) -> None:
        for name, part in self.arms[arm].items():
            if name == self.case.phases[phase][0]:
                break
            part()
        synchronize()

    def _time(self, arm: str, phase: str) -> dict[str, float]:
        return seconds_of(self.arms[arm], self.case.phases[phase])

    def records(self, phase: str, samples: Mapping[str, Rounds]) -> list[Row]:
        """A row for each figure of each arm, and one with the reason for each arm that did not run."""
        rows = []
        for arm in samples:
            for metric, values in (times(self.case, samples, arm) | self.case.notes(arm)).items():
                rows.append(self._row(phase, arm, metric, np.atleast_1d(values).tolist()))
        failed = {arm: f"{type(error).__name__}: {error}" for arm, error in self.failed.items()}
        for metric, reasons in zip(REASONS, (self.skipped, failed), strict=True):
            rows += [
                self._row(phase, arm, metric, [np.nan]) | {"reason": why}
                for arm, why in reasons.items()
            ]
        return rows

    def _row(self, phase: str, arm: str, metric: str, values: Any) -> Row:
        case = self.case
        roles = {"base": arm == case.base, "rival": arm == case.rival, "ours": arm in case.ours}
        role = " ".join(name for name, has in roles.items() if has)
        return record(case.name, phase, arm, metric, values, role) | case.facts()


def times(case: Case, samples: Mapping[str, Rounds], arm: str) -> dict[str, np.ndarray]:
    """An arm's milliseconds, and its ratios and differences to the base and the rival, taken round
    by round.

    A part's ``added_percent`` is what it adds to the base's part, in percent of the base's whole
    round.
    """
    seconds = {
        name: np.array([sum(parts.values()) for parts in rounds])
        for name, rounds in samples.items()
    }
    mine, base, ms = seconds[arm], seconds[case.base], 1e3 / case.calls
    found = {"ms": ms * mine, "over_base": mine / base, "overhead_ms": ms * (mine - base)}
    if case.rival in seconds:
        found["over_rival"] = mine / seconds[case.rival]
    parts = [*samples[arm][0]]
    for part in parts if len(parts) > 1 else ():
        own, other = (
            np.array([times[part] for times in samples[name]]) for name in (arm, case.base)
        )
        found |= {f"{part} ms": ms * own, f"{part} added_percent": 100 * (own - other) / base}
    return found
