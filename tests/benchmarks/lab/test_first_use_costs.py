"""The command that counts what first use costs."""

from __future__ import annotations

import pytest

from benchmarks.lab import first_use


def test_its_table_adds_up_at_small_sizes(monkeypatch):
    pytest.importorskip("triton", reason="the launches are planned where Triton is installed")
    monkeypatch.setattr(first_use, "TOKENS", 256)
    monkeypatch.setattr(first_use, "LAYERS", {"q": (128, 64)})
    monkeypatch.setattr(first_use, "MLP", (64, 128, 64))
    costs = first_use.costs()
    assert [*costs] == ["q, forward", "q, backward", "fused MLP, forward", "fused MLP, backward"]
    for kind, cost in costs.items():
        # One launch, and the branch with the vendor's product; an MLP has three projections.
        assert cost.strategies[0] == "one_launch" and cost.strategies[-1] == "branch_first", kind
        assert cost.proof_launches == 2 * cost.launches
        assert cost.launches == 3 if kind.startswith("q") else cost.launches > 6
    forward = costs["q, forward"]
    # A stand-in for x, and Y, in bfloat16; and the products of 1 row in 16 and more in float64.
    assert forward.peak_bytes > 2 * 256 * (64 + 128)
    assert forward.operations >= 2 * 2 * (256 // 16) * 64 * 128
    table = first_use.table()
    assert table.count("\n") == 2 + len(costs) - 1 and "| 6 | 15 to 36 |" in table
