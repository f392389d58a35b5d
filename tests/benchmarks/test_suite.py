"""The benchmark suite: a tiny case through pytest-benchmark, arms that fail, are skipped or lose, and each kind of case."""

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

from benchmarks import conftest
from benchmarks.common.measure import shuffled, summarize
from benchmarks.common.optimizers import Unavailable
from benchmarks.suite import scaling, table, test_optimizer_step
from benchmarks.suite.layers import FROZEN_ONEDNN, LayerCase, ScalingLayerCase, choose_backend, compiled
from benchmarks.suite.projections import ProjectionsCase
from benchmarks.suite.rivals import WARMUP, Case, Parts, Race
from benchmarks.suite.steps import OptimizerCase, ScalingStepCase, StorageCase
from stablelora_kernels import get_backend
from stablelora_kernels.ops import matmul

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAYER = "layer 8x16x24 r2 fp32"


def run(*options: str, plugin: str = "", tmp_path: Path) -> tuple[int, str]:
    """``pytest benchmarks`` in a process of its own, as a user runs it."""
    # A child of pytest -n inherits variables that would disable pytest-benchmark, and our own options.
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

    base = "base"
    rival = "rival"
    ours = ("mine",)
    arms = ("base", "rival", "mine", "other")
    phases: ClassVar = {"one": ("one",), "all": ("one", "two")}
    device: torch.device = CPU
    fails: tuple[str, ...] = ()
    misses: tuple[str, ...] = ()
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "fake"

    def build(self, arm: str) -> Parts:
        if arm in self.misses:
            raise Unavailable(f"no {arm} here")

        def part(name: str) -> None:
            if arm in self.fails and name == "two":
                raise ZeroDivisionError(arm)
            self.calls.append((arm, name))

        return {name: lambda name=name: part(name) for name in ("prepare", "one", "two")}


