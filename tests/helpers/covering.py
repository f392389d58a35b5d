"""A selection of a test's parameters for every run; the rest of the cross product runs at night.

``@pytest.mark.covering`` above a test keeps every value of every parameter, and every pair of two
parameters' values. ``@pytest.mark.covering(1)`` keeps every value only. Fixtures' parameters count.
On a GPU, where kernels are quick, all stay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import pytest


def covering(rows: Sequence[Mapping[str, int]], strength: int = 2) -> list[int]:
    """Return the places of a few ``rows`` that have every ``strength`` values that some row has
    together.

    A row maps parameters' names to numbers that stand for their values. The next row is always the
    one that adds the most; of several, the one whose parts were taken least often, and the first of
    those. So the same rows give the same places.
    """
    parts = [set(combinations(sorted(row.items()), min(strength, len(row)))) for row in rows]
    holders: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for place, row in enumerate(parts):
        for part in row:
            holders[part].append(place)
    taken: Counter[tuple[tuple[str, int], ...]] = Counter()
    added = [len(row) for row in parts]
    chosen = []
    while most := max(added, default=0):
        equal = [place for place, count in enumerate(added) if count == most]
        best = min(equal, key=lambda place: sum(taken[part] for part in parts[place]))
        chosen.append(best)
        for part in parts[best]:
            for place in holders.pop(part, ()):
                added[place] -= 1
        taken.update(parts[best])
    return sorted(chosen)


def leave_the_rest_to_the_night(items: Iterable[pytest.Item]) -> None:
    """Mark as nightly what the selections of marked tests do not hold. A parameter that is nightly
    anyway takes no part.
    """
    tests: dict[tuple[str, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if isinstance(item, pytest.Function) and "covering" in marks and "nightly" not in marks:
            tests[item.parent.nodeid, item.originalname].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("covering")
        # All cases get the same objects.
        rows = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        kept = covering(rows, *mark.args)
        for place in set(range(len(cases))) - set(kept):
            cases[place].add_marker(pytest.mark.nightly)
