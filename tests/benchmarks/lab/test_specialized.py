"""The specialized product: compiled, emulated, launched over the null driver, and its verdicts.

Triton's interpreter, in which other tests run, does not know Gluon. So most of these run in
processes of their own.
"""

from __future__ import annotations

import pandas as pd
import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64")

from benchmarks.common.tritons import PINNED
from benchmarks.lab.gpu import experiment, verdicts
from benchmarks.lab.gpu.report import page
from benchmarks.lab.specialized import support
from tests.helpers.processes import python

PLANTS = (
    "wgmma-wait", "proxy-fence", "store-wait", "role-barriers", "init-barrier", "one-consumer",
    "flag-acquire", "flag-release", "one-cta", "cluster-end",
)  # fmt: skip


def status_of(module: str, *arguments: str) -> int:
    """The exit status of ``python -m module arguments``, whose output is a failure's message."""
    done = python(f"""
import runpy, sys
sys.argv = {["-m", *arguments]!r}
runpy.run_module({module!r}, run_name="__main__")
""")
    assert done.returncode in (0, 1), done.stdout + done.stderr
    if done.returncode:
        print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.nightly
def test_it_compiles_without_spills_or_serialized_products() -> None:
    """By day, the branch alone and by pairs of CTAs."""
    assert status_of("benchmarks.lab.specialized", "--only", "branch") == 0


@pytest.mark.nightly
@pytest.mark.parametrize("version", PINNED)
def test_every_variant_compiles_under_every_triton(version: str) -> None:
    assert status_of("benchmarks.lab.specialized", "--triton", version) == 0


@pytest.mark.nightly
def test_small_cases_are_right_on_the_emulator() -> None:
    assert status_of("tests.ptx_emulator.specialized", "--quick") == 0


@pytest.mark.nightly
@pytest.mark.parametrize("version", PINNED)
def test_every_case_is_right_under_every_triton(version: str) -> None:
    assert status_of("tests.ptx_emulator.specialized", "--triton", version) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(name: str) -> None:
    assert status_of("tests.ptx_emulator.specialized", "--plant", name) == 1