class Benchmark:
    """As much of pytest-benchmark's fixture as the suite uses."""

    def __init__(self, disabled: bool = False) -> None:
        self.disabled = disabled

    def pedantic(self, target: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(1 if self.disabled else rounds + warmup_rounds):
            setup()
            target()


SAMPLES = {
    "base": [{"one": one, "two": 1.0} for one in (1.0, 2.0, 4.0, 1.0)],
    "rival": [{"one": one, "two": 3.0} for one in (2.0, 4.0, 8.0, 2.0)],
    "mine": [{"one": one, "two": 4.0} for one in (1.5, 3.0, 6.0, 1.5)],
}


def report_of(samples: dict[str, Any], phase: str = "all") -> dict[str, Any]:
    race = Race(Fake(misses=("other",)))
    return race._report(phase, samples)


def measured(case: Case, rounds: int = 2, only: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """The reports of a case's phases."""
    race = Race(case, only)
    assert not race.failed
    try:
        reports = {phase: race.measure(Benchmark(), phase, rounds) for phase in case.phases}
        case.check()
    finally:
        race.close()
    return reports


FILES = ("benchmarks/suite/test_layer.py", "-k", "8x16x24")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Figures of a tiny case, kept in a file, and what the run printed."""
    place = tmp_path_factory.mktemp("suite")
    options = [word for arm in ("eager LoRA", "loralib", "ours, PyTorch", "ours, Triton") for word in ("--arm", arm)]
    status, printed = run(*FILES, *options, f"--benchmark-json={place / 'suite.json'}", tmp_path=place)
    assert status == 0, printed
    return place / "suite.json", printed


def test_a_tiny_case_through_pytest_benchmark(kept: tuple[Path, str]) -> None:
    path, printed = kept
    # "ours compiled" and "PEFT compiled" take most of a minute.
    arms = ("frozen nn.Linear", "eager LoRA", "PEFT", "loralib", "ours, PyTorch")
    report = json.loads(path.read_text())
    assert [entry["params"] for entry in report["benchmarks"]] == [
        {"case": case, "phase": phase}
        for case, phase in [(LAYER, phase) for phase in LayerCase.phases] + [("projections 8x16x24+8 r2 fp32", "both")]
    ]
    for entry in report["benchmarks"][:3]:
        info, stats = entry["extra_info"], entry["stats"]
        assert tuple(info["arms"]) == arms and info["target"] == "ours, PyTorch"
        assert (info["dtype"], info["shape"]["r"], info["device"]) == ("fp32", 2, "cpu")
        assert "need a GPU" in info["skipped"]["ours, Triton"]
        # Medians and quartiles, no rounds; and pytest-benchmark's own median is of the same runs.
        assert "data" not in stats and stats["rounds"] == 3
        assert 1e3 * stats["median"] == pytest.approx(info["arms"]["ours, PyTorch"]["ms"]["median"], rel=0.5, abs=0.1)
        assert info["arms"]["frozen nn.Linear"]["over_base"] == dict.fromkeys(("median", "q1", "q3"), 1.0)
    assert report["machine_info"]["stablelora_kernels"]["torch"] == torch.__version__
    assert f"{LAYER}, both, ms" in printed and "/ PEFT's" in printed and "skipped: ours, Triton" in printed


@pytest.mark.nightly
def test_a_run_is_compared_with_kept_figures(kept: tuple[Path, str], tmp_path: Path) -> None:
    status, printed = run(*FILES, "--arm", "loralib", f"--benchmark-compare={kept[0]}", tmp_path=tmp_path)
    assert status == 0 and printed.count("(NOW)") >= 3 and "Comparing against benchmarks from" in printed, printed
    shown = printed.partition("timed in turns")[2]
    assert "loralib" in shown and "PEFT" in shown and "eager LoRA" not in shown


@pytest.mark.nightly
def test_an_arm_that_raises_is_a_failure_and_the_others_are_measured(tmp_path: Path) -> None:
    plugin = (
        "from benchmarks.suite import layers\n"
        "def broken(*args): raise ArithmeticError('loralib is broken')\n"
        "layers._loralib = broken\n"
    )
    files = ("benchmarks/suite/test_layer.py", "-k", "8x16x24 and not projections", "--arm", "loralib")
    status, printed = run(*files, plugin=plugin, tmp_path=tmp_path)
    assert status == 1 and "3 failed" in printed, printed
    assert "FAILED: loralib: ArithmeticError: loralib is broken" in printed and "ours, PyTorch" in printed


@pytest.mark.nightly
def test_nothing_is_timed_if_benchmarks_are_disabled(tmp_path: Path) -> None:
    files = ("benchmarks/suite/test_layer.py", "-k", "8x16x24 and not projections", "--arm", "PEFT")
    status, printed = run(*files, "--benchmark-disable", tmp_path=tmp_path)
    assert status == 0 and "3 passed" in printed and "timed in turns" not in printed, printed


@pytest.mark.parametrize(
    ("markexpr", "suite", "marks"),
    [
        ("", "quick", {""}),
        ("host", "quick", {"", "host"}),
        ("", "tiny", {"", "host", "scaling", "storage"}),
    ],
)
def test_marked_cases_run_only_if_m_names_them(markexpr: str, suite: str, marks: set[str]) -> None:
    config = SimpleNamespace(
        getoption=lambda name: suite,
        option=SimpleNamespace(markexpr=markexpr),
        stash={conftest.CASES: {}, conftest.DEVICE: CPU},
    )
    made: list[Any] = []
    metafunc = SimpleNamespace(
        config=config, module=test_optimizer_step, parametrize=lambda names, rows, scope: made.extend(rows)
    )
    conftest.pytest_generate_tests(metafunc)
    assert {case.mark for case in config.stash[conftest.CASES].values()} == marks
    assert {mark.name for row in made for mark in row.marks} == marks - {""}


def test_every_arm_runs_once_in_every_round() -> None:
    case = Fake()
    race = Race(case)
    # The first run of each arm compiles.
    first, case.calls[:] = len(case.calls), []
    assert first == 4 * 3
    report = race.measure(Benchmark(), "all", rounds=5)
    # The last round is completed after pytest-benchmark's last run.
    order = [arm for turn in range(-WARMUP, 5) for arm in shuffled([*Fake.arms], turn)]
    assert [arm for arm, part in case.calls if part == "two"] == order[: 4 * (WARMUP + 5)]
    timed = [(arm, part) for arm, part in case.calls if part != "prepare"]
    assert timed == [(arm, part) for arm in order for part in ("one", "two")]
    assert set(report["arms"]) == set(Fake.arms) and report["target"] == "mine"
    case.calls.clear()
    assert race.measure(Benchmark(disabled=True), "one", rounds=5) is None
    # A phase ends with its last part.
    assert {part for _, part in case.calls} == {"prepare", "one"}


def test_only_the_wanted_arms_run() -> None:
    assert set(Race(Fake(), ["base"]).arms) == {"base", "rival", "mine"}
    assert set(Race(Fake(), ["other"]).arms) == {"base", "rival", "mine", "other"}


def test_failing_and_missing_arms_leave_the_others_alone() -> None:
    race = Race(Fake(fails=("other",), misses=("mine",)))
    assert set(race.arms) == {"base", "rival"} and race.skipped == {"mine": "no mine here"} and race.target is None
    assert isinstance(race.failed["other"], ZeroDivisionError)


def test_comparisons_are_paired() -> None:
    found = report_of(SAMPLES)["arms"]["mine"]
    assert found["over_base"] == summarize([5.5 / 2, 7 / 3, 10 / 5, 5.5 / 2])
    assert found["over_rival"] == summarize([5.5 / 5, 7 / 7, 10 / 11, 5.5 / 5])
    assert found["overhead_ms"] == summarize([3500.0, 4000.0, 5000.0, 3500.0])
    assert found["overhead_over_rival"] == pytest.approx(3750 / 3500)
    assert [found["parts"][part]["ms"]["median"] for part in ("one", "two")] == [2250.0, 4000.0]
    # A part's share is of the base's whole round.
    assert found["parts"]["two"]["added_percent"] == summarize([100 * 3 / total for total in (2, 3, 5, 2)])


def test_the_table_says_where_we_lose() -> None:
    lines: list[str] = []
    slow = {**SAMPLES, "mine": [times | {"two": 5.0} for times in SAMPLES["rival"]]}
    table.write(lines.append, [report_of(slow)], 0.5)
    text = "\n".join(lines)
    assert text.count("SLOWER") == 1 and "skipped: other: no other here" in text and "two adds, %" in text
    assert "fake, all: mine takes 1.34" in text
    lines.clear()
    table.write(lines.append, [report_of({**SAMPLES, "mine": SAMPLES["base"]})], 0.5)
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
        grad = case.shared["grad"]
        for arm in LayerCase.arms:
            if "compiled" in arm or arm == "ours, Triton":
                continue
            if arm == FROZEN_ONEDNN and not matmul.by_onednn(torch.float32, CPU):
                with pytest.raises(Unavailable, match="PyTorch's own"):
                    case.build(arm)
                continue
            seen: list[torch.Tensor] = []
            x = case.shared["x"]
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
    arms = ("StableLoRAAdamW", "Algorithm 1 by hand, AdamW loop")
    measured(OptimizerCase(2, 2, 16, "shrinking", "fp32", CPU), only=arms)
    latched = OptimizerCase(2, 2, 16, "latched", "fp32", CPU)
    latched.build("StableLoRAAdamW")["step"]()
    object.__setattr__(latched, "state", "shrinking")
    with pytest.raises(RuntimeError, match="must stay shrinking"):
        latched.check()


def test_projections_together_compute_what_they_do_one_by_one() -> None:
    case = ProjectionsCase(8, 16, (24, 8), 2, "fp32", CPU)
    case.open()
    grads = {}
    for arm in ("ours, one by one", "ours, together"):
        for part in case.build(arm).values():
            part()
        grads[arm] = case.shared["x"].grad
    torch.testing.assert_close(*grads.values())


def test_fewer_bits_take_fewer_bytes() -> None:
    (report,) = measured(StorageCase(256, 4, 4, 2, CPU)).values()
    found = {arm: figures["bytes_per_element"] for arm, figures in report["arms"].items()}
    assert found["fp32, moments fp32"] == 12 and found["bf16, moments bf16"] == 6
    assert found["fp32, moments 8 bits"] == pytest.approx(6, abs=0.05)
    assert found["bf16, moments fp32, master"] == 14
    assert all(len(figures["losses"]) == 2 for figures in report["arms"].values())


# Scaling


def test_exponents_of_known_powers() -> None:
    sizes = [2.0**i for i in range(8)]
    slope, half = scaling.exponent(sizes, [3 * size**1.5 for size in sizes])
    assert slope == pytest.approx(1.5) and half == pytest.approx(0, abs=1e-6)
    noisy = [size * (1.3 if i % 2 else 1.0) for i, size in enumerate(sizes)]
    slope, half = scaling.exponent(sizes, noisy)
    assert abs(slope - 1) < half
    # An overhead below zero is noise, and has no logarithm.
    assert scaling.exponent([1, 2, 4], [-1.0, -1.0, 1.0]) is None


def test_floors_by_hand() -> None:
    machine = scaling.Machine(flops=1e9, bandwidth=1e9)
    # Many rows: operations take longer, 4 M N K.
    floors = scaling.layer_floors(1000, 100, 100, 10, machine)
    assert floors["frozen"] == pytest.approx(1e3 * 4 * 1000 * 100 * 100 / 1e9)
    assert floors["overhead"] == pytest.approx(1e3 * 6 * 1000 * 10 * 200 / 1e9)
    # A single row: bytes.
    floors = scaling.layer_floors(1, 100, 100, 1, machine)
    assert floors["frozen"] == pytest.approx(1e3 * 4 * (400 + 20_000) / 1e9)
    assert floors["overhead"] == pytest.approx(1e3 * 4 * (200 + 600) / 1e9)
    assert scaling.step_floor(100, machine)["step"] == pytest.approx(1e3 * 28 * 100 / 1e9)


def test_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "machine", lambda device: scaling.Machine(1e11, 1e10))
    layers: list[Case] = [ScalingLayerCase(rows, 16, 16, 2, "fp32", CPU, axis="tokens") for rows in (8, 16, 32)]
    steps: list[Case] = [ScalingStepCase(pairs, 2, 16, "latched", "fp32", CPU) for pairs in (1, 2, 3)]
    reports = [report for case in (*layers, *steps) for report in measured(case).values()]
    for report, rows in zip(reports[:3], (8, 16, 32), strict=True):
        # x is the caller's; besides it a layer keeps S.
        saved = {arm: figures["saved_bytes"] for arm, figures in report["arms"].items()}
        assert saved == {"frozen nn.Linear": 0, "PEFT": 4 * rows * 2, "ours, PyTorch": 4 * rows * 2}
        assert report["axis"] == {"name": "tokens", "size": rows} and report["floor_ms"]["frozen"] > 0
    found = scaling.exponents(reports)
    assert set(found) == {"tokens", "pairs, latched"} and set(found["pairs, latched"]) == set(ScalingStepCase.arms)
    lines: list[str] = []
    table.write(lines.append, reports, 0.0)
    assert "Time against tokens, exponents" in "\n".join(lines)
