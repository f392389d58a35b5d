"""Liger-Kernel and accelerate_peft in one Trainer: equal losses, and each saves memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

pytest.importorskip(
    "liger_kernel", reason="runs where liger-kernel is installed: pip install .[test]"
)


@pytest.mark.nightly
def test_losses_are_equal_and_each_saves_memory():
    """In a process of its own: Liger patches transformers' modules for good."""
    from benchmarks.lab.liger import ARMS, Outcome

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lab.liger", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = {
        family: {name: Outcome(**values) for name, values in of_family.items()}
        for family, of_family in json.loads(done.stdout.splitlines()[-1]).items()
    }
    assert outcomes.keys() == {"Llama", "Qwen3"}
    for of_family in outcomes.values():
        alone, line, liger, both = (of_family[name] for name in ARMS)
        for outcome in (line, liger, both):
            # float32: a mean of 64 logarithms of sums over 2,048 words.
            assert outcome.losses == pytest.approx(alone.losses, rel=1e-6)
        assert alone.saved > line.saved > both.saved and alone.saved > liger.saved > both.saved
        # They save in different places.
        assert alone.saved - line.saved == liger.saved - both.saved
