"""Autotuning with a timer that the tests set: what is measured, taken and kept on disk, and when it
is off.
"""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune, problem, rules
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import Launch, VendorProduct
from stablelora_kernels.testing.cases import BF16, DEVICE, FP32, laid_out
from tests.helpers.autotuning import (
    GPU,
    answers,
    check_all,
    files,
    forget,
    forward,
    inputs_of,
    tuned_by_hand,
    words,
)
from tests.helpers.precision import switched
from tests.helpers.processes import printed


@pytest.fixture
def timer(tmp_path):
    """Tuning is on, with an empty cache and a timer that is set by hand."""
    with (
        tuned_by_hand(tmp_path) as fake,
        slk.settings(backend="triton"),
        slk.settings(strategy="auto"),
        slk.use_autotune(True),
    ):
        yield fake


@pytest.fixture
def few(monkeypatch):
    """Three candidates instead of a dozen, where the test is about what is kept."""
    monkeypatch.setattr(autotune, "_tiles", lambda device, call: [])


@pytest.fixture
def launched(monkeypatch):
    """The launches that ran, in words."""
    ran: list[str] = []
    for kind in (Launch, VendorProduct):

        def run(self, device, original=kind.run):
            ran.append(words([self]))
            original(self, device)

        monkeypatch.setattr(kind, "run", run)
    return ran


