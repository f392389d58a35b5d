"""Models with adapters, and an adapter's directory."""

from __future__ import annotations

import pytest
import torch

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.save_load import save_adapter
from tests.helpers.adapters import adapted
from tests.helpers.small_models import Model, fill_b, lora_config


@pytest.fixture(scope="module")
def old():
    return adapted(1, lora_alpha=4)


@pytest.fixture(scope="module")
def new():
    return adapted(2, lora_alpha=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def saved(model, tmp_path):
    """An adapter's directory. Its model is the fixture ``model``, with B filled."""
    apply_lora(model, lora_config())
    fill_b(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"
