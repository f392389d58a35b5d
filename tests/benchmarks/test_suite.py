"""The benchmark suite: a tiny case through pytest-benchmark, and what happens to arms that fail, are skipped or lose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.common.measure import summarize
from benchmarks.common.optimizers import Unavailable
from benchmarks.conftest import Entry
from benchmarks.suite import rivals, table
from benchmarks.suite.layers import FROZEN_ONEDNN, LayerCase, choose_backend, compiled
from benchmarks.suite.rivals import Case, Outcome, Parts
from benchmarks.suite.test_optimizer_step import OptimizerCase
from stablelora_kernels import get_backend
from stablelora_kernels.ops import matmul

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAYER = "layer 8x16x24 r2 fp32"


def run(*options: str, plugin: str = "", tmp_path: Path) -> tuple[int, str]:
    """``pytest benchmarks`` in a process of its own, as a user runs it, without the slow arms unless asked for."""
    # Under pytest -n, whose variables a child inherits, pytest-benchmark would time nothing; nor are our own options the child's.
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))
    }
    environment = {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    if plugin:
        (tmp_path / "breakage.py").write_text(plugin)
        environment["PYTHONPATH"] = str(tmp_path)
        options = ("-p", "breakage", *options)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--suite", "tiny", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@dataclass(frozen=True)
class Fake(Case):
    """Arms whose parts only count."""

    base: ClassVar[str] = "base"
    rival: ClassVar[str] = "rival"
    ours: ClassVar[tuple[str, ...]] = ("mine",)
    arms: ClassVar[tuple[str, ...]] = ("base", "rival", "mine", "other")
    phases: ClassVar[dict[str, tuple[str, ...]]] = {"one": ("one",), "all": ("one", "two")}
    fails: tuple[str, ...] = ()
    misses: tuple[str, ...] = ()
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "fake"

    def facts(self) -> dict[str, Any]:
        return {}

    def build(self, arm: str) -> Parts:
        if arm in self.misses:
            raise Unavailable(f"no {arm} here")

        def part(name: str) -> None:
            if arm in self.fails and name == "two":
                raise ZeroDivisionError(arm)
            self.calls.append((arm, name))

        return {name: lambda name=name: part(name) for name in ("prepare", "one", "two")}


SAMPLES = {
    "base": {"prepare": [9.0] * 4, "one": [1.0, 2.0, 4.0, 1.0], "two": [1.0] * 4},
    "rival": {"prepare": [9.0] * 4, "one": [2.0, 4.0, 8.0, 2.0], "two": [3.0] * 4},
    "mine": {"prepare": [9.0] * 4, "one": [1.5, 3.0, 6.0, 1.5], "two": [4.0] * 4},
}


def test_a_tiny_case_through_pytest_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    # Compiling takes most of a minute; a plugin leaves those two arms out.
    plugin = (
        "from benchmarks.suite.layers import LayerCase as L\nL.arms = tuple(a for a in L.arms if 'compiled' not in a)\n"
    )
    status, printed = run("benchmarks/test_layer.py", f"--benchmark-json={path}", plugin=plugin, tmp_path=tmp_path)
    assert status == 0, printed
    report = json.loads(path.read_text())
    arms = [arm for arm in LayerCase.arms if "compiled" not in arm and arm != "ours, Triton"]
    found = {(entry["extra_info"]["phase"], entry["extra_info"]["arm"]): entry for entry in report["benchmarks"]}
    assert list(found) == [(phase, arm) for phase in ("forward", "backward", "both") for arm in arms]
    for (phase, arm), entry in found.items():
        info, seconds = entry["extra_info"], entry["stats"]["data"]
        assert entry["params"] == {"case": LAYER, "phase": phase, "arm": arm} and len(seconds) == 3
        assert (info["dtype"], info["shape"]["r"], info["device"]) == ("fp32", 2, "cpu")
        base, peft = (found[phase, name]["stats"]["data"] for name in ("frozen nn.Linear", "PEFT"))
        # Ratios are those of rounds, not of medians.
        assert info["over_base"] == pytest.approx(summarize([s / b for s, b in zip(seconds, base, strict=True)]))
        assert info["over_rival"] == pytest.approx(summarize([s / p for s, p in zip(seconds, peft, strict=True)]))
        overhead = summarize([1e3 * (s - b) for s, b in zip(seconds, base, strict=True)])
        assert info["overhead_ms"] == pytest.approx(overhead)
    for arm in arms:
        forward, backward, both = (found[phase, arm]["stats"]["data"] for phase in ("forward", "backward", "both"))
        assert both == pytest.approx([f + b for f, b in zip(forward, backward, strict=True)])
    assert [(entry["case"], entry["arm"]) for entry in report["skipped"]] == [(LAYER, "ours, Triton")]
    assert "need a GPU" in report["skipped"][0]["reason"] and "SKIPPED" in printed
    assert report["machine_info"]["stablelora_kernels"]["torch"] == torch.__version__
    assert f"{LAYER}, both, ms" in printed and "/ PEFT's" in printed

    status, printed = run(
        "benchmarks/test_layer.py", f"--benchmark-compare={path}", "--benchmark-group-by=param:arm", "-k", "loralib",
        plugin=plugin, tmp_path=tmp_path,
    )  # fmt: skip
    # Each of the three phases, now and before.
    assert status == 0 and "benchmark 'arm=loralib': 6 tests" in printed, printed
    assert printed.count("(NOW)") >= 3 and "Comparing against benchmarks from" in printed
    # What loralib is compared with was sampled too.
    assert "PEFT" in printed and "eager LoRA" not in printed.partition("sampled in turns")[2]


def test_an_arm_that_raises_is_an_error_and_the_others_are_measured(tmp_path: Path) -> None:
    plugin = (
        "from benchmarks import layers\n"
        "layers.LayerCase.arms = ('frozen nn.Linear', 'PEFT', 'loralib')\n"
        "def broken(*args): raise ArithmeticError('loralib is broken')\n"
        "layers._loralib = broken\n"
    )
    status, printed = run("benchmarks/test_layer.py", plugin=plugin, tmp_path=tmp_path)
    assert status == 1 and "3 failed, 6 passed" in printed, printed
    assert "FAILED: loralib: ArithmeticError: loralib is broken" in printed


def test_nothing_is_timed_where_benchmarks_are_disabled(tmp_path: Path) -> None:
    plugin = "from benchmarks import layers\nlayers.LayerCase.arms = ('frozen nn.Linear', 'PEFT')\n"
    status, printed = run("benchmarks/test_layer.py", "--benchmark-disable", plugin=plugin, tmp_path=tmp_path)
    assert status == 0 and "6 passed" in printed and "sampled in turns" not in printed, printed


def test_sampling_takes_every_arm_each_round_and_only_what_is_asked_for() -> None:
    case = Fake()
    outcome = rivals.sample(case, {"mine"}, iters=5)
    assert set(outcome.samples) == {"base", "rival", "mine"} and not outcome.errors and not outcome.skipped
    # The first call of each, the warm-up, and the rounds; parts in their order.
    assert len(case.calls) == 3 * 3 * (1 + rivals.WARMUP + 5)
    assert [part for _, part in case.calls] == ["prepare", "one", "two"] * (len(case.calls) // 3)
    for turn in range(0, len(case.calls), 9):
        assert {arm for arm, _ in case.calls[turn : turn + 9]} == {"base", "rival", "mine"}
    assert all(len(times) == 5 for parts in outcome.samples.values() for times in parts.values())


def test_failing_and_missing_arms_leave_the_others_alone() -> None:
    outcome = rivals.sample(Fake(fails=("other",), misses=("mine",)), Fake.arms, iters=2)
    assert set(outcome.samples) == {"base", "rival"} and outcome.skipped == {"mine": "no mine here"}
    assert isinstance(outcome.errors["other"], ZeroDivisionError)


def test_what_fails_between_rounds_fails_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Fake) -> None:
        raise RuntimeError("not what they were to be")

    monkeypatch.setattr(Fake, "close", broken)
    outcome = rivals.sample(Fake(), Fake.arms, iters=2)
    assert set(outcome.errors) == set(Fake.arms) and not outcome.samples


def test_an_arm_whose_base_did_not_run_is_an_error() -> None:
    benchmark = SimpleNamespace(disabled=False)
    entry = Entry(Fake(), "all", "mine", Outcome(samples={"mine": SAMPLES["mine"]}, skipped={"base": "no base here"}))
    with pytest.raises(RuntimeError, match="'base', which 'mine' is compared with, did not run"):
        entry.record(benchmark)


def test_comparisons_are_paired() -> None:
    found = rivals.compare(Fake(), Outcome(samples=SAMPLES), "all", "mine")
    assert found["over_base"] == summarize([5.5 / 2, 7 / 3, 10 / 5, 5.5 / 2])
    assert found["over_rival"] == summarize([5.5 / 5, 7 / 7, 10 / 11, 5.5 / 5])
    assert found["overhead_ms"] == summarize([3500.0, 4000.0, 5000.0, 3500.0])
    assert found["overhead_over_rival"] == pytest.approx(3750 / 3500)
    assert found["parts_ms"] == {"one": 2250.0, "two": 4000.0}
    assert "overhead_over_rival" in rivals.compare(Fake(), Outcome(samples=SAMPLES), "one", "mine")


def test_the_table_says_where_we_lose() -> None:
    lines: list[str] = []
    slow = {**SAMPLES, "mine": {**SAMPLES["rival"], "two": [5.0] * 4}}
    outcome = Outcome(samples=slow, skipped={"other": "no such thing"})
    table.write(lines.append, [(Fake(), outcome)], 0.5)
    text = "\n".join(lines)
    assert text.count("SLOWER") == 1 and "skipped: other: no such thing" in text
    assert "fake, all: mine takes 1.34" in text and "fake, one: mine" not in text
    lines.clear()
    table.write(lines.append, [(Fake(), Outcome(samples={**SAMPLES, "mine": SAMPLES["base"]}))], 0.5)
    assert lines[-1] == "Nowhere slower than the rival."


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fails(*_args: Any) -> None:
        raise TorchDynamoException("no C++ compiler\nat length")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: fails)
    with pytest.raises(Unavailable, match=r"torch\.compile failed: no C\+\+ compiler$"):
        compiled(torch.nn.Linear(2, 2))(torch.ones(2))


def test_triton_on_a_cpu_is_a_reason_and_changes_nothing() -> None:
    before = get_backend()
    with pytest.raises(Unavailable, match="need a GPU"):
        choose_backend("triton", CPU)
    assert get_backend() == before


def test_the_layers_arms_compute_the_same() -> None:
    case = LayerCase(8, 16, 24, 2, "fp32", CPU)
    before, outs = get_backend(), {}
    case.open()
    try:
        grad = case._shared["grad"]
        for arm in LayerCase.arms:
            if "compiled" in arm or arm == "ours, Triton":
                continue
            if arm == FROZEN_ONEDNN and not matmul.by_onednn(torch.float32, CPU):
                with pytest.raises(Unavailable, match="PyTorch's own"):
                    case.build(arm)
                continue
            seen: list[torch.Tensor] = []
            x = case._shared["x"]
            parts = case.build(arm)
            hook = torch.nn.modules.module.register_module_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            parts["prepare"](), parts["forward"](), parts["backward"]()
            hook.remove()
            outs[arm] = (seen[-1].detach(), x.grad.clone())
        assert grad.shape == (8, 24)
    finally:
        case.close()
    assert get_backend() == before
    frozen, eager = outs.pop("frozen nn.Linear"), outs["eager LoRA"]
    assert not torch.allclose(frozen[0], eager[0], atol=1e-3)
    if FROZEN_ONEDNN in outs:
        torch.testing.assert_close(outs.pop(FROZEN_ONEDNN), frozen)
    for arm, values in outs.items():
        torch.testing.assert_close(values, eager, rtol=1e-4, atol=1e-5, msg=arm)


def test_the_optimizers_pairs_must_stay_in_their_state() -> None:
    case = OptimizerCase(2, 2, 16, "shrinking", "fp32", CPU)
    assert not rivals.sample(case, {"StableLoRAAdamW", "Algorithm 1 by hand, AdamW loop"}, iters=2).errors
    latched = OptimizerCase(2, 2, 16, "latched", "fp32", CPU)
    latched.build("StableLoRAAdamW")["step"]()
    object.__setattr__(latched, "state", "shrinking")
    with pytest.raises(RuntimeError, match="were to be shrinking throughout"):
        latched.close()
