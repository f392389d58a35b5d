"""Adapters of the small model for tests of their files."""

from __future__ import annotations

import json

import pytest
import torch

from stablelora_kernels.model.adapters import load_adapter
from stablelora_kernels.model.apply import apply_lora
from tests.helpers.small_models import Model, fill_b, lora_options, output

# PEFT's names.
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def fresh():
    torch.manual_seed(0)
    return Model().eval()


def adapted(seed, **config):
    model = fresh()
    apply_lora(model, **lora_options(**config))
    torch.manual_seed(seed)
    fill_b(model)
    return model


def loaded(directory):
    model = fresh()
    load_adapter(model, directory)
    return output(model)


def config_in(directory, name=CONFIG_NAME):
    return json.loads((directory / name).read_text())


def edit_config(directory, name=CONFIG_NAME, /, **changes):
    (directory / name).write_text(json.dumps(config_in(directory, name) | changes))


def edit_tensors(directory, change, name=WEIGHTS_NAME):
    reason = "runs where safetensors is installed: pip install .[test]"
    safetensors_torch = pytest.importorskip("safetensors.torch", reason=reason)
    tensors = safetensors_torch.load_file(directory / name)
    change(tensors)
    safetensors_torch.save_file(tensors, directory / name, metadata={"format": "pt"})
