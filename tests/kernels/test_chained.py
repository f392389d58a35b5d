"""Flags of chained launches, of which a GPU has a limited number."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS, Tile
from stablelora_kernels.launch import counters
from tests.helpers.case_checks import check
from tests.helpers.cases import BF16, DEVICE, FP32, TINY, Case, run


@pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended")
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_rows_beyond_the_flags_share_them(arch, monkeypatch):
    """Four flags, and rows for ten: each stands for more tiles of S, and dA's programs wait for several."""
    monkeypatch.setattr(tiles, "MAX_SHARED_SUMS", tiles.CHAIN_HEAD + 4)
    case = Case("linear", (600, 40), (48,), (20,), BF16, FP32, p=0.2, kernel="chained", arch=arch, tile=TINY)
    check(case, run(case))
    assert not counters.counters(MAX_SHARED_SUMS, torch.device("cpu"), lane=4).any()


@pytest.mark.parametrize("m", [1, 64, 4096, 262_081, 10**9])
def test_flags_fit_into_a_lane(m):
    product, s = Tile(128, 256, 64, 8, 3), Tile(64, 64, 128, 4, 3)
    rows = tiles.flag_rows(m, product, s)
    assert rows % product.BLOCK_M == 0 and rows % s.BLOCK_M == 0
    flags = -(-m // rows)
    assert tiles.CHAIN_HEAD + flags <= MAX_SHARED_SUMS
    assert rows == 128 or 2 * flags > MAX_SHARED_SUMS - tiles.CHAIN_HEAD - 1
