"""Chained launches: one forward and one backward, whatever the rows, the rank, the dropout and the strides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem, tiles
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS, Tile, TileRule
from stablelora_kernels.launch import counters
from tests.helpers.inputs import BF16, DEVICE, FP32, make_inputs
from tests.helpers.oracle import check, run, run_dropped

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


@pytest.fixture(params=["sm_80", "sm_90", "gfx942"])
def arch(request, monkeypatch):
    """The interpreter stands in for this GPU."""
    monkeypatch.setattr(problem, "device_of", lambda device: DEVICES[request.param])
    return request.param


def chain() -> torch.Tensor:
    """The chain of the launches so far."""
    return counters.counters(MAX_SHARED_SUMS, torch.device("cpu"), lane=4)


def test_the_chain_is_zero_again(arch):
    inputs = make_inputs((70, 64), 48, 16, dtype=BF16, lora_dtype=FP32)
    with slk.use_kernel("chained"):
        first, second = run(inputs, "triton"), run(inputs, "triton")
        assert not chain().any()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_rows_beyond_the_flags_share_them(arch, monkeypatch):
    """Four flags, and rows for ten: each stands for more tiles of S, and dA's programs wait for several."""
    for name in ("TMA_TILES", "LINEAR_TILES", "SHRINK_TILES", "WEIGHT_GRADS_TILES"):
        monkeypatch.setattr(tiles, name, (TileRule(lambda d, c: True, Tile(16, 32, 16, 4, 2), "a test"),))
    monkeypatch.setattr(tiles, "MAX_SHARED_SUMS", tiles.CHAIN_HEAD + 4)
    inputs = make_inputs((600, 40), 48, 20, dtype=BF16, lora_dtype=FP32)
    with slk.use_kernel("chained"):
        check(inputs, *run_dropped(inputs, "triton", 0.2))
    assert not chain().any()


@pytest.mark.parametrize("m", [1, 64, 4096, 262_081, 10**9])
def test_flags_fit_into_a_lane(m):
    product, s = Tile(128, 256, 64, 8, 3), Tile(64, 64, 128, 4, 3)
    rows = tiles.flag_rows(m, product, s)
    assert rows % product.BLOCK_M == 0 and rows % s.BLOCK_M == 0
    flags = -(-m // rows)
    assert tiles.CHAIN_HEAD + flags <= MAX_SHARED_SUMS
    assert rows == 128 or 2 * flags > MAX_SHARED_SUMS - tiles.CHAIN_HEAD - 1


def test_few_rows_of_a_low_rank_stay_fused():
    found = slk.explain(64, 96, 64, 64, BF16, device="sm_90")
    assert found.forward_kernel == "fused" and found.backward_kernel == "chained"
    assert len(found.forward) == len(found.backward) == 1
