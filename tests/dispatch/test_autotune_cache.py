"""What the autotuner keeps on disk: what an answer holds for, and files that are spoilt, shared or not writable."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stablelora_kernels.dispatch import autotune, problem
from stablelora_kernels.dispatch.problem import Call
from stablelora_kernels.dispatch.rules import Choice
from tests.helpers.autotuning import GPU, check_all, entries, files, forget, forward, inputs_of
from tests.helpers.inputs import DEVICE, FP32
from tests.helpers.precision import switched
from tests.helpers.processes import printed


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


def runtime_warnings(caught) -> list[str]:
    """Without NumPy's DeprecationWarnings of the interpreter of Triton 3.6."""
    return [str(warning.message) for warning in caught if warning.category is RuntimeWarning]


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
    (warning,) = runtime_warnings(caught)
    assert str(path) in warning
    assert len(timer.measured) == 3 * measured
    assert len(entries(path)) == 2
    assert json.loads(good)["entries"].items() <= entries(path).items()


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


def test_writers_keep_each_others_entries(tmp_path):
    path, entry = tmp_path / "tuning" / "gpu.json", {"kernel": "split", "tile": None, "reason": ""}
    made_for = {"device": "some GPU"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: autotune._write(path, made_for, f"key {i}", {**entry, "reason": str(i)}), range(60)))
    assert autotune._read(path, made_for) == {f"key {i}": {**entry, "reason": str(i)} for i in range(60)}
    assert not list(path.parent.glob("*.tmp"))


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
