"""Autotuning with a timer that the tests set: what is measured, what is taken, and what is kept on disk."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune, problem, rules
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.functional import lora_linear
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.lora_common import VendorProduct
from stablelora_kernels.reference import lora_linear_grads_ref, lora_linear_ref
from stablelora_kernels.testing import assert_no_worse, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
SCALING = 1.7
GPU = problem.device_of(torch.device(DEVICE))


def words(launches) -> str:
    """The launches' kernels and tiles: "lora_shrink 64x128 + lora_linear_tma 128x128x64", "vendor + ..."."""
    found = []
    for launch in launches:
        if hasattr(launch, "kernel"):
            sizes = [str(launch.constants[f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in launch.constants]
            name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            found.append(f"{name} {'x'.join(sizes)}")
        else:
            found.append("vendor")
    return " + ".join(found)


class Timer:
    """A timer's place: 10 us for everything but what the patterns in ``fast`` match."""

    def __init__(self):
        self.fast: dict[str, float] = {}
        self.measured: list[list] = []

    def __call__(self, run) -> float:
        self.measured.append(run.args[0])
        text = words(run.args[0])
        return next((seconds for pattern, seconds in self.fast.items() if re.search(pattern, text)), 10e-6)


def forget():
    """As in a new process."""
    autotune._answers.clear()
    autotune._warned.clear()
    autotune._made_for.cache_clear()


@pytest.fixture
def timer(monkeypatch, tmp_path):
    """Tuning is on, with an empty cache and a timer that is set by hand."""
    fake = Timer()
    monkeypatch.setattr(autotune, "measure", fake)
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path))
    forget()
    with slk.use_backend("triton"), slk.use_kernel("auto"), slk.use_autotune(True):
        yield fake
    forget()


@pytest.fixture
def few(monkeypatch):
    """Three candidates instead of a dozen, where the test is about what is kept."""
    monkeypatch.setattr(autotune, "_tiles", lambda device, call: [])


@pytest.fixture
def launched(monkeypatch):
    """What ran, in words."""
    ran: list[str] = []
    for kind in (Launch, VendorProduct):

        def run(self, device, original=kind.run):
            ran.append(words([self]))
            original(self, device)

        monkeypatch.setattr(kind, "run", run)
    return ran


def inputs_of(rows=70, k=64, n=80, r=8, **options):
    return make_inputs((rows, k), n, r, device=DEVICE, **{"dtype": BF16, **options})


def forward(inputs, dropout_p=0.0):
    return lora_linear(*(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), SCALING, dropout_p)