@pytest.mark.parametrize(
    ("fast", "kernel", "launches"),
    [
        pytest.param("vendor$", "vendor", ["lora_linear", "vendor"], marks=pytest.mark.nightly),
        ("^lora_linear.* fused.* 64x256x64", "fused", ["lora_linear.* fused.* 64x256x64"]),
        ("^lora_linear.* chained.* 64x256x64", "chained", ["lora_linear.* chained.* 64x256x64"]),
        ("^lora_down.* 64x256x64", "split", ["lora_down", "lora_linear.* 64x256x64"]),
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
    expected = [*launches, *launches, *(["lora_weight_grads"] if kernel == "fused" else [])]
    assert len(launched) == len(expected) and all(map(re.match, expected, launched))


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(BF16, 5), *(pytest.param(dtype, 70, marks=pytest.mark.nightly) for dtype in (BF16, FP32))],
    ids=str,
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


def test_the_reason_has_both_times(timer):
    # The table wins ties.
    for microseconds, kernel, reason in (
        (4.12, "vendor", "measured: 4.1 us against the table's 10.0 us"),
        (9.75, "vendor", "measured: 9.8 us against the table's 10.0 us"),
        (9.85, "chained", "measured: the table's 10.0 us, of 1"),
    ):
        timer.fast = {"vendor$": microseconds * 1e-6}
        timer.measured.clear()
        forward(inputs_of())
        (entry,) = answers().values()
        assert entry["choice"] == kernel and entry["reason"].startswith(reason)
        assert len(entry["microseconds"]) == len(timer.measured)
        files()[0].unlink()
        forget()


def test_nothing_is_measured_twice(timer):
    inputs = inputs_of()
    forward(inputs)
    seen = [
        (words(launches), [getattr(launch, "options", 0) for launch in launches])
        for launches in timer.measured
    ]
    assert all(one not in seen[:i] for i, one in enumerate(seen))
    assert len(seen) < len(
        autotune.candidates(GPU, Call("forward", 70, 80, 64, 8, BF16, BF16, False))
    )
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
    beside = [
        any(
            {"TILE.BLOCK_M", "DA.BLOCK_M"} <= {*launch.named}
            for launch in launches
            if isinstance(launch, Launch)
        )
        for launches in timer.measured
    ]
    assert True in on_its_own and True in beside
    assert all(one != other for one, other in zip(on_its_own, beside, strict=True))


def test_candidates():
    for device, m, dtype in product(problem.DEVICES.values(), (1, 64, 65, 4096), (BF16, FP32)):
        for r, p, direction in (
            (8, False, "forward"),
            (8, True, "forward"),
            (100, True, "backward"),
        ):
            call = Call(direction, m, 512, 512, r, dtype, FP32, p)
            found = [*autotune.candidates(device, call).values()]
            assert (found[0].strategy, found[0].tile) == (rules.choose(device, call).strategy, None)
            kernels = {choice.strategy for choice in found}
            assert kernels == {"chained", "split", "vendor"} | (
                {"fused"} if r == 8 and not p else set()
            )
            wide = any(c.tile and c.tile.BLOCK_M * c.tile.BLOCK_N > 128 * 128 for c in found)
            # On data-center Blackwell the table's own tile is the only wide one.
            assert wide == (device.nvidia and device.arch != "sm_100" and dtype == BF16 and m > 64)
            assert len({choice.tile for choice in found}) >= 4


def out_of_resources(launch):
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


# Compilers were seen to make kernels that do nothing.
@pytest.mark.parametrize(
    ("wide", "reason"),
    [
        (out_of_resources, "OutOfResources: out of resource: shared memory"),
        (lambda launch: None, "RuntimeError: its result is not the table's"),
    ],
)
def test_what_fails_or_is_wrong_is_skipped_with_its_reason(
    timer, monkeypatch, caplog, wide, reason
):
    original = Launch.run
    monkeypatch.setattr(
        Launch, "run", lambda self, d: wide(self) if "64x256" in self.variant else original(self, d)
    )
    timer.fast = {"64x256": 1e-6, "^lora_linear.* fused.* 128x64": 2e-6}
    with caplog.at_level(logging.DEBUG, logger="stablelora_kernels"):
        check_all(inputs_of())
    for key, entry in answers().items():
        assert entry["choice"].startswith("fused, 128x64x")
        assert [name.split(",")[0] for name in entry["skipped"]] == ["fused", "chained", "split"]
        for name, found in entry["skipped"].items():
            assert "64x256x64" in name and found.startswith(reason)
            assert f"{key}: {name} is skipped: {found}" in caplog.messages


@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_is_no_reason_to_skip(timer):
    """A model that has diverged is tuned like any other."""
    inputs = inputs_of()
    inputs["x"][3] = float("nan")
    inputs["x"][5, 0] = float("inf")
    timer.fast = {"vendor$": 1e-6}
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
    found = [forward(inputs) for _ in range(2)]
    assert len(calls) == 1 and not files()
    with slk.use_autotune(False):
        assert all(torch.equal(forward(inputs), y) for y in found)


# When it is off.


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


OFF = {
    "not asked for": lambda: slk.use_autotune(False),
    "another kernel": lambda: slk.settings(strategy="split"),
    "deterministic": deterministic_algorithms,
    "captured": lambda: patch.object(autotune, "_capturing", lambda y: True),
}


@pytest.mark.parametrize("why", OFF)
def test_it_is_off(timer, few, launched, why):
    """Nothing is measured, nor is an answer taken that was measured before, but by a capture, which
    only must not measure.
    """
    timer.fast = {"vendor$": 1e-6}
    with OFF[why]():
        forward(inputs_of())
    assert not timer.measured and not files() and "vendor" not in launched
    # There is nothing to measure either where there is nothing to compute.
    assert forward(inputs_of(rows=0)).shape == (0, 80) and not timer.measured
    forward(inputs_of())
    assert launched[-1] == "vendor"
    measured = len(timer.measured)
    # In memory, and on disk.
    for _ in range(2):
        launched.clear()
        with OFF[why]():
            forward(inputs_of())
            forward(inputs_of(rows=5))
        assert launched.count("vendor") == (why == "captured") and len(timer.measured) == measured
        forget()


@pytest.mark.skipif(
    DEVICE == "cuda", reason="runs on machines without a GPU, whose times mean nothing"
)
def test_the_interpreter_is_not_timed(timer, monkeypatch):
    monkeypatch.setattr(autotune, "measure", autotune.time_on_gpu)
    forward(inputs_of())
    assert not files()


# What is kept on disk


def key_of(inputs, direction="forward", dropout=False):
    x, w = inputs["x"], inputs["weight"]
    call = Call(
        direction,
        *x.shape[:1],
        *w.shape,
        inputs["lora_A"].shape[0],
        x.dtype,
        inputs["lora_A"].dtype,
        dropout,
    )
    return autotune.call_key(call, x, w, inputs["bias"])


def test_what_an_answer_holds_for():
    base = inputs_of()
    for word in (
        "forward",
        "m=128, n=80, k=64, r=8",
        "dtype=torch.bfloat16",
        "bias=True",
        "x by rows",
        "w by rows",
    ):
        assert word in key_of(base)
    assert key_of(inputs_of(rows=65)) == key_of(inputs_of(rows=128)) == key_of(base)
    # No answer for few rows holds for many, whose tiles are others.
    assert problem.SMALL_M.bit_count() == 1
    x, w = base["x"], base["weight"]
    others = [
        key_of(base, "backward"),
        key_of(base, dropout=True),
        *(
            key_of(inputs_of(**{name: size}))
            for name, size in {"rows": 129, "k": 72, "n": 72, "r": 9}.items()
        ),
        key_of(inputs_of(rows=64)),
        key_of(inputs_of(lora_dtype=FP32)),
        key_of(inputs_of(dtype=FP32)),
        key_of(base | {"bias": None}),
        *(
            key_of(base | {"x": laid_out(x, layout)})
            for layout in ("expanded", "transposed", "wider", "shifted")
        ),
        key_of(base | {"weight": laid_out(w, "transposed")}),
    ]
    # Of the x's, the two that are not aligned are alike.
    assert key_of(base) not in others and len(set(others)) == len(others) - 1
    # TensorFloat-32 is measured for itself.
    plain, with_tf32 = key_of(base), set()
    for name in (
        "set_float32_matmul_precision('high')",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
    ):
        with switched(name):
            with_tf32.add(key_of(inputs_of(dtype=FP32)))
            assert key_of(base) == plain
    assert len(with_tf32) == 1 and with_tf32.isdisjoint(others)


def test_a_second_process_reads_the_first_ones_answer(timer, few, tmp_path):
    timer.fast = {"vendor$": 1e-6}
    forward(inputs_of())
    code = """
import torch
import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.testing import make_inputs
measured = []
autotune.measure = lambda run: measured.append(run) or 1.0
device = "cuda" if torch.cuda.is_available() else "cpu"
slk.settings.backend = "triton"
for rows in (70, 5):
    inputs = make_inputs((rows, 64), 80, 8, dtype=torch.bfloat16, device=device)
    lora_linear(*(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), 1.7)
    print([choice.strategy for choice in autotune._answers.values()], len(measured) > 0)
"""
    env = {"STABLELORA_CACHE": str(tmp_path), "STABLELORA_AUTOTUNE": "1"}
    found = printed(code, TRITON_INTERPRET="0" if DEVICE == "cuda" else "1", **env)
    assert found.splitlines() == ["['vendor'] False", "['vendor', 'chained'] True"]
    choices = {key.split()[1]: answer["choice"] for key, answer in answers().items()}
    assert choices == {"m=128,": "vendor", "m=8,": "chained"}


# What an answer holds for, beside its key.
VERSIONS = {
    "stablelora_kernels.dispatch.autotune.__version__": "99.0",
    "torch.__version__": "99.0",
    "triton.__version__": "99.0",
    "torch.version.cuda": "99.0",
    "stablelora_kernels.dispatch.problem.device_of": lambda device: GPU._replace(processors=1),
}


@pytest.mark.parametrize("what", VERSIONS)
def test_other_versions_and_gpus_are_measured_anew(timer, few, monkeypatch, what):
    forward(inputs_of())
    measured = len(timer.measured)
    forget()
    forward(inputs_of())
    assert len(timer.measured) == measured and len(files()) == 1
    forget()
    monkeypatch.setattr(what, VERSIONS[what])
    forward(inputs_of())
    assert len(timer.measured) == 2 * measured and len(files()) == 2


def runtime_warnings(caught) -> list[str]:
    """Without NumPy's DeprecationWarnings of the interpreter of Triton 3.6."""
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


# What a file may hold in place of an answer: no JSON, other JSON, or an answer with other values.
DAMAGED = {
    "no JSON": "{ not JSON", "empty": "", "cut off": '{"key": "Call(', "no text": "\x80", "deep": "[" * 100_000, "list": "[]",
    "nothing in it": "{}", "null": "null", "another call's": {"key": "some key"}, "no kernel's": {"choice": "magic"},
    "of another type": {"choice": ["split"]}, "another tile": {"choice": "split, 1x1x1, 4 warps, 3 stages"},
    "no reason": {"reason": None, "choice": None},
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_warned_of_once_and_rewritten(timer, few, content):
    forward(inputs_of())
    measured = len(timer.measured)
    (path,) = files()
    good = path.read_text()
    damaged = content if isinstance(content, str) else json.dumps({**json.loads(good), **content})
    path.write_text(damaged, encoding="latin-1")
    forget()
    with pytest.warns(RuntimeWarning, match="is tuned again") as caught:
        forward(inputs_of())
        forward(inputs_of())
    (warning,) = runtime_warnings(caught)
    assert str(path) in warning
    assert len(timer.measured) == 2 * measured and path.read_text() == good


def test_where_nothing_can_be_written_tuning_goes_on_in_memory(timer, few, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "file"))
    timer.fast = {"vendor$": 1e-6}
    with pytest.warns(RuntimeWarning, match="can't be kept") as caught:
        check_all(inputs_of())
    (warning,) = runtime_warnings(caught)
    assert str(tmp_path / "file" / "tuning") in warning
    assert [choice.strategy for choice in autotune._answers.values()] == ["vendor", "vendor"]
    measured = len(timer.measured)
    check_all(inputs_of())
    assert len(timer.measured) == measured


def test_writers_lose_nothing(tmp_path):
    """Many at once, each of its own key or all of one; readers meanwhile find whole answers or
    none.
    """
    answer = {"choice": "split", "reason": "", "microseconds": {"split": 1.0}}
    choices = {"split": Choice("split", "")}
    path = tmp_path / "tuning" / "one.json"

    def write(i):
        autotune._write(path.with_name(f"{i}.json"), f"key {i}", {**answer, "reason": str(i)})
        autotune._write(path, "one key", {**answer, "reason": str(i) * 5000})
        return autotune._read(path, "one key", choices)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, range(60)))
    assert all(one is not None and len({*one["reason"]}) <= 2 for one in found)
    for i in range(60):
        kept = autotune._read(path.with_name(f"{i}.json"), f"key {i}", choices)
        assert kept is not None and kept["reason"] == str(i)
    assert len(list(path.parent.iterdir())) == 61
