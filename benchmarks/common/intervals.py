"""Means, ratios, slopes and their 95 % intervals by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


def student95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    return float(stats.t.ppf(0.975, degrees))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval (nan for a single value)."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), student95(len(values) - 1) * float(stats.sem(values))


def ratio_of_totals(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """sum(above) / sum(below) of pairs, and half the width of its 95 % interval (nan for a single pair)."""
    ratio, count = sum(above) / sum(below), len(above)
    if count < 2:
        return ratio, math.nan
    # How far each pair is from the ratio, in units of the mean below.
    squares = sum((y - ratio * x) ** 2 for y, x in zip(above, below, strict=True))
    return ratio, student95(count - 1) * math.sqrt(squares / (count - 1) / count) / statistics.fmean(below)


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """The slope of log value against log size by least squares, and half the width of its 95 % interval.

    Points at or below zero are left out. None if fewer than three remain, or all have one size.
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(sizes, values, strict=True) if b > 0]
    if len(points) < 3 or len({x for x, _ in points}) == 1:
        return None
    line = stats.linregress(*zip(*points, strict=True))
    return float(line.slope), student95(len(points) - 2) * float(line.stderr)