def test_all_plants_are_among_these() -> None:
    done = python(
        f"from tests.ptx_emulator.specialized import PLANTS; assert [*PLANTS] == {[*PLANTS]!r}"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dropout", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_every_arm_launches_over_the_null_driver(dropout: bool) -> None:
    """Triton's own launcher takes the arguments of each; the branch comes first only in versions
    with that strategy.
    """
    done = python(
        f"dropout = {dropout}"
        + """
from types import SimpleNamespace
from unittest import mock
import torch
from benchmarks.common.null_driver import null_driver, null_driver_problem
if problem := null_driver_problem():
    print(problem)
    raise SystemExit(77)
from benchmarks.lab.gpu import experiment
from benchmarks.lab.predict.rivals import Shape
from benchmarks.lab.specialized.support import UnavailableError, reason_against
from stablelora_kernels.launch.base import launch_counts

def make(*size, dtype):
    return (torch.randn if dtype.is_floating_point else torch.zeros)(*size, dtype=dtype)

cpu = torch.device("cpu")
gpu = SimpleNamespace(multi_processor_count=132)
with null_driver(), mock.patch("torch.cuda.get_device_properties", lambda device: gpu), mock.patch(
    "torch.cuda.get_device_capability", lambda device: (9, 0)
):
    shape = Shape(300, 512, 256, 16, dropout, wide_adapters=False)
    left_out = set()
    for arm, build in experiment.runs(cpu, shape, make).items():
        try:
            run = build()
        except UnavailableError:
            left_out.add(arm)
            continue
        run()
    allowed = {experiment.FIRST, experiment.FIRST_BACKWARD}
    if reason_against(pairs=True):
        allowed |= {experiment.in_pairs(arm) for arm in experiment.OURS}
    assert left_out <= allowed, left_out
expected = 3 if reason_against(pairs=True) else 6
assert launch_counts["specialized_product_kernel"] == expected, launch_counts
"""
    )
    if done.returncode == 77:
        pytest.skip(f"the null driver can't run: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_its_operands_are_those_of_todays_kernels() -> None:
    """Y, and dX with a mask, from the package's own calls on the emulator, against float64."""
    done = python("""
import torch
from benchmarks.lab.gpu.experiment import operands_of
from benchmarks.lab.predict import parts
from benchmarks.lab.predict.rivals import Shape
from benchmarks.lab.specialized.launches import launch_product
from stablelora_kernels.reference import unpack_mask
from tests.ptx_emulator.machine import Schedule
from tests.ptx_emulator.runner import run

def make(*size, dtype):
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, size).to(dtype)
    return (torch.randn if dtype.is_floating_point else torch.zeros)(*size, dtype=dtype)

torch.manual_seed(0)
calls = parts.calls(Shape(70, 48, 64, 8, True, wide_adapters=False), make)
for name in ("bare", "forward", "backward"):
    p = getattr(calls, name)
    p.y.fill_(float("nan"))
    faults = run(launch_product(operands_of(p), 132), Schedule("sm_90"))
    expected = p.x.double() @ p.w.double().t()
    if p.s is not None:
        branch = p.s.double() @ p.up.double().t()
        expected += branch * unpack_mask(p.mask, p.y.shape[1]) if name == "backward" else branch
    off = (p.y.double() - expected).abs()
    assert (off <= 2.0**-8 * expected.abs() + 1e-4).all() and not faults.found, (name, faults.lines())
""")
    assert done.returncode == 0, done.stdout + done.stderr


def test_why_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "INTERPRETING", False)
    monkeypatch.setattr(support, "RELEASE", (3, 6))
    assert not support.reason_against()
    assert "pairs of CTAs need Triton 3.8 or newer" in support.reason_against(pairs=True)
    monkeypatch.setattr(support, "RELEASE", (3, 5))
    assert "the specialized product needs Triton 3.6 or newer" in support.reason_against()
    assert not support.reason_against_gpu((9, 0))
    assert support.reason_against_gpu((10, 0)).endswith("this is 10.0")


def timed(times: dict[str, float], dropout: float) -> list[dict[str, object]]:
    """Invented rows of three numbers of rows, of which one is slower by half."""
    return [
        {
            "section": "specialized", "metric": "us", "status": "ok", "m": m, "dropout": dropout,
            "arm": arm, "median": us * factor,
        }
        for arm, us in times.items()
        for m, factor in ((2048, 1.0), (4096, 2.0), (8192, 4.0))
    ]  # fmt: skip


FAST = {
    experiment.VENDOR: 90.0,
    experiment.TODAY: 100.0,
    experiment.SPECIALIZED: 92.0,
    experiment.in_pairs(experiment.SPECIALIZED): 90.0,
    experiment.Y_FROM_S: 105.0,
    experiment.S: 20.0,
    experiment.CHAINED: 108.0,
    experiment.FIRST: 104.0,
}
SLOW = FAST | {
    experiment.SPECIALIZED: 98.0,
    experiment.in_pairs(experiment.SPECIALIZED): 97.0,
    experiment.CHAINED: 119.0,
    experiment.FIRST: 120.0,
}


def test_each_question_has_its_verdict_and_number() -> None:
    rows = pd.DataFrame([*timed(FAST, 0.0), *timed(SLOW, 0.1)])
    lines = verdicts.verdicts(rows)
    assert len(lines) == 2 * len(verdicts.QUESTIONS)
    for answer, figure in (
        ("0.0: go on: what the specialized product gains on today's", "+8.7%"),
        ("0.1: stop: what the specialized product gains on today's", "+2.0%"),
        ("0.0: keep pairs: what pairs add", "+2.2%"),
        ("0.1: leave pairs: what pairs add", "+1.0%"),
        ("0.0: branch first: what branch first gains on chained, forward", "+3.8%"),
        ("0.1: chained: what branch first gains on chained, forward", "-0.8%"),
        ("0.0: S is hidden: share of S's time that the chained launch hides", "0.850"),
        ("0.1: S is not hidden: share of S's time that the chained launch hides", "0.300"),
        ("0.0: below the vendor's: share of the vendor's product that today's product", "0.900"),
        ("0.0: as fast as the vendor's: share of the vendor's product that the spec", "0.978"),
    ):
        (line,) = [line for line in lines if line.startswith(f"dropout {answer}")]
        assert figure in line, line
    # Of dX nothing is measured.
    assert "dropout 0.0: not measured: the same, dX" in lines
    summary = page(rows.assign(case="x", phase="many launches"), {"gpu": "x"}, dry=False)
    assert "go on: what the specialized product gains" in summary
    dry = page(rows.assign(case="x", phase="many launches"), {"gpu": "x"}, dry=True)
    assert "go on" not in dry
