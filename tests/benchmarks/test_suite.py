"""The benchmark suite: arms that take turns, fail, are skipped or lose; every case's arms do the
work that their names say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("peft", reason="runs where peft is installed: pip install .[suite]")

from benchmarks.common.measure import shuffled
from benchmarks.common.null_driver import null_driver_problem
from benchmarks.common.optimizers import Unavailable
from benchmarks.common.records import read_records
from benchmarks.suite import layers, table
from benchmarks.suite.host import HostLayerCase
from benchmarks.suite.layers import (
    COMPILED,
    FROZEN_ONEDNN,
    OURS_TRITON,
    STORED,
    LayerCase,
    MLPCase,
    ProjectionsCase,
)
from benchmarks.suite.rivals import WARMUP, Case, Parts, Race
from benchmarks.suite.test_optimizer_step import OptimizerCase, StorageCase
from benchmarks.suite.test_training_step import PretrainedCase, TrainingCase
from stablelora_kernels.ops import cpu_products
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fake(Case):
    """Arms whose parts only count."""

    base = "base"
    rival = "rival"
    ours = ("mine",)
    arms = ("base", "rival", "mine", "other", "broken")
    phases: ClassVar = {"one": ("one",), "all": ("one", "two")}
    name: ClassVar = "fake"
    ran: list[tuple[str, str]] = field(default_factory=list)

    def build(self, arm: str) -> Parts:
        if arm == "other":
            raise Unavailable("no other here")
        parts: Parts = {
            name: lambda name=name: self.ran.append((arm, name))
            for name in ("prepare", "one", "two")
        }
        return parts if arm != "broken" else {"one": lambda: 1 / 0}


def pedantic(target: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
    for _ in range(rounds + warmup_rounds):
        setup()
        target()


def test_every_arm_runs_once_in_every_round() -> None:
    case = Fake()
    race, arms = Race(case), ["base", "rival", "mine"]
    # The first run of each arm compiles.
    assert len(case.ran) == 3 * 3 and {*race.arms} == {*Race(Fake(), ["base"]).arms} == {*arms}
    case.ran.clear()
    rows = race.measure(SimpleNamespace(disabled=False, pedantic=pedantic), "all", rounds=5)
    timed = [(arm, part) for arm, part in case.ran if part != "prepare"]
    order = [
        (arm, part)
        for turn in range(-WARMUP, 5)
        for arm in shuffled(arms, turn)
        for part in ("one", "two")
    ]
    # In the last round, arms after ours come in an order of their own.
    assert timed[:-6] == order[:-6] and sorted(timed[-6:]) == sorted(order[-6:])
    assert {row["n"] for row in rows if row["arm"] in arms} == {5}


@pytest.mark.parametrize(("two", "said"), [(6.0, "SLOWER"), (1.0, "faster")])
def test_ratios_are_taken_round_by_round_and_losses_are_told(two: float, said: str) -> None:
    """Rounds of 2, 3 and 5 s for the base, of 5, 7 and 11 s for the rival."""
    parts = {"base": (1.0, 1.0), "rival": (2.0, 3.0), "mine": (1.5, two)}
    samples = {
        arm: [{"one": one * i, "two": two} for i in (1, 2, 4)] for arm, (one, two) in parts.items()
    }
    rows = Race(Fake()).records("all", samples)
    found = {(row["arm"], row["metric"]): row for row in rows}
    seconds = [1.5 * i + two for i in (1, 2, 4)]
    for metric, other in (("over_base", (2, 3, 5)), ("over_rival", (5, 7, 11))):
        row, ratios = found["mine", metric], [a / b for a, b in zip(seconds, other, strict=True)]
        assert row["median"] == sorted(ratios)[1] and row["n"] == 3
        assert min(ratios) < row["q1"] < row["median"] < row["q3"] < max(ratios)
    assert found["mine", "ms"]["median"] == 1e3 * seconds[1]
    assert found["mine", "overhead_ms"]["median"] == 1e3 * (seconds[1] - 3)
    lines: list[str] = []
    table.write(lines.append, rows, 0.5)
    (line,) = (line for line in "\n".join(lines).splitlines() if line.startswith("mine"))
    assert line.split()[-1] == said and lines[-1].split()[0] == (
        "fake," if said == "SLOWER" else "Nowhere"
    )
    assert "  skipped: other: no other here" in lines
    assert "  FAILED: broken: ZeroDivisionError: division by zero" in lines


def test_exponents_are_those_of_the_larger_half() -> None:
    point = {"axis": "rank", "arm": "ours", "metric": "ms"}
    times = {1: 50.0, 2: 60.0, 4: 4.0**2, 8: 8.0**2, 16: 16.0**2}
    points = [point | {"size": size, "median": ms} for size, ms in times.items()]
    found = table.exponents(table.pd.DataFrame(points))
    assert found.loc[("rank", "ours"), "ms"] == "2.00 ± 0.00"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "n"), [(LayerCase, 24), (ProjectionsCase, (24, 8)), (MLPCase, 14)]
)
def test_arms_compute_the_same_over_shared_weights(
    kind: Any, n: Any, dtype: str, monkeypatch: Any
) -> None:
    def fails(*_args: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nat length")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_options: fails)
    case, results, saved = kind(70, 10, n, 3, dtype, CPU), {}, {}
    case.open()
    missing = dict.fromkeys(COMPILED, r"torch\.compile failed: no C\+\+ compiler$") | {
        OURS_TRITON: "need a GPU"
    }
    if not cpu_products.by_onednn(STORED[dtype], CPU):
        missing[FROZEN_ONEDNN] = "PyTorch's own"
    for arm in case.arms:
        if arm in missing:
            with pytest.raises(Unavailable, match=missing[arm]):
                case.build(arm)["forward"]()
            continue
        # Twice: a round must leave nothing for the next.
        for part in [*case.build(arm).values()] * 2:
            part()
        model, x = case.shared["models"][arm], case.shared["x"]
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = {p.data_ptr() for p in model.parameters()} - {p.data_ptr() for p in trained}
        assert frozen == {p.data_ptr() for p in case.shared["frozen"].parameters()}, arm
        results[arm] = [*case._forward([*model.children()], x), x.grad, *(p.grad for p in trained)]
        saved[arm] = case.notes(arm)["saved_bytes"]
    case.close()
    base, expected = results.pop(case.base), results.pop(case.rival)
    assert len(base) < len(expected) and not torch.allclose(
        base[0], expected[0], rtol=1e-3, atol=1e-4
    )
    for arm, found in results.items():
        for one, other in zip(found, base if arm == FROZEN_ONEDNN else expected, strict=True):
            assert (one - other).abs().max() < {"fp32": 1e-5, "bf16": 0.03}[
                dtype
            ] * other.abs().max(), arm
    # A fused MLP does not keep act(G) and H.
    elements = 2 * case.rows * n * STORED[dtype].itemsize if kind is MLPCase else 0
    for arm in saved.keys() & {layers.FUSED, "accelerated PEFT, MLP fused"}:
        assert saved[arm] <= saved[layers.APART] - elements


@pytest.mark.parametrize("kind", ["group", "mlp", "branch", "96 layers"])
def test_host_cases_of_each_kind_run_but_for_triton_without_a_null_driver(kind: str) -> None:
    race = Race(HostLayerCase(CPU, 3, kind, 0.1))
    race.close()
    missing = (OURS_TRITON, "accelerated PEFT")
    reason = f"the null driver can't run: {null_driver_problem()}"
    assert not race.failed and race.skipped == (
        dict.fromkeys(missing, reason) if null_driver_problem() else {}
    )


def test_fewer_bits_take_fewer_bytes() -> None:
    """Bytes of parameters and moments, by the bits of each."""
    sizes = {"fp32, moments fp32": 12, "bf16, moments 8 bits": 4, "bf16, moments fp32, master": 14}
    for arm, size in sizes.items():
        notes = StorageCase(256, 4, 4, 2, CPU).notes(arm)
        assert notes["bytes_per_element"] == pytest.approx(size, abs=0.05)
        assert len(notes["loss"]) == 2


def test_pairs_must_stay_in_their_state() -> None:
    case = OptimizerCase(2, 2, 16, "latched", "bf16", CPU)
    case.build("StableLoRAAdamW")["step"]()
    case.check()
    object.__setattr__(case, "state", "shrinking")
    with pytest.raises(RuntimeError, match="must stay shrinking"):
        case.check()


@pytest.mark.parametrize("kind", [TrainingCase, PretrainedCase])
def test_a_training_step_trains_every_arms_own_pairs_alone(kind: Any) -> None:
    case = kind(layers.Sizes(1, 32, 64), 2, 8, 2, "fp32", CPU, "query-value")
    case.open()
    before = [p.clone() for p in case.shared["base"].parameters()]
    for arm in {*case.arms} - {*COMPILED}:
        for part in case.build(arm).values():
            part()
        if optimizer := case.shared["optimizers"][arm]:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            # A and B of q and v, with two moments each.
            assert len(trained) == 4 and all(p.grad is not None for p in trained), arm
            assert case.notes(arm)["state_bytes"] >= 8 * sum(p.numel() for p in trained)
    assert all(map(torch.equal, before, case.shared["base"].parameters()))


@pytest.mark.nightly
def test_a_run_as_a_user_starts_it(tmp_path: Path) -> None:
    """One arm is broken, host cases run over the null driver, and figures are kept."""
    (tmp_path / "breakage.py").write_text(
        "from benchmarks.suite import layers\nlayers.by_loralib = lambda *_: 1 / 0"
    )
    settings = ("PYTEST", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}

    records, file = tmp_path / "suite.csv", ROOT / "benchmarks" / "suite" / "test_layer.py"
    options = ["-p", "no:cacheprovider", "-p", "breakage", "--suite", "tiny", "--arm", "loralib"]
    text = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options,
            "-k",
            "8x16x24 or host",
            f"--records={records}",
            file,
        ],
        env=kept | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    failed = "FAILED: loralib: ZeroDivisionError: division by zero"
    assert "3 failed" in text and failed in text, text
    rows = read_records(records).query("arm == @OURS_TRITON").groupby("metric")["median"].min()
    assert rows["ms"] > 0 and rows["first_over_later"] > 1
