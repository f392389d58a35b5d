"""``GraphedStep`` with real graphs: the tests of tests/graphed_step on a GPU, at larger sizes, and
what only a GPU shows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import tests.graphed_step.test_graphed_refusals as refusals
import tests.graphed_step.test_graphed_steps as steps
from tests.helpers.graphed_steps import (
    DEVICE,
    SMALL,
    assert_eager_steps,
    batches,
    graphed,
    llama_with,
    use_graphs,
)

pytestmark = pytest.mark.gpu

shared = refusals.shared
test_a_change_after_the_capture_is_noticed = refusals.test_a_change_after_the_capture_is_noticed
test_a_change_that_stays_needs_a_reset = refusals.test_a_change_that_stays_needs_a_reset
test_a_step_that_a_graph_cannot_hold_is_refused = (
    refusals.test_a_step_that_a_graph_cannot_hold_is_refused
)
test_a_refused_call_takes_no_step = refusals.test_a_refused_call_takes_no_step
globals().update({name: test for name, test in vars(steps).items() if name.startswith("test_")})


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    return use_graphs(monkeypatch)


def test_on_the_default_stream():
    """A user has no other. The warm-up runs on a side stream, replays on this one: nothing may
    overtake batch or loss.
    """
    with nullcontext() if SMALL else torch.cuda.stream(torch.cuda.default_stream()):
        assert_eager_steps(batches())


def test_padding():
    """transformers reads the mask, to leave it out, unless a graph captures. It must not be left
    out in replays.
    """
    model, optimizer = llama_with("our layers", "sdpa")
    optimizer.param_groups[0].update(lr=0.0, shrink_ratio=0.0)
    step = graphed(model, optimizer, None)
    ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(0))
    for length in (12, 12, 12, 12, 9, 5, 12):
        mask = torch.ones_like(ids)
        mask[1, length:] = 0
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }
        with torch.no_grad():
            expected = model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
        assert torch.allclose(step(batch), expected, rtol=1e-2), length
    assert len(step.captured) == 1
