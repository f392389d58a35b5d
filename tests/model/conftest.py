"""A model with an adapter, and the adapter's directory."""

from __future__ import annotations

import pytest

from stablelora_kernels.model.adapters import save_adapter
from tests.helpers.adapters import adapted


@pytest.fixture
def model():
    return adapted(1)


@pytest.fixture
def saved(model, tmp_path):
    """The directory of the adapter of the fixture ``model``."""
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"
