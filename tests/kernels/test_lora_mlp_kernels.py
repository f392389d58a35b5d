"""An MLP's launches: counters at 0 again, the same bits each time, sums that several programs share, a gate in every form."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import stablelora_kernels as slk
from stablelora_kernels.dispatch import problem, rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS, Tile, TileRule
from stablelora_kernels.launch import counters
from stablelora_kernels.launch.dry_run import mlp_launches
from tests.helpers.inputs import BF16, DEVICE, FP16, FP32
from tests.helpers.mlps import MLP, assert_close, check

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


@pytest.fixture(autouse=True)
def on_triton():
    with slk.use_backend("triton"):
        yield


def any_counter():
    """Whether a counter, a flag or a ticket was left above 0."""
    lanes = [counters.counters(MAX_SHARED_SUMS, torch.device("cpu"), lane) for lane in range(counters.LANES)]
    return any(lane.any() for lane in lanes)


@pytest.mark.covering(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("rows", "kernel"), [(5, "auto"), (70, "chained"), (70, "split"), (70, "vendor")])
def test_the_same_bits_and_counters_at_zero(rows, kernel, arch, monkeypatch):
    """Two programs share every sum of several steps."""
    shared = []

    def two(device, tiles, steps, **_):
        shared.append(steps > 1)
        return 2 if steps > 1 else 1

    monkeypatch.setattr(problem, "device_of", lambda _: DEVICES[arch])
    monkeypatch.setattr(tiles, "plan_split_k", two)
    mlp = MLP((rows, 136), 72, 16, (8, 20, 3), BF16, FP32)
    with slk.use_kernel(kernel):
        first = mlp.run(p=0.2)
        assert any(shared) and not any_counter()
        assert_close(mlp.run(p=0.2), first, 0)
    assert not any_counter()


@pytest.mark.covering(1)
@pytest.mark.parametrize("form", ["split_k", "tma", "pointers", "vendor"])
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("tile", [Tile(16, 64, 16, 4, 2), Tile(32, 128, 32, 4, 2)], ids=str)
def test_a_gate_in_every_form_and_tile(tile, dtype, chained, form, monkeypatch):
    """dG and dU from tiles within rows and across their end, with dropout; dA with H computed again."""
    monkeypatch.setattr(problem, "device_of", lambda _: DEVICES["sm_90"])
    for name in dir(tiles):
        if name.endswith("_TILES"):
            monkeypatch.setattr(tiles, name, (TileRule(lambda d, c: True, tile, "a test"),))
    monkeypatch.setattr(rules, "choose_form", lambda device, call, described: form)
    kernel = "vendor" if form == "vendor" else "chained" if chained else "split"
    mlp = MLP((33, 24), 72, 16, (5, 3, 17), dtype, FP32, "gelu")
    with slk.use_kernel(kernel):
        check(mlp, mlp.run(p=0.3), 0.3)


@pytest.mark.parametrize("far", ["x", "weights"])
def test_steps_beyond_2_to_the_31(far, spacious, monkeypatch):
    """X, or the weights of gate and up, with columns so far apart that a step along the sum exceeds 2^31 elements."""
    monkeypatch.setattr(problem, "device_of", lambda _: DEVICES["sm_80"])
    mlp = MLP((70, 144), 72, 16, (8, 8, 8), BF16, FP32)
    if far == "x":
        mlp.x = spacious(mlp.x.t()).t()
    else:
        mlp.weights = [*(spacious(w.t()).t() for w in mlp.weights[:2]), mlp.weights[2]]
    with slk.use_kernel("split"):
        check(mlp, mlp.run())


@pytest.mark.parametrize("kernel", ["auto", "split", "vendor"])
@pytest.mark.parametrize("ranks", [(0, 8, 8), (8, 0, 8), (8, 8, 0), (0, 0, 8), (0, 0, 0), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("rows", [40, 512, 8192])
def test_a_launch_begins_early_only_behind_that_of_its_s(rows, ranks, kernel, monkeypatch):
    """Its main loop may read what any launch before that one wrote, such as H or dG, but nothing that one writes."""
    monkeypatch.setattr(rules, "overlaps", lambda device: device.overlaps)
    with slk.use_kernel(kernel):
        ways = mlp_launches(DEVICES["sm_90"], rows, 4096, 14336, 4096, ranks, BF16, FP32, 0.1)
    early = 0
    for way in ways:
        for before, launch in zip([None, *way], way, strict=False):
            if getattr(launch, "options", {}).get("launch_pdl"):
                early += 1
                assert before is not None and before.constants["TRIGGERS_DEPENDENTS"], launch.variant
    if kernel == "split" and any(ranks):
        assert early > 0
