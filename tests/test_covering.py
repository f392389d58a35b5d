"""The selection of parameters for every run: each value and each pair is in it, it is small, and
the night has the rest.
"""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest

from tests.helpers.covering import covering

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", [(4, 3, 4, 2), (5, 4, 3), (7,)], ids=str)
def test_the_selection_is_complete_and_small(sizes, strength):
    rows = [
        dict(zip("abcde", values, strict=False))
        for values in product(*map(range, sizes))
        if sum(values)
    ]
    kept = [rows[place] for place in covering(rows, strength)]
    parts = [
        {part for row in of for part in combinations(row.items(), min(strength, len(row)))}
        for of in (rows, kept)
    ]
    assert parts[0] == parts[1]
    assert len(kept) <= 1.5 * prod(sorted(sizes)[-strength:])


def test_the_night_has_the_rest(pytester):
    test = "@pytest.mark.covering(1)\n@pytest.mark.parametrize('p', [0, 1])\ndef test_it(letter, p): pass"
    fixture = (
        "import pytest\n@pytest.fixture(params='xyz')\ndef letter(request): return request.param\n"
    )
    pytester.makeconftest("from tests.conftest import pytest_collection_modifyitems  # noqa: F401")
    pytester.makepyfile(fixture + test)
    pytester.inline_run().assertoutcome(passed=3)
    pytester.inline_run("-m", "nightly or not nightly").assertoutcome(passed=6)
