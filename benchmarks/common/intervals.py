"""Means, ratios, slopes and half the width of their 95 % intervals by Student's t; nan if there are
too few values for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import stats


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean."""
    series = pd.Series([*values])
    return float(series.mean()), float(stats.t.ppf(0.975, len(series) - 1) * series.sem())


def ratio_of_totals(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """sum(above) / sum(below) of pairs."""
    ratio = float(np.sum(above) / np.sum(below))
    # How far each pair is from the ratio, in units of the mean below. These have a mean of zero.
    return ratio, interval((np.asarray(above) - ratio * np.asarray(below)) / np.mean(below))[1]


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """The slope of log value against log size by least squares.

    Points at or below zero are left out. None if fewer than three remain, or all have one size.
    """
    points = [(np.log(a), np.log(b)) for a, b in zip(sizes, values, strict=True) if b > 0]
    if len(points) < 3 or len({x for x, _ in points}) == 1:
        return None
    line = stats.linregress(*zip(*points, strict=True))
    return float(line.slope), float(stats.t.ppf(0.975, len(points) - 2) * line.stderr)
