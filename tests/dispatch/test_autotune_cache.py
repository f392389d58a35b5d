"""What the autotuner keeps on disk: what an answer holds for, and files that are damaged, foreign, shared or not writable."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stablelora_kernels.dispatch import autotune, problem
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import Choice
from tests.helpers.autotuning import GPU, answers, check_all, files, forget, forward, inputs_of
from tests.helpers.cases import DEVICE, FP32
from tests.helpers.precision import switched
from tests.helpers.processes import printed


def key_of(inputs, direction="forward", dropout=False):
    x, w = inputs["x"], inputs["weight"]
    call = Call(direction, *x.shape[:1], *w.shape, inputs["lora_A"].shape[0], x.dtype, inputs["lora_A"].dtype, dropout)
    return autotune.call_key(call, x, w, inputs["bias"])


def test_what_an_answer_holds_for():
    base = inputs_of()
    for word in ("forward", "m=128, n=80, k=64, r=8", "dtype=torch.bfloat16", "bias=True", "x by rows", "w by rows"):
        assert word in key_of(base)
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
    old, new = "set_float32_matmul_precision('high')", "backends.cuda.matmul.fp32_precision = 'tf32'"
    keys = set()
    for names in ((), (old,), (new,)):
        with switched(*names):
            keys.add((key_of(inputs_of(dtype=FP32)), key_of(inputs_of())))
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
    env = {"STABLELORA_CACHE": str(tmp_path), "STABLELORA_AUTOTUNE": "1"}
    found = printed(code, TRITON_INTERPRET="0" if DEVICE == "cuda" else "1", **env)
    assert found.splitlines() == ["['vendor'] False", "['vendor', 'fused'] True"]
    assert {key.split()[1]: answer["choice"] for key, answer in answers().items()} == {
        "m=128,": "vendor",
        "m=8,": "fused",
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
    timer.fast = {"^vendor": 1e-6}
    with pytest.warns(RuntimeWarning, match="can't be kept") as caught:
        check_all(inputs_of())
    (warning,) = runtime_warnings(caught)
    assert str(tmp_path / "file" / "tuning") in warning
    assert [choice.kernel for choice in autotune._answers.values()] == ["vendor", "vendor"]
    measured = len(timer.measured)
    check_all(inputs_of())
    assert len(timer.measured) == measured


def test_writers_lose_nothing(tmp_path):
    """Many at once, each of its own key or all of one; readers meanwhile find whole answers or none."""
    answer, choices = {"choice": "split", "reason": "", "microseconds": {"split": 1.0}}, {"split": Choice("split", "")}
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


def test_what_another_process_has_written_is_used(timer, few):
    forward(inputs_of())
    (path,) = files()
    theirs = {**json.loads(path.read_text()), "choice": "vendor", "reason": "theirs"}
    path.write_text(json.dumps(theirs))
    forget()
    timer.measured.clear()
    forward(inputs_of())
    assert not timer.measured and [*autotune._answers.values()] == [Choice("vendor", "theirs")]
