"""The suite's gated MLP: all arms compute the same, and each is what its name says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="has the MLP; the suite extra brings it")
pytest.importorskip("peft", reason="is an arm; the suite extra brings it")

from benchmarks.suite import test_layer
from benchmarks.suite.mlp import ACCELERATED, APART, FROZEN, FUSED, PEFT, PROJECTIONS, MLPCase

CPU = torch.device("cpu")


def opened(dtype: str = "fp32", dropout: float = 0.0) -> MLPCase:
    case = MLPCase(70, 10, 14, 3, dtype, CPU, dropout)
    case.open()
    return case


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_the_arms_compute_the_same(dtype: str, tolerance: float) -> None:
    case, results = opened(dtype), {}
    assert set(case.arms) == {FROZEN, case.rival, *case.ours}
    for arm in case.arms:
        parts = case.build(arm)
        # Twice: a round must leave nothing for the next.
        for part in [*parts.values()] * 2:
            part()
        mlp, x = case.shared["mlps"][arm], case.shared["x"]
        grads = [p.grad for p in mlp.parameters() if p.requires_grad]
        assert all(grad is not None for grad in grads)
        results[arm] = (mlp(x).detach(), x.grad, *grads)
    frozen, expected = results.pop(FROZEN), results.pop(PEFT)
    assert len(frozen) == 2 and len(expected) == 2 + 6
    assert not torch.allclose(frozen[0], expected[0], rtol=1e-3, atol=1e-4)
    for arm, found in results.items():
        for one, other in zip(found, expected, strict=True):
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale, msg=arm)


def test_all_arms_share_the_frozen_weights() -> None:
    case = opened()
    for arm in case.arms:
        case.build(arm)
    frozen = {p.data_ptr() for p in case.shared["frozen"].parameters()}
    for arm, mlp in case.shared["mlps"].items():
        assert {p.data_ptr() for p in mlp.parameters() if not p.requires_grad} == frozen, arm


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_only_fused_mlps_keep_less(dropout: float) -> None:
    case, saved = opened("bf16", dropout), {}
    for arm in case.arms:
        case.build(arm)
        saved[arm] = case.notes(arm)["saved_bytes"]
    assert saved[APART] == saved[PROJECTIONS] < saved[PEFT]
    # act(G) and H at least.
    elements = 2 * case.rows * case.inner
    states = 3 * torch.get_rng_state().numel() if dropout else 0
    for arm in (FUSED, ACCELERATED):
        assert saved[arm] <= saved[APART] - 2 * elements + states


def test_the_case_is_in_the_suite_under_its_mark() -> None:
    for suite in ("quick", "tiny"):
        found = [case for case in test_layer.cases(suite, CPU) if isinstance(case, MLPCase)]
        assert found and {case.mark for case in found} == {"mlp"}
        assert len({case.name for case in found}) == len(found)
