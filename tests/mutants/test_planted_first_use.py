"""First use alone catches planted faults of kernels and launches: a few by day, all at night."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.threads import ONE_THREAD
from tests.mutants.__main__ import ROOT
from tests.mutants.first_use import CAUGHT, ENDLESS, MISSED, NO_EFFECT, faults, recorded

# Of the linear layer, the optimizer and first use itself.
BY_DAY = ["K08", "O10", "USE4"]

# A loss that is off by a millionth, a prepared launch, memory that ends too early, and programs that
# wait for ever.
UNCAUGHT = {"LOSS19": MISSED, "D24": MISSED, "K65": MISSED, "K42": ENDLESS, "NEW38": ENDLESS}


def run(*args: str) -> None:
    pytest.importorskip(
        "triton", reason="runs where Triton is installed: Linux on x86-64 and aarch64"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants.first_use", *args],
        cwd=ROOT,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_every_fault_of_a_kernel_or_launch_has_an_outcome() -> None:
    outcomes = recorded()
    assert [outcome.id for outcome in outcomes] == [fault.id for fault in faults()]
    # The trial and the fault's words, or the reason.
    assert all(len(outcome.words.split()) > 3 for outcome in outcomes)
    others = {o.id: o.outcome for o in outcomes if o.outcome not in (CAUGHT, NO_EFFECT)}
    assert others == UNCAUGHT


def test_a_few_faults_are_caught() -> None:
    caught = {outcome.id for outcome in recorded() if outcome.outcome == CAUGHT}
    assert caught >= {*BY_DAY}
    run(*BY_DAY)


@pytest.mark.nightly
@pytest.mark.parametrize("file", sorted({fault.file for fault in faults()}))
def test_every_outcome_is_as_recorded(file: str) -> None:
    run(*(fault.id for fault in faults() if fault.file == file))


@pytest.mark.nightly
def test_right_kernels_pass_every_trial() -> None:
    run("--unplanted")
