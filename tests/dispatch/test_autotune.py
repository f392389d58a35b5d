"""Autotuning with a timer that the tests set: what is measured, what is taken, and when it is off."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune, problem, rules
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.launch.base import Launch
from tests.helpers.autotuning import GPU, answers, check_all, files, forget, forward, inputs_of, words
from tests.helpers.cases import BF16, DEVICE, FP32


@pytest.mark.parametrize(
    ("fast", "kernel", "launches"),
    [
        pytest.param("^vendor", "vendor", ["vendor", "lora_expand"], marks=pytest.mark.nightly),
        ("^lora_linear.* fused.* 64x256x64", "fused", ["lora_linear.* fused.* 64x256x64"]),
        ("^lora_linear.* chained.* 64x256x64", "chained", ["lora_linear.* chained.* 64x256x64"]),
        ("^lora_shrink.* 64x256x64", "split", ["lora_shrink", "lora_linear.* 64x256x64"]),
    ],
)
def test_the_fastest_is_taken_and_right(timer, launched, fast, kernel, launches):
    timer.fast = {fast: 5e-6}
    inputs = inputs_of()
    check_all(inputs)
    assert {entry["choice"].split(",")[0] for entry in answers().values()} == {kernel}
    launched.clear()
    check_all(inputs)
    # S, or dS, by programs of its own takes dB along, and dX dA.
    expected = [*launches, *launches, *([] if kernel in ("chained", "split") else ["lora_weight_grads"])]
    assert len(launched) == len(expected) and all(map(re.match, expected, launched))


@pytest.mark.parametrize(
    ("dtype", "rows"), [(BF16, 5), (BF16, 70), pytest.param(FP32, 70, marks=pytest.mark.nightly)], ids=str
)
def test_every_candidate_gives_the_right_result(timer, dtype, rows):
    """Each in turn is the answer, down to dA and dB, which read its S and dS."""
    inputs = inputs_of(rows, dtype=dtype)
    check_all(inputs)
    for entry in answers().values():
        assert len(entry["microseconds"]) >= 7 and not entry["skipped"]
    keys = list(autotune._answers)
    both = [
        autotune.candidates(GPU, Call(direction, rows, n, k, 8, dtype, dtype, False)).values()
        for direction, n, k in (("forward", 80, 64), ("backward", 64, 80))
    ]
    # The first is the table's, which was checked above.
    for pair in list(zip(*both, strict=True))[1:]:
        autotune._answers.update(zip(keys, pair, strict=True))
        check_all(inputs)


@pytest.mark.parametrize(
    ("microseconds", "kernel", "reason"),
    [
        (4.12, "vendor", "measured: 4.1 us against the table's 10.0 us"),
        (9.75, "vendor", "measured: 9.8 us against the table's 10.0 us"),
        # The table wins ties.
        (9.85, "chained", "measured: the table's 10.0 us, of 1"),
    ],
)
def test_the_reason_has_both_times(timer, microseconds, kernel, reason):
    timer.fast = {"^vendor": microseconds * 1e-6}
    forward(inputs_of())
    (entry,) = answers().values()
    assert entry["choice"] == kernel and entry["reason"].startswith(reason)
    assert len(entry["microseconds"]) == len(timer.measured)


def test_nothing_is_measured_twice(timer):
    inputs = inputs_of()
    forward(inputs)
    seen = [(words(launches), [getattr(launch, "options", 0) for launch in launches]) for launches in timer.measured]
    assert all(one not in seen[:i] for i, one in enumerate(seen))
    assert len(seen) < len(autotune.candidates(GPU, Call("forward", 70, 80, 64, 8, BF16, BF16, False)))
    forward(inputs_of(rows=100))
    assert len(timer.measured) == len(seen)


def test_backward_measures_all_that_it_launches(timer):
    inputs = inputs_of()
    x, a, b = (inputs[name].requires_grad_() for name in ("x", "lora_A", "lora_B"))
    y = forward({**inputs, "x": x.detach()})
    timer.measured.clear()
    torch.autograd.grad(y, (a, b), inputs["grad"])
    assert not timer.measured
    torch.autograd.grad(forward(inputs), (x, a, b), inputs["grad"])
    assert len(timer.measured) >= 7
    # dA and dB in a launch of their own, or beside dX.
    on_its_own = ["grads" in words(launches) for launches in timer.measured]
    beside = ["S.BLOCK_M" in launches[-1].named or "TILE.BLOCK_M" in launches[-1].named for launches in timer.measured]
    assert True in on_its_own and True in beside
    assert all(one != other for one, other in zip(on_its_own, beside, strict=True))


def test_candidates():
    for device in problem.DEVICES.values():
        for m in (1, 64, 65, 4096):
            for r, p, direction in ((8, False, "forward"), (8, True, "forward"), (100, True, "backward")):
                for dtype in (BF16, FP32):
                    call = Call(direction, m, 512, 512, r, dtype, FP32, p)
                    found = [*autotune.candidates(device, call).values()]
                    assert (found[0].kernel, found[0].tile) == (rules.choose(device, call).kernel, None)
                    kernels = {choice.kernel for choice in found}
                    assert kernels == {"chained", "split", "vendor"} | ({"fused"} if r == 8 and not p else set())
                    wide = any(c.tile and c.tile.BLOCK_M * c.tile.BLOCK_N > 128 * 128 for c in found)
                    assert wide == (device.arch == "sm_90" and dtype == BF16 and m > 64)
                    assert len({choice.tile for choice in found}) >= 4


def test_what_fails_is_skipped_with_its_reason(timer, monkeypatch, caplog):
    from triton.runtime.errors import OutOfResources

    original = Launch.run

    def run(self, device):
        if "64x256" in self.variant:
            raise OutOfResources(300_000, 232_448, "shared memory")
        original(self, device)

    monkeypatch.setattr(Launch, "run", run)
    timer.fast = {"64x256": 1e-6, "^lora_linear.* fused.* 128x64": 2e-6}
    with caplog.at_level(logging.DEBUG, logger="stablelora_kernels"):
        check_all(inputs_of())
    for key, entry in answers().items():
        assert entry["choice"].startswith("fused, 128x64x")
        assert [name.split(",")[0] for name in entry["skipped"]] == ["fused", "chained", "split"]
        for name, reason in entry["skipped"].items():
            assert "64x256x64" in name and reason.startswith("OutOfResources: out of resource: shared memory")
            assert f"{key}: {name} is skipped: {reason}" in caplog.messages


def test_a_kernel_that_does_nothing_is_not_the_fastest(timer, monkeypatch):
    """Compilers were seen to make such."""
    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, d: None if "64x256" in self.variant else original(self, d))
    timer.fast = {"64x256": 1e-6}
    check_all(inputs_of())
    for entry in answers().values():
        assert entry["choice"] == "chained"
        assert set(entry["skipped"].values()) == {"RuntimeError: its result is not the table's"}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_is_no_reason_to_skip(timer):
    """A model that has diverged is tuned like any other."""
    inputs = inputs_of()
    inputs["x"][3] = float("nan")
    inputs["x"][5, 0] = float("inf")
    timer.fast = {"^vendor": 1e-6}
    forward(inputs)
    (entry,) = answers().values()
    assert entry["choice"] == "vendor" and not entry["skipped"]


def test_where_the_table_cannot_be_measured_it_is_asked(timer, monkeypatch):
    calls = []

    def out_of_memory(run):
        calls.append(run)
        raise torch.OutOfMemoryError("no room for the timer's buffer")

    monkeypatch.setattr(autotune, "measure", out_of_memory)
    inputs = inputs_of()
    y = forward(inputs)
    assert len(calls) == 1 and not files()
    assert torch.equal(forward(inputs), y) and len(calls) == 1
    with slk.use_autotune(False):
        assert torch.equal(forward(inputs), y)


# When it is off.


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


OFF = {
    "not asked for": lambda: slk.use_autotune(False),
    "another kernel": lambda: slk.use_kernel("split"),
    "deterministic": deterministic,
    "captured": lambda: patch.object(autotune, "_capturing", lambda y: True),
}


@pytest.mark.parametrize("why", OFF)
def test_it_is_off(timer, few, launched, why):
    """Nothing is measured, nor is an answer taken that was measured before, but by a capture, which only must not measure."""
    timer.fast = {"^vendor": 1e-6}
    with OFF[why]():
        forward(inputs_of())
    assert not timer.measured and not files() and "vendor" not in launched
    forward(inputs_of())
    assert launched[-2] == "vendor"
    measured = len(timer.measured)
    # In memory, and on disk.
    for _ in range(2):
        launched.clear()
        with OFF[why]():
            forward(inputs_of())
            forward(inputs_of(rows=5))
        assert launched.count("vendor") == (why == "captured") and len(timer.measured) == measured
        forget()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, whose times mean something")
def test_the_interpreter_is_not_timed(timer, monkeypatch):
    monkeypatch.setattr(autotune, "measure", autotune.time_on_gpu)
    forward(inputs_of())
    assert not files()


def test_nothing_to_compute_is_nothing_to_measure(timer):
    assert forward(inputs_of(rows=0)).shape == (0, 80)
    assert not timer.measured
