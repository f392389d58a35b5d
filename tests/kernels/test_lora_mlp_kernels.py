"""An MLP's launches: what is launched, counters at 0 again, the same bits each time, offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import stablelora_kernels as slk
from stablelora_kernels.dispatch import rules, tiles
from stablelora_kernels.dispatch.problem import DEVICES
from stablelora_kernels.dispatch.tiles import MAX_SHARED_SUMS
from stablelora_kernels.launch import counters
from stablelora_kernels.launch.dry_run import mlp_launches
from tests.helpers.case_checks import assert_close, check
from tests.helpers.cases import BF16, DEVICE, FP32, Case, leaves, make, ours, run, small
from tests.helpers.launches import count_launches

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="another GPU than the one that is here is pretended"),
    pytest.mark.usefixtures("poisoned_outputs"),
]


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

    monkeypatch.setattr(tiles, "plan_split_k", two)
    case = Case("mlp", (rows, 136), (72, 72, 16), (8, 20, 3), BF16, FP32, p=0.2, kernel=kernel, arch=arch)
    first = run(case)
    assert any(shared) and not any_counter()
    assert_close(run(case), first)
    assert not any_counter()


@pytest.mark.parametrize("far", [["x"], ["weight0", "weight1"]], ids=str)
def test_steps_beyond_2_to_the_31(far, spacious):
    """X, or the weights of gate and up, with columns so far apart that a step along the sum exceeds 2^31 elements."""
    case = Case("mlp", (70, 144), (72, 72, 16), (8, 8, 8), BF16, FP32, kernel="split", arch="sm_80")
    given = make(case)
    check(case, run(case, given | {name: spacious(given[name].t()).t() for name in far}), given)


def launched(made):
    return {name.removeprefix("_").removesuffix("_kernel"): n for name, n in made.items()}


def launches(case):
    """What forward and backward launch, by short names."""
    leaf = leaves(case, make(case))
    with slk.use_backend("triton"), count_launches() as forward:
        (y,) = ours(case, leaf)
    with slk.use_backend("triton"), count_launches() as backward:
        y.backward(leaf["grad2"])
    return launched(forward), launched(backward)


@pytest.mark.parametrize(("processors", "rows", "arch", "forward"), [
    (1, 130, "sm_90", {"lora_shrink_group": 1, "lora_gate_up_tma": 1, "lora_linear_tma": 1}),
    (1, 130, "sm_80", {"lora_shrink_group": 1, "lora_gate_up": 1, "lora_linear": 1}),
    (132, 130, "sm_90", {"lora_shrink_group": 1, "lora_linear_tma": 3, "gated_activation": 1}),
])  # fmt: skip
def test_launches_of_a_call(processors, rows, arch, forward):
    case = Case("mlp", (rows, 64), (48, 48, 24), (6, 3, 4), BF16, BF16)
    with slk.testing.pretend_gpu(arch, processors):
        found = launches(case)
    product = "lora_linear_tma" if arch == "sm_90" else "lora_linear"
    assert found == (forward, {product: 3, "lora_weight_grads_group": 1})


def test_backward_launches_what_is_asked_for():
    """A whole backward, and its parts; a product's launch may have dS, dA and dB as well."""
    product, shared = "lora_linear", "lora_weight_grads_group"
    case = small("mlp", dtype=BF16, lora_dtype=BF16, p=0.3)
    for wanted, expected in (
        (["x"], {product: 3}),
        (None, {product: 3, shared: 1}),
        # dG and dU without dX.
        (["lora_A0", "lora_A1"], {product: 1, "lora_shrink": 2, shared: 1}),
        (["lora_B0", "lora_B1"], {product: 1, "lora_weight_grads": 2}),
        (["lora_A0", "lora_A1", "lora_B0", "lora_B1"], {product: 1, "lora_shrink": 2, shared: 1}),
        # Nothing of gate and up.
        (["lora_A2", "lora_B2"], {product: 1}),
        (["lora_A2"], {product: 1}),
        (["lora_B2"], {"lora_weight_grads": 1}),
    ):
        with slk.testing.pretend_gpu("sm_80"):
            assert launches(case.but(wanted=wanted))[1] == expected, wanted


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