def check_all(inputs):
    """Y and the three gradients against the oracle, with eager PyTorch's own error as the bound."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "lora_A", "lora_B")}
    y = forward({**inputs, **leaves})
    out = (y, *torch.autograd.grad(y, tuple(leaves.values()), inputs["grad"]))
    x, a, b = (t.detach().requires_grad_() for t in leaves.values())
    eager = torch.nn.functional.linear(x, inputs["weight"], inputs["bias"]) + (x @ a.to(x).T @ b.to(x).T) * SCALING
    base = (eager, *torch.autograd.grad(eager, (x, a, b), inputs["grad"]))
    d = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    ref = {"Y": lora_linear_ref(d["x"], d["weight"], d["bias"], d["lora_A"], d["lora_B"], SCALING)}
    ref |= lora_linear_grads_ref(d["grad"], d["x"], d["weight"], d["lora_A"], d["lora_B"], SCALING)
    for name, value, baseline in zip(("Y", "dX", "dA", "dB"), out, base, strict=True):
        assert_no_worse(value, ref[name], baseline, dtype=x.dtype, name=name)


def files() -> list[Path]:
    return sorted(autotune.cache_dir().glob("*.json"))


def entries(path: Path | None = None) -> dict[str, dict]:
    return json.loads((path or files()[0]).read_text())["entries"]


# What is measured and taken.


@pytest.mark.parametrize(
    ("fast", "kernel", "launches"),
    [
        ("^vendor", "vendor", ["vendor", "lora_expand"]),
        ("^lora_linear.* 64x256x64", "fused", ["lora_linear.* 64x256x64"]),
        ("^lora_shrink.* 64x256x64", "split", ["lora_shrink", "lora_linear.* 64x256x64"]),
    ],
)
def test_the_fastest_is_taken_and_right(timer, launched, fast, kernel, launches):
    timer.fast = {fast: 5e-6}
    inputs = inputs_of()
    check_all(inputs)
    assert {entry["kernel"] for entry in entries().values()} == {kernel}
    launched.clear()
    check_all(inputs)
    # S, or dS, on its own takes dB along, and dX dA.
    expected = [*launches, *launches, *([] if kernel == "split" else ["lora_weight_grads"])]
    assert len(launched) == len(expected) and all(map(re.match, expected, launched))


@pytest.mark.parametrize(("dtype", "rows"), [(BF16, 5), (BF16, 70), (FP32, 70)], ids=str)
def test_every_candidate_gives_the_right_result(timer, dtype, rows):
    """Each in turn is the answer, down to dA and dB, which read its S and dS."""
    inputs = inputs_of(rows, dtype=dtype)
    check_all(inputs)
    for entry in entries().values():
        assert len(entry["microseconds"]) >= 7 and not entry["skipped"]
    keys = list(autotune._answers)
    both = [
        autotune.candidates(GPU, Call(direction, rows, n, k, 8, dtype, dtype, False))
        for direction, n, k in (("forward", 80, 64), ("backward", 64, 80))
    ]
    # The first is the table's, which was checked above.
    for pair in list(zip(*both, strict=True))[1:]:
        autotune._answers.update(zip(keys, pair, strict=True))
        check_all(inputs)


def test_the_reason_has_both_times(timer):
    timer.fast = {"^vendor": 4.12e-6}
    inputs = inputs_of()
    forward(inputs)
    (entry,) = entries().values()
    assert entry["reason"] == "measured: 4.1 us against the table's 10.0 us"
    assert entry["microseconds"]["vendor"] == 4.1 and len(entry["microseconds"]) == len(timer.measured)
    (choice,) = autotune._answers.values()
    assert choice == Choice("vendor", entry["reason"])


@pytest.mark.parametrize(("seconds", "kernel"), [(9.85e-6, "split"), (9.75e-6, "vendor")])
def test_the_table_wins_ties(timer, seconds, kernel):
    timer.fast = {"^vendor": seconds}
    forward(inputs_of())
    (entry,) = entries().values()
    assert entry["kernel"] == kernel
    assert entry["reason"].startswith("measured: the table's 10.0 us, of 1" if kernel == "split" else "measured: 9.")
    # None: the table's own tile.
    assert entry["tile"] is None


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
    beside = [getattr(launches[-1], "constants", {}).get("HAS_GRAD", False) for launches in timer.measured]
    assert True in on_its_own and True in beside
    assert all(one != other for one, other in zip(on_its_own, beside, strict=True))


def test_candidates():
    for device in problem.DEVICES.values():
        for m in (1, 64, 65, 4096):
            for r, p, direction in ((8, False, "forward"), (8, True, "forward"), (100, True, "backward")):
                for dtype in (BF16, FP32):
                    call = Call(direction, m, 512, 512, r, dtype, FP32, p)
                    found = autotune.candidates(device, call)
                    assert found[0] == rules.choose(device, call)
                    kernels = {choice.kernel for choice in found}
                    assert kernels == {"split", "vendor"} | ({"fused"} if r == 8 and not p else set())
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
    timer.fast = {"64x256": 1e-6, "^lora_linear.* 128x64": 2e-6}
    with caplog.at_level(logging.DEBUG, logger="stablelora_kernels"):
        check_all(inputs_of())
    for key, entry in entries().items():
        assert entry["kernel"] == "fused" and entry["tile"]["BLOCK_N"] == 64
        assert [name.split(",")[0] for name in entry["skipped"]] == ["fused", "split"]
        for name, reason in entry["skipped"].items():
            assert "64x256x64" in name and reason.startswith("OutOfResources: out of resource: shared memory")
            assert f"{key}: {name} is skipped: {reason}" in caplog.messages


def test_a_kernel_that_does_nothing_is_not_the_fastest(timer, monkeypatch):
    """Compilers were seen to make such."""
    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, d: None if "64x256" in self.variant else original(self, d))
    timer.fast = {"64x256": 1e-6}
    check_all(inputs_of())
    for entry in entries().values():
        assert entry["kernel"] == "split" and entry["tile"] is None
        assert set(entry["skipped"].values()) == {"RuntimeError: its result is not the table's"}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_is_no_reason_to_skip(timer):
    """A model that has diverged is tuned like any other."""
    inputs = inputs_of()
    inputs["x"][3] = float("nan")
    inputs["x"][5, 0] = float("inf")
    timer.fast = {"^vendor": 1e-6}
    forward(inputs)
    (entry,) = entries().values()
    assert entry["kernel"] == "vendor" and not entry["skipped"]


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


def test_off_unless_asked_for(timer, few):
    with slk.use_autotune(False):
        check_all(inputs_of())
    assert not timer.measured and not files()


@pytest.mark.parametrize("kernel", ["split", "vendor"])
def test_a_forced_kernel_is_not_tuned(timer, few, launched, kernel):
    timer.fast = {"^lora_linear": 1e-6}
    forward(inputs_of())
    launched.clear()
    measured = len(timer.measured)
    with slk.use_kernel(kernel):
        forward(inputs_of())
        forward(inputs_of(rows=5))
    assert len(timer.measured) == measured
    first = {"split": "lora_shrink", "vendor": "vendor"}[kernel]
    assert [run.split()[0] for run in launched[::2]] == [first, first]


def test_determinism_is_not_left_to_a_clock(timer, few, launched):
    timer.fast = {"^vendor": 1e-6}
    forward(inputs_of())
    assert launched[-2] == "vendor"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        launched.clear()
        measured = len(timer.measured)
        forward(inputs_of())
        forward(inputs_of(rows=5))
    finally:
        torch.use_deterministic_algorithms(before)
    # Two launches of the one and one of the other.
    assert len(timer.measured) == measured and len(launched) == 3


def test_while_a_graph_captures_only_what_is_known_is_taken(timer, few, monkeypatch, launched):
    timer.fast = {"^vendor": 1e-6}
    monkeypatch.setattr(autotune, "_capturing", lambda y: True)
    forward(inputs_of())
    assert not timer.measured and not files() and len(launched) == 2
    monkeypatch.setattr(autotune, "_capturing", lambda y: False)
    forward(inputs_of())
    # In memory, and on disk.
    monkeypatch.setattr(autotune, "_capturing", lambda y: True)
    for _ in range(2):
        launched.clear()
        forward(inputs_of())
        assert launched[0] == "vendor"
        forget()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU, whose times mean something")
def test_the_interpreter_is_not_timed(timer, monkeypatch):
    monkeypatch.setattr(autotune, "measure", autotune.time_on_gpu)
    monkeypatch.setattr(autotune, "_measure_all", lambda *_: pytest.fail("measured"))
    forward(inputs_of())
    assert not files()


def test_nothing_to_compute_is_nothing_to_measure(timer):
    assert forward(inputs_of(rows=0)).shape == (0, 80)
    assert not timer.measured


# What is kept.


def key_of(inputs, direction="forward", dropout=False):
    x, w = inputs["x"], inputs["weight"]
    call = Call(direction, *x.shape[:1], *w.shape, inputs["lora_A"].shape[0], x.dtype, inputs["lora_A"].dtype, dropout)
    return autotune.entry_key(call, x, w, inputs["bias"])


def test_what_an_answer_holds_for():
    base = inputs_of()
    assert key_of(base) == "forward m<=128 n=80 k=64 r=8, bfloat16, lora bfloat16, bias"
    assert key_of(inputs_of(rows=65)) == key_of(inputs_of(rows=128)) == key_of(base)
    # No answer for few rows holds for many, whose tiles are others.
    assert problem.SMALL_M.bit_count() == 1
    x, w = base["x"], base["weight"]
    others = [
        key_of(base, "backward"),
        key_of(base, dropout=True),
        *(key_of(inputs_of(**{name: size})) for name, size in {"rows": 129, "k": 72, "n": 72, "r": 9}.items()),
        key_of(inputs_of(rows=64)),
        key_of(inputs_of(lora_dtype=FP32)),
        key_of(inputs_of(dtype=FP32)),
        key_of({**base, "bias": None}),
        key_of({**base, "x": x[:1].expand(70, 64)}),
        key_of({**base, "x": x.t().contiguous().t()}),
        key_of({**base, "x": torch.cat((x, x[:, :2]), 1)[:, :64]}),
        key_of({**base, "x": torch.cat((x[0], x.flatten()))[1 : 1 + x.numel()].view(x.shape)}),
        key_of({**base, "weight": w.t().contiguous().t()}),
    ]
    # Of the x's, the two that are not aligned are alike.
    assert key_of(base) not in others and len(set(others)) == len(others) - 1


def test_tensor_float_32_is_measured_for_itself():
    before = torch.get_float32_matmul_precision()
    try:
        keys = set()
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            keys.add((key_of(inputs_of(dtype=FP32)), key_of(inputs_of())))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len({fp32 for fp32, _ in keys}) == 2 and len({bf16 for _, bf16 in keys}) == 1


def test_a_second_process_reads_the_first_ones_answer(timer, few, tmp_path):
    timer.fast = {"^vendor": 1e-6}
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
slk.set_backend("triton")
for rows in (70, 5):
    inputs = make_inputs((rows, 64), 80, 8, dtype=torch.bfloat16, device=device)
    lora_linear(*(inputs[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")), 1.7)
    print([choice.kernel for choice in autotune._answers.values()], len(measured) > 0)
"""
    assert python(code, STABLELORA_CACHE=str(tmp_path), STABLELORA_AUTOTUNE="1").splitlines() == [
        "['vendor'] False",
        "['vendor', 'fused'] True",
    ]
    assert {key.split()[1]: entry["kernel"] for key, entry in entries().items()} == {
        "m<=128": "vendor",
        "m<=8": "fused",
    }


