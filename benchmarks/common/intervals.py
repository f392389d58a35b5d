"""Means, ratios, slopes and their 95 % intervals by Student's t, without SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    # Beyond the table this expansion has three correct digits.
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.4 / degrees


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval (nan for a single value)."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), student95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


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
    if (count := len(points)) < 3 or len({x for x, _ in points}) == 1:
        return None
    mean_x, mean_y = (statistics.fmean(axis) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, student95(count - 2) * math.sqrt(rest / (count - 2) / spread)
