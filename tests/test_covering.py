"""The selection of parameters for every run: each pair is in it, it is small, and the night has the rest."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import prod

import pytest

from tests.helpers.covering import covering, leave_the_rest_to_the_night

pytest_plugins = ["pytester"]
SIZES = [(2, 2), (4, 3, 4, 2), (3, 3, 2, 2, 2), (5, 4, 3), (7,)]


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_value_and_every_pair_is_in_it(sizes, strength):
    rows = [dict(zip("abcde", values, strict=False)) for values in product(*map(range, sizes))]
    kept = [rows[place] for place in covering(rows, strength)]

    def parts(of):
        return {part for row in of for part in combinations(row.items(), min(strength, len(row)))}

    assert parts(kept) == parts(rows)
    assert len(kept) <= 1.5 * prod(sorted(sizes)[-strength:])


def test_rows_that_do_not_exist_are_not_wanted():
    rows = [{"kernel": 0, "p": 0}, {"kernel": 1, "p": 0}, {"kernel": 1, "p": 1}]
    assert covering(rows) == [0, 1, 2] and covering(rows, 1) == [0, 2] and covering([]) == []


def test_values_take_turns():
    """Ten cases on two GPUs: five on each."""
    rows = [{"case": case, "arch": arch} for case in range(10) for arch in range(2)]
    assert sum(rows[place]["arch"] for place in covering(rows, 1)) == 5


TESTS = """
import pytest
@pytest.fixture(params="xy")
def letter(request): return request.param
@pytest.mark.covering
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize("r", [0, 1, pytest.param(9, marks=pytest.mark.nightly)])
def test_pairs(letter, r, p): pass
@pytest.mark.covering(1)
@pytest.mark.parametrize("p", [0, 1])
def test_values(letter, p): pass
@pytest.mark.parametrize("p", [0, 1])
def test_all(letter, p): pass
"""


def test_the_night_has_the_rest(pytester):
    items = pytester.getitems(TESTS)
    leave_the_rest_to_the_night(items)
    by_day = Counter(item.originalname for item in items if item.get_closest_marker("nightly") is None)
    assert by_day == {"test_pairs": 4, "test_values": 2, "test_all": 4} and len(items) == 12 + 4 + 4
