"""What the experiment's times decide: a verdict for each open question, with its number."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd

from benchmarks.lab.gpu.experiment import (
    CHAINED,
    CHAINED_BACKWARD,
    DX,
    FIRST,
    FIRST_BACKWARD,
    SPECIALIZED,
    SPECIALIZED_DX,
    SPECIALIZED_Y,
    TODAY,
    VENDOR,
    Y_FROM_S,
    S,
    in_pairs,
)

UNKNOWN = "not measured"
# The specialized product is worth its lines if it is this much faster than today's; pairs, than it.
WORTH, PAIRS_WORTH = 0.03, 0.02
# S is hidden if it adds less than this share of its own time to the launch that it shares.
HIDDEN = 0.25
# Microseconds by arm, at one number of rows.
Times = dict[str, float]


class Question(NamedTuple):
    """``figure`` of one number of rows, in ``form``; the median over the rows decides. ``least``:
    from which figure on the answer is ``yes``.
    """

    words: str
    arms: tuple[str, ...]
    figure: Callable[[Times], float]
    least: float
    yes: str
    no: str
    form: str = "{:.3f}"

    def verdict(self, times: Sequence[Times]) -> str:
        figures = [self.figure(each) for each in times if {*self.arms} <= {*each}]
        if not figures:
            return f"{UNKNOWN}: {self.words}"
        middle = statistics.median(figures)
        answer = self.yes if middle >= self.least else self.no
        shown = ", ".join(self.form.format(figure) for figure in figures)
        decides = self.form.format(self.least)
        return f"{answer}: {self.words}: {shown} (median against {decides})"


def _gain(words: str, slower: str, faster: str, least: float, yes: str, no: str) -> Question:
    """By which share ``slower`` takes longer than ``faster``."""
    return Question(
        words,
        (slower, faster),
        lambda times: times[slower] / times[faster] - 1,
        least,
        yes,
        no,
        "{:+.1%}",
    )


def _share(words: str, arm: str) -> Question:
    """The share of the vendor's speed that ``arm`` reaches."""
    # Above this share the model's chained launch is the faster one: docs/internals/predictions.md.
    return Question(
        words,
        (VENDOR, arm),
        lambda times: times[VENDOR] / times[arm],
        0.97,
        "as fast as the vendor's",
        "below the vendor's",
    )


GO, STOP, KEEP, LEAVE = "go on", "stop", "keep pairs", "leave pairs"
QUESTIONS = (
    _share("share of the vendor's product that today's product reaches", TODAY),
    _share("share of the vendor's product that the specialized product reaches", SPECIALIZED),
    _gain("what the specialized product gains on today's", TODAY, SPECIALIZED, WORTH, GO, STOP),
    _gain("the same, Y from S", Y_FROM_S, SPECIALIZED_Y, WORTH, GO, STOP),
    _gain("the same, dX", DX, SPECIALIZED_DX, WORTH, GO, STOP),
    _gain("what pairs add", SPECIALIZED, in_pairs(SPECIALIZED), PAIRS_WORTH, KEEP, LEAVE),
    _gain("the same, Y from S", SPECIALIZED_Y, in_pairs(SPECIALIZED_Y), PAIRS_WORTH, KEEP, LEAVE),
    _gain("the same, dX", SPECIALIZED_DX, in_pairs(SPECIALIZED_DX), PAIRS_WORTH, KEEP, LEAVE),
    _gain(
        "what branch first gains on chained, forward",
        CHAINED,
        FIRST,
        0.0,
        "branch first",
        "chained",
    ),
    _gain(
        "the same, backward",
        CHAINED_BACKWARD,
        FIRST_BACKWARD,
        0.0,
        "branch first",
        "chained",
    ),
    Question(
        "share of S's time that the chained launch hides",
        (CHAINED, Y_FROM_S, S),
        lambda times: 1 - (times[CHAINED] - times[Y_FROM_S]) / times[S],
        1 - HIDDEN,
        "S is hidden",
        "S is not hidden",
    ),
)


def verdicts(times: pd.DataFrame) -> list[str]:
    """A line for each question, without dropout and with it. ``times``: rows in microseconds."""
    rows = times[times.section == "specialized"]
    lines = []
    for dropout in (0.0, 0.1):
        at_rows = rows[rows.dropout == dropout].groupby("m")
        known = [timed.groupby("arm")["median"].median().to_dict() for _, timed in at_rows]
        lines += [f"dropout {dropout}: {question.verdict(known)}" for question in QUESTIONS]
    return lines
