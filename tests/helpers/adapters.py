"""Adapters of the small model for tests of their files."""

from __future__ import annotations

import json

import pytest
import torch

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.save_load import load_adapter
from tests.helpers.small_models import Model, fill_b, lora_config, output


def fresh():
    torch.manual_seed(0)
    return Model().eval()


def adapted(seed, **config):
    model = fresh()
    apply_lora(model, lora_config(**config))
    torch.manual_seed(seed)
    fill_b(model)
    return model


def loaded(directory):
    model = fresh()
    load_adapter(model, directory)
    return output(model)


def edit_config(directory, **changes):
    file = directory / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory, change):
    reason = "safetensors is not installed (pip install .[test])"
    safetensors_torch = pytest.importorskip("safetensors.torch", reason=reason)
    tensors = safetensors_torch.load_file(directory / WEIGHTS_NAME)
    change(tensors)
    safetensors_torch.save_file(tensors, directory / WEIGHTS_NAME)
