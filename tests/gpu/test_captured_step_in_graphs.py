"""A captured training step with real graphs: the tests of tests/test_captured_step.py on a GPU, at
larger sizes, and on the stream that users have.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tests.test_captured_step as steps
from tests.helpers.recorded_graphs import use_recorded_graphs

pytestmark = pytest.mark.gpu
globals().update({name: test for name, test in vars(steps).items() if name.startswith("test_")})


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recorded_graphs(monkeypatch)


def test_on_the_default_stream():
    """A user has no other. Warm-up and capture have streams of their own, replays run on this one:
    nothing may overtake batch or loss.
    """
    with nullcontext() if steps.SMALL else torch.cuda.stream(torch.cuda.default_stream()):
        steps.assert_replays_are_eager_steps(steps.OPTIONS["plain"])
