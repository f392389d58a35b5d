"""Random calls of every op against float64. The bound is twice eager PyTorch's own error, and one rounding of the sum of absolute
values, two where the rows of an operand are one, and as many as lie behind one another in a gated MLP.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.helpers.case_checks import calls, check
from tests.helpers.cases import Case, run

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("poisoned_outputs")]


# A call takes a tenth of what a sequence of optimizer steps does, and draws from five ops.
@settings(max_examples=max(100, settings.default.max_examples))
@given(calls())
def test_calls_are_no_worse_than_eager(case: Case) -> None:
    check(case, run(case), roundings=True)
