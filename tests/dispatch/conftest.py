"""Fixtures of the autotuner's tests."""

from __future__ import annotations

import pytest

import stablelora_kernels as slk
from stablelora_kernels.dispatch import autotune
from tests.helpers.autotuning import Timer, forget, words


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
    """The launches that ran, in words."""
    from stablelora_kernels.launch.base import Launch, VendorProduct

    ran: list[str] = []
    for kind in (Launch, VendorProduct):

        def run(self, device, original=kind.run):
            ran.append(words([self]))
            original(self, device)

        monkeypatch.setattr(kind, "run", run)
    return ran
