"""Flags of chained launches, of which a GPU has a limited number."""

from __future__ import annotations

import pytest

from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS, Tile
from tests.helpers.cases import BF16, FP32


@pytest.mark.parametrize("device", problem.DEVICES.values(), ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_flags_fit_into_a_lane(device, dtype):
    """A flag stands for 64 rows or more; a call with more rows than that many flags have is refused."""
    most = Call("forward", tiles.MAX_CHAINED_M, 4096, 4096, 16, dtype, FP32, True)
    rows = tiles.chained_shrink_plan(device, most, Tile(64, 64, 32, 4, 3)).tile.BLOCK_M
    assert rows >= 64 and tiles.CHAIN_HEAD + -(-most.m // rows) <= MAX_SHARED_SUMS
    rules.check_possible(most, "chained")
    with pytest.raises(ValueError, match=f"up to {most.m} rows, got {most.m + 1}"):
        rules.check_possible(most._replace(m=most.m + 1), "chained")
