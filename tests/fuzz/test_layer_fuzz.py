"""Random calls of every op against float64, within the bound of
:func:`stablelora_kernels.testing.assert_no_worse`.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from stablelora_kernels.testing.cases import Case, run
from tests.helpers.case_checks import calls, check

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]


# A call takes a tenth of what a sequence of optimizer steps does, and draws from five ops.
@settings(max_examples=max(100, settings.default.max_examples))
@given(calls())
def test_calls_are_no_worse_than_eager(case: Case) -> None:
    check(case, run(case), where_eager_is_finite=True)
