"""Forward, backward and the optimizer's step in CUDA graphs: replays on new inputs give the same
bits as eager calls.

All three in one graph: test_captured_step.
"""

from __future__ import annotations

import pytest
import torch

import tests.optim.test_capture as captures
from stablelora_kernels.testing import cases, keep_of
from stablelora_kernels.testing.cases import Case, Operands, Results
from tests.helpers.case_checks import assert_close
from tests.helpers.gpu_checks import SMALL, capture, check, linear, make, record
from tests.helpers.recorded_graphs import use_recorded_graphs

pytestmark = pytest.mark.gpu

SIZES = (
    ((9, 40, 24, 8), (70, 48, 40, 8))
    if SMALL
    else ((16, 4096, 4096, 16), (257, 520, 1032, 40), (2048, 4096, 4096, 16))
)
REPLAYS = 3


def backward(case: Case, leaf: Operands, y: torch.Tensor) -> Results:
    names = case.wanted_names
    grads = (
        torch.autograd.grad(y, [leaf[name] for name in names], leaf["grad0"], retain_graph=True)
        if names
        else ()
    )
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("wanted", [(), None], ids=["forward", "both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_call(size, wanted):
    case = linear(*size).but(wanted=wanted)
    sources = [make(case.but(seed=seed)) for seed in range(REPLAYS)]
    leaf = cases.leaves(case, {name: t.clone() for name, t in sources[0].items()})

    def run_once() -> Results:
        (y,) = cases.ours(case, leaf)
        return {"Y0": y.detach(), **backward(case, leaf, y)}

    captured = capture(run_once)
    for source in sources:
        for name, t in source.items():
            leaf[name].detach().copy_(t)
        captured.replay()
        assert_close(cases.run(case, source), captured.outputs)


@pytest.mark.parametrize("size", SIZES[:1] if SMALL else SIZES, ids=str)
def test_backward_of_an_earlier_forward_draws_no_mask_and_a_captured_forward_draws_one_a_replay(
    size, record_property
):
    case = linear(*size, 0.1)
    leaf = cases.leaves(case, make(case))

    def both() -> Results:
        (y,) = cases.ours(case, leaf)
        return {"Y0": y.detach(), **backward(case, leaf, y), "keep": keep_of(y, leaf["x"])}

    (y,) = cases.ours(case, leaf)
    captured, earlier = capture(both), capture(lambda: backward(case, leaf, y))
    masks, worst = set(), (0.0, "")
    for turn in range(REPLAYS):
        leaf["grad0"].copy_(make(case.but(seed=turn))["grad0"])
        earlier.replay()
        assert_close(backward(case, leaf, y), earlier.outputs)
        captured.replay()
        found = dict(captured.outputs)
        keep = found.pop("keep")
        masks.add(keep.cpu().numpy().tobytes())
        worst = max(worst, check(case, leaf, found, keep))
    assert len(masks) == REPLAYS, f"{REPLAYS} replays drew {len(masks)} different masks"
    record(record_property, worst)


# The optimizer's step alone, with gradients that its user owns.
test_replays_are_steps = captures.test_replays_are_steps


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recorded_graphs(monkeypatch)