@pytest.mark.parametrize("what", ["ours", "torch", "triton", "cuda", "gpu"])
def test_other_versions_and_gpus_are_measured_anew(timer, few, monkeypatch, what):
    import triton

    forward(inputs_of())
    measured = len(timer.measured)
    forget()
    forward(inputs_of())
    assert len(timer.measured) == measured and len(files()) == 1
    forget()
    if what == "gpu":
        monkeypatch.setattr(problem, "device_of", lambda device: GPU._replace(processors=1))
    else:
        owner, name = {
            "ours": (autotune, "__version__"),
            "torch": (torch, "__version__"),
            "triton": (triton, "__version__"),
            "cuda": (torch.version, "cuda"),
        }[what]
        monkeypatch.setattr(owner, name, "99.0")
    forward(inputs_of())
    assert len(timer.measured) == 2 * measured and len(files()) == 2


def content(**changes) -> str:
    """The file's text with other values in it."""
    return json.dumps({**json.loads(files()[0].read_text()), **changes})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda: "{ not JSON",
        lambda: "",
        lambda: "\x80",
        lambda: "[]",
        lambda: "{}",
        lambda: content(schema=99),
        lambda: content(made_for={}),
        lambda: content(entries=[]),
        lambda: content(entries={"some key": {"kernel": "magic", "tile": None, "reason": ""}}),
        lambda: content(entries={"some key": {"kernel": "split", "tile": {"BLOCK_M": 1}, "reason": ""}}),
        lambda: content(entries={"some key": {"kernel": "split", "tile": [1, 2], "reason": ""}}),
    ],
)
def test_a_spoilt_file_is_warned_of_once_and_rewritten(timer, few, spoil):
    forward(inputs_of())
    measured = len(timer.measured)
    (path,) = files()
    good = path.read_text()
    path.write_text(spoil(), encoding="latin-1")
    forget()
    with pytest.warns(RuntimeWarning) as caught:
        forward(inputs_of())
        forward(inputs_of(rows=5))
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert len(timer.measured) == 3 * measured
    assert len(entries(path)) == 2
    assert json.loads(good)["entries"].items() <= entries(path).items()


