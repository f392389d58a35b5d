"""A call launches what ``explain`` lists, a step of the optimizer is one launch, and neither waits
for the GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.testing import layer_arms, make_pairs
from stablelora_kernels.testing.cases import BF16
from tests.helpers.gpu_checks import DEVICE, SMALL
from tests.helpers.launches import count_launches

pytestmark = pytest.mark.gpu

ROWS = (
    [(16, 0.0), (70, 0.1)]
    if SMALL
    else [(1, 0.0), (16, 0.0), (64, 0.0), (64, 0.1), (8192, 0.0), (8192, 0.1)]
)
SIZE, R = (32, 8) if SMALL else (4096, 16)
# [out, in] of an 8B model's layers, and how many of each: 448 tensors.
PAIRS = (
    [(48, 32), (32, 48)] if SMALL else [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
)
COUNT = 2 if SMALL else 56


def counts_of(trace: dict[str, Any]) -> dict[str, Counter[str]]:
    """Count a trace's kernels on the GPU, and the calls in which the host waits, by name."""
    found: dict[str, Counter[str]] = {"kernels": Counter(), "waits": Counter()}
    for event in trace.get("traceEvents", ()):
        category, name = event.get("cat"), str(event.get("name", ""))
        if category == "kernel":
            found["kernels"][name] += 1
        elif category in ("cuda_runtime", "cuda_driver") and (
            "Synchronize" in name or name == "cudaMemcpy"
        ):
            found["waits"][name] += 1
    return found


def profile(run: Callable[[], Any]) -> dict[str, Counter[str]]:
    """Count what a call launches and waits for, including the profiler's own waits."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not SMALL:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if not SMALL:
            torch.cuda.synchronize()
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return counts_of(json.loads(path.read_text()))


@cache
def own_waits() -> Counter[str]:
    """Count the waits of the profiler itself, whose first trace also initializes it."""
    profile(lambda: None)
    return profile(lambda: None)["waits"]


def check(
    run: Callable[[], Any],
    launches: int,
    kernels: int,
    record_property: Callable[[str, object], None],
) -> None:
    own = own_waits()
    with count_launches() as made:
        found = profile(run)
    waits = found["waits"] - own
    record_property("figure", found["kernels"].total())
    record_property("waits", waits.total())
    assert made.total() == launches, f"expected {launches} launches of ours, got {dict(made)}"
    assert not waits, f"the host waits: {dict(waits)}"
    # The profiler does not see the interpreter's kernels.
    assert SMALL or found["kernels"].total() == kernels, (
        f"expected {kernels} kernels, got {dict(found['kernels'])}"
    )


@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize(("m", "p"), ROWS)
def test_a_call_launches_what_explain_lists(m, p, direction, record_property):
    _, _, ours = layer_arms(SIZE, SIZE, R, p, BF16, DEVICE)
    x, grad = (torch.randn(m, SIZE, device=DEVICE, dtype=BF16) for _ in range(2))
    wanted = (x.requires_grad_(), ours.lora_A, ours.lora_B)
    # Compile, and prepare launches.
    for _ in range(2):
        y = ours(x)
        torch.autograd.grad(y, wanted, grad, retain_graph=True)
    calls = {"forward": lambda: ours(x), "backward": lambda: torch.autograd.grad(y, wanted, grad)}
    listed = getattr(
        slk.explain(m, SIZE, SIZE, R, BF16, p, lora_dtype=BF16, device=DEVICE), direction
    )
    # Forward with dropout also draws a seed.
    seeds = int(p > 0 and direction == "forward")
    check(
        calls[direction],
        sum(each.kernel != "vendor" for each in listed),
        len(listed) + seeds,
        record_property,
    )


def test_a_step_of_many_tensors_is_one_launch(record_property):
    made = [pair for n, k in PAIRS for pair in make_pairs(COUNT, R, k, DEVICE, latched=False, m=n)]
    pairs = [dataclasses.replace(pair, name=f"layer{i}") for i, pair in enumerate(made)]
    optimizer = slk.StableLoRAAdamW(pairs, lr=1e-6)
    for _ in range(2):
        optimizer.step()
    check(optimizer.step, 1, 1, record_property)
