"""Fixtures of the autotuner's tests."""

from __future__ import annotations

import pytest

import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune
from tests.helpers.autotuning import tuned_by_hand, words


@pytest.fixture
def timer(tmp_path):
    """Tuning is on, with an empty cache and a timer that is set by hand."""
    with tuned_by_hand(tmp_path) as fake, slk.use_backend("triton"), slk.use_kernel("auto"), slk.use_autotune(True):
        yield fake


@pytest.fixture
def few(monkeypatch):
    """Three candidates instead of a dozen, where the test is about what is kept."""
    monkeypatch.setattr(autotune, "_tiles", lambda device, call: [])


@pytest.fixture
def launched(monkeypatch):
    """The launches that ran, in words."""
    from stablelora_kernels.launch.base import Launch, VendorProduct

    ran: list[str] = []
    for kind in (Launch, VendorProduct):

        def run(self, device, original=kind.run):
            ran.append(words([self]))
            original(self, device)

        monkeypatch.setattr(kind, "run", run)
    return ran
