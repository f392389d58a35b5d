"""Every MLP class of transformers that was fused by the symbolic recognition of before stays fused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from stablelora_kernels.nn.mlp_form import form_of
from stablelora_kernels.nn.mlp_operands import OWN_LAYERS
from tests.helpers.architectures import LAYERS, SIZES, auto, transformers

# transformers 5.24, 2026-11-28: a model's folder, the class and the activation.
FUSED = set((Path(__file__).parents[1] / "helpers/golden/fused_mlps.txt").read_text().splitlines())


def models() -> Iterator[nn.Module]:
    """On the meta device, all that transformers builds from its configurations alone."""
    mappings = [names for name, names in vars(auto).items() if name.endswith("_MAPPING_NAMES")]
    types = {
        name: kind
        for mapping in mappings
        for kind, names in mapping.items()
        for name in ([names] if isinstance(names, str) else names)
    }
    for name, model_type in sorted(types.items()):
        try:
            defaults = transformers.AutoConfig.for_model(model_type)
            sizes = {key: value for key, value in SIZES.items() if hasattr(defaults, key)}
            if isinstance(getattr(defaults, "layer_types", None), list):
                sizes["layer_types"] = ["full_attention"] * LAYERS
            with torch.device("meta"):
                try:
                    yield getattr(transformers, name)(type(defaults)(**sizes))
                except Exception:
                    yield getattr(transformers, name)(defaults)
        except Exception:  # Many need packages, files or other sizes.
            continue


@pytest.mark.nightly
def test_no_class_of_transformers_is_lost():
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in models():
            for module in model.modules():
                if sum(map(OWN_LAYERS.is_projection, module.children())) not in (2, 3):
                    continue
                form = form_of(module, OWN_LAYERS.is_projection)
                if not isinstance(form, str):
                    # A class with another activation is another case.
                    folder = type(module).__module__.split(".")[-2]
                    found.add(f"{folder}.{type(module).__qualname__} {form.activation}")
    lost = FUSED - found
    assert not lost or transformers.__version__ != "5.24.0", sorted(lost)
    assert len(found & FUSED) > 30
    print(f"new: {sorted(found - FUSED)}")