def test_where_nothing_can_be_written_tuning_goes_on_in_memory(timer, few, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STABLELORA_CACHE", str(tmp_path / "file"))
    timer.fast = {"^vendor": 1e-6}
    with pytest.warns(RuntimeWarning, match="can't be kept") as caught:
        check_all(inputs_of())
    assert len(caught) == 1 and str(tmp_path / "file" / "tuning") in str(caught[0].message)
    assert [choice.kernel for choice in autotune._answers.values()] == ["vendor", "vendor"]
    measured = len(timer.measured)
    check_all(inputs_of())
    assert len(timer.measured) == measured


def test_writers_keep_each_others_entries(tmp_path):
    path, entry = tmp_path / "tuning" / "gpu.json", {"kernel": "split", "tile": None, "reason": ""}
    made_for = {"device": "some GPU"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: autotune._write(path, made_for, f"key {i}", {**entry, "reason": str(i)}), range(60)))
    assert autotune._read(path, made_for) == {f"key {i}": {**entry, "reason": str(i)} for i in range(60)}
    assert not list(path.parent.glob("*.tmp"))


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    path = tmp_path / "gpu.json"
    path.mkdir()
    forget()
    with pytest.warns(RuntimeWarning) as caught:
        autotune._write(path, {}, "key", {"kernel": "split", "tile": None, "reason": ""})
    assert f"can't be kept in {path}" in str(caught[-1].message)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_another_process_wrote_meanwhile_is_kept_and_used(timer, few):
    forward(inputs_of())
    (path,) = files()
    # The other one's answer for a size that this process did not see when it read the file.
    few = key_of(inputs_of(rows=5))
    theirs = {"kernel": "vendor", "tile": None, "reason": "theirs", "microseconds": {}, "skipped": {}}
    path.write_text(content(entries={**entries(path), few: theirs}))
    forward(inputs_of(rows=200))
    assert len(entries(path)) == 3 and entries(path)[few] == theirs
    measured = len(timer.measured)
    forward(inputs_of(rows=5))
    assert len(timer.measured) == measured
    assert list(autotune._answers.values())[-1] == Choice("vendor", "theirs")


