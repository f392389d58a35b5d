"""Damaged and odd files: a load succeeds with the original's result, or raises a documented error
and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from stablelora_kernels.model.adapters import load_adapter, save_adapter
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    config_in,
    edit_tensors,
    fresh,
)
from tests.helpers.small_models import assert_untouched, fill_b, output, snapshot

pytestmark = pytest.mark.fuzz


def original_model():
    """With layers of two ranks."""
    torch.manual_seed(1)
    model = fresh()
    apply_lora(model, ["q_proj", "layers.0.v_proj"], r=2)
    apply_lora(model, ["layers.1.v_proj"], r=3)
    fill_b(model)
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An adapter's directory and its model."""
    pytest.importorskip(
        "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
    )
    model, directory = original_model(), tmp_path_factory.mktemp("fuzz") / "original"
    save_adapter(model, directory)
    return directory, model


def copy_of(directory):
    damaged = directory.with_name("damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    return shutil.copytree(directory, damaged)


def load(directory, has_lora):
    """The model with the adapter, or None if it was refused, which must have changed nothing."""
    model = original_model() if has_lora else fresh()
    before = snapshot(model)
    try:
        load_adapter(model, directory)
    # What load_adapter documents.
    except (ValueError, TypeError, OSError) as error:
        # Named, and not one of Python's own that merely is a ValueError.
        assert str(directory) in str(error), error
        assert_untouched(model, before)
        assert has_lora or not lora_layers(model)
        return None
    return model


def check_by_config(loaded, model, directory):
    """The values are the file's; scalings are what the config, as it is now, says."""
    content = config_in(directory)
    for name, layer in lora_layers(loaded).items():
        expected = model.get_submodule(name)
        assert torch.equal(layer.lora_A, expected.lora_A) and torch.equal(
            layer.lora_B, expected.lora_B
        )
    if (
        content.items()
        >= {"lora_alpha": 16, "use_rslora": False, "alpha_pattern": {}, "r": 2}.items()
    ):
        assert torch.equal(output(loaded), output(model))


KINDS = {
    "cut": lambda data, at, to, piece: data[:at],
    "longer": lambda data, at, to, piece: data[:at] + piece + data[at:],
    "change": lambda data, at, to, piece: data[:at] + piece + data[at + len(piece) :],
    "move": lambda data, at, to, piece: data[:at] + data[to : to + 20] + data[at:],
}


@pytest.mark.parametrize("part", ["header", "values", "config"])
@given(
    kind=st.sampled_from([*KINDS]), share=st.floats(0, 1), other=st.floats(0, 1), piece=st.binary(min_size=1, max_size=12),
    has_lora=st.booleans(),
)  # fmt: skip
def test_damaged_bytes(original, part, kind, share, other, piece, has_lora):
    """Of the weights' header, of what is behind it, or of the config: nothing can tell whether a
    value is the right one.
    """
    directory, model = original
    damaged = copy_of(directory)
    file = damaged / (CONFIG_NAME if part == "config" else WEIGHTS_NAME)
    data = file.read_bytes()
    header = len(data) if part == "config" else 8 + int.from_bytes(data[:8], "little")
    old = data[header:] if part == "values" else data[:header]
    new = KINDS[kind](old, int(share * len(old)), int(other * len(old)), piece)
    file.write_bytes(data[:header] + new if part == "values" else new + data[header:])
    loaded = load(damaged, has_lora)
    if part == "values":
        assert (loaded is None) == (len(new) != len(old))
    elif part == "config" and loaded is not None:
        check_by_config(loaded, model, damaged)
    elif loaded is not None:
        # A name, an offset or the order may have changed to another valid one; shapes and kinds are
        # right then.
        for name, layer in lora_layers(loaded).items():
            expected = model.get_submodule(name)
            assert layer.scaling == expected.scaling
            assert (
                layer.lora_A.shape == expected.lora_A.shape and layer.lora_A.dtype.is_floating_point
            )


ODD = [10**400, -(10**400), 1e308, float("nan"), float("inf"), 2**63, "\ud800", "(", "(?i)q", "a{9999999999}",
       "LORA", "all-linear", "q_proj", "lora_only", "gaussian", "lm_head", ".*"]  # fmt: skip
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(ODD)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "init_lora_weights",
    "bias",
    "modules_to_save",
    "peft_type",
    "layers_to_transform",
    "use_dora",
    "auto_mapping",
]
changes = st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3)


@pytest.mark.parametrize("replaced", [False, True])
@given(data=st.data(), has_lora=st.booleans())
def test_odd_configs(original, replaced, data, has_lora):
    """Some fields of another kind, or any JSON in place of them all."""
    directory, model = original
    damaged = copy_of(directory)
    content = data.draw(json_values) if replaced else config_in(directory) | data.draw(changes)
    (damaged / CONFIG_NAME).write_text(json.dumps(content))
    loaded = load(damaged, has_lora)
    if loaded is not None:
        check_by_config(loaded, model, damaged)


names = st.text(max_size=30) | st.sampled_from(["²", "9" * 5000, "\x1b[31m", "\r"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool,
          torch.float8_e4m3fn, torch.uint8]  # fmt: skip
# safetensors before 0.7 writes no complex numbers.
with contextlib.suppress(KeyError):
    save({"": torch.zeros(1, dtype=torch.complex64)})
    DTYPES.append(torch.complex64)


@given(
    number=st.integers(0, 100), shape=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["shape", "dtype", "drop", "name"]), name=names, has_lora=st.booleans(),
)  # fmt: skip
def test_odd_tensors(original, number, shape, dtype, kind, name, has_lora):
    directory, model = original
    damaged, fits = copy_of(directory), None

    def change(tensors):
        nonlocal fits
        key = sorted(tensors)[number % len(tensors)]
        value = tensors.pop(key)
        if kind == "shape":
            tensors[key] = torch.ones(shape, dtype=dtype)
        elif kind == "dtype":
            tensors[key] = value.to(dtype)
        elif kind == "name":
            tensors[name] = value
        fits = (
            kind == "dtype"
            and dtype.is_floating_point
            and (dtype != torch.float8_e4m3fn or ".lora_" not in key)
        )
        fits |= kind == "shape" and tuple(shape) == tuple(value.shape) and dtype.is_floating_point
        fits |= kind == "name" and name == key

    edit_tensors(damaged, change)
    loaded = load(damaged, has_lora)
    assert (loaded is not None) == fits or dtype == torch.float8_e4m3fn
    if loaded is not None and dtype in (torch.float32, torch.float64) and kind != "shape":
        assert torch.allclose(output(loaded), output(model))