# The switch and the timer.


def python(code: str, **env: str) -> str:
    """What ``code`` prints in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "STABLELORA_AUTOTUNE"}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **env}, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_environment_variable_sets_the_start_value():
    code = "import stablelora_kernels as slk; print(slk.get_autotune())"
    assert python(code) == "False"
    assert python(code, STABLELORA_AUTOTUNE="1") == "True"
    assert python(code, STABLELORA_AUTOTUNE="0") == "False"
    message = "ValueError: the environment variable STABLELORA_AUTOTUNE must be one of '0', '1', got 'yes'"
    assert message in python(code, STABLELORA_AUTOTUNE="yes")


def test_the_switch():
    before = slk.get_autotune()
    for call in (slk.set_autotune, lambda on: slk.use_autotune(on).__enter__()):
        with pytest.raises(TypeError, match="autotune must be True or False, got '0'"):
            call("0")
    try:
        slk.set_autotune(True)
        with pytest.raises(KeyError), slk.use_autotune(False):
            assert not slk.get_autotune()
            raise KeyError
        assert slk.get_autotune()
    finally:
        slk.set_autotune(before)


def test_the_cache_is_where_downloads_are(monkeypatch, tmp_path):
    from benchmarks.common.assets import cache_dir

    for value in (str(tmp_path), ""):
        monkeypatch.setenv("STABLELORA_CACHE", value)
        assert autotune.cache_dir() == cache_dir() / "tuning"


def test_the_timer_gives_the_median_in_seconds(monkeypatch):
    import triton.testing

    ran = []

    def do_bench(run, warmup, rep, return_mode):
        run()
        return {"median": 2.0}[return_mode]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    assert autotune.time_on_gpu(lambda: ran.append(1)) == pytest.approx(2e-3) and ran


@pytest.mark.skipif(DEVICE == "cpu", reason="times a GPU, and there is none")
def test_a_gpu_is_timed():
    x = torch.randn(2048, 2048, device=DEVICE)
    once, often = (autotune.time_on_gpu(lambda n=n: [x @ x for _ in range(n)]) for n in (1, 20))
    assert 1e-6 < once < often / 4
