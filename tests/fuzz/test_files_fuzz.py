"""Damaged and odd files: a load succeeds with the original's result, or raises a documented error and changes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install .[test])")
safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from stablelora_kernels.cli import main  # noqa: E402
from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME  # noqa: E402
from stablelora_kernels.model.apply import apply_lora  # noqa: E402
from stablelora_kernels.model.modules import lora_layers  # noqa: E402
from stablelora_kernels.model.save_load import load_adapter, save_adapter  # noqa: E402
from tests.helpers.small_models import Model, assert_untouched, fill_b, lora_config, output, snapshot  # noqa: E402

pytestmark = pytest.mark.fuzz
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What load_adapter documents.
ERRORS = (ValueError, TypeError, OSError)
CONFIG = lora_config(modules_to_save=["lm_head"], bias="lora_only", rank_pattern={"layers.1.v_proj": 3})


def fresh():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An adapter's directory and its model."""
    model = fresh()
    apply_lora(model, CONFIG)
    fill_b(model)
    directory = tmp_path_factory.mktemp("fuzz") / "original"
    save_adapter(model, directory)
    return directory, model


def copy_of(directory):
    damaged = directory.with_name("damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(directory, damaged)
    return damaged


def load(directory, has_lora):
    """The model with the adapter, or None if it was refused, which must have changed nothing."""
    model = fresh()
    if has_lora:
        apply_lora(model, CONFIG)
    before = snapshot(model)
    try:
        load_adapter(model, directory)
    except ERRORS as error:
        # Named, and not one of Python's own that merely is a ValueError.
        assert str(directory) in str(error), error
        assert_untouched(model, before)
        assert has_lora or not lora_layers(model)
        return None
    return model


def inspected(directory):
    """The exit status of inspect, which says why on one line, and nothing that a terminal takes for a command."""
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(["inspect", str(directory)])
    assert status in (0, 1, 2)
    assert (told.getvalue() + said.getvalue()).replace("\n", "").isprintable()
    assert said.getvalue().count("\n") == (status == 2), said.getvalue()
    return status


@st.composite
def damages(draw):
    """A function that damages bytes: cut, lengthened, a few of them changed, or a piece moved."""
    kind = draw(st.sampled_from(["cut", "longer", "change", "move", "length"]))
    share, other = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    piece = draw(st.binary(min_size=1, max_size=12))

    def damage(data):
        at, to = int(share * len(data)), int(other * len(data))
        if kind == "cut":
            return data[:at]
        if kind == "longer":
            return data[:at] + piece + data[at:]
        if kind == "change":
            return data[:at] + piece + data[at + len(piece) :]
        if kind == "length":
            return piece[:8].ljust(8, b"\0") + data[8:]
        return data[:at] + data[to : to + 20] + data[at:]

    return damage


@fuzz
@given(damage=damages(), has_lora=st.booleans())
def test_damaged_headers(original, damage, has_lora):
    """Of weights. The values are no part of this: nothing can tell whether a number is the right one."""
    directory, model = original
    damaged = copy_of(directory)
    data = (directory / WEIGHTS_NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    (damaged / WEIGHTS_NAME).write_bytes(damage(data[:header]) + data[header:])
    inspected(damaged)
    loaded = load(damaged, has_lora)
    if loaded is not None:
        # A name, an offset or the order may have changed to another valid one; shapes and kinds are right then.
        for name, layer in lora_layers(loaded).items():
            expected = model.get_submodule(name)
            assert layer.scaling == expected.scaling
            assert layer.lora_A.shape == expected.lora_A.shape and layer.lora_A.dtype.is_floating_point


@fuzz
@given(damage=damages(), has_lora=st.booleans())
def test_damaged_bytes_behind_the_header(original, damage, has_lora):
    directory, _ = original
    damaged = copy_of(directory)
    data = (directory / WEIGHTS_NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    changed = damage(data[header:])
    (damaged / WEIGHTS_NAME).write_bytes(data[:header] + changed)
    if len(changed) != len(data) - header:
        assert load(damaged, has_lora) is None and inspected(damaged) == 2
    else:
        assert load(damaged, has_lora) is not None and inspected(damaged) in (0, 1)


@fuzz
@given(damage=damages(), has_lora=st.booleans())
def test_damaged_config(original, damage, has_lora):
    directory, model = original
    damaged = copy_of(directory)
    (damaged / CONFIG_NAME).write_bytes(damage((directory / CONFIG_NAME).read_bytes()))
    inspected(damaged)
    loaded = load(damaged, has_lora)
    if loaded is not None:
        check_by_config(loaded, model, damaged)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from(
        [10**400, -(10**400), 1e308, float("nan"), float("inf"), 2**63, "\ud800", "(", "(?i)q", "a{9999999999}"]
    )
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["LORA", "all-linear", "q_proj", "lora_only", "gaussian", "lm_head", ".*"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("q_proj"), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "bias", "modules_to_save", "fan_in_fan_out", "task_type", "layers_to_transform",
    "layers_pattern", "use_dora", "auto_mapping", "base_model_name_or_path", "a_new_field",
]  # fmt: skip


@fuzz
@given(changes=st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3), has_lora=st.booleans())
def test_odd_configs(original, changes, has_lora):
    directory, model = original
    damaged = copy_of(directory)
    content = json.loads((directory / CONFIG_NAME).read_text())
    (damaged / CONFIG_NAME).write_text(json.dumps(content | changes))
    inspected(damaged)
    loaded = load(damaged, has_lora)
    if loaded is not None:
        check_by_config(loaded, model, damaged)


def check_by_config(loaded, model, directory):
    """The values are the file's; scalings are what the config, as it is now, says."""
    content = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    for name, layer in lora_layers(loaded).items():
        expected = model.get_submodule(name)
        assert torch.equal(layer.lora_A, expected.lora_A) and torch.equal(layer.lora_B, expected.lora_B)
    if all(
        content.get(key) == value
        for key, value in {"lora_alpha": 16, "use_rslora": False, "alpha_pattern": {}, "r": 2}.items()
    ):
        assert torch.equal(output(loaded), output(model))


@fuzz
@given(content=json_values, has_lora=st.booleans())
def test_any_json_for_a_config(original, content, has_lora):
    directory, _ = original
    damaged = copy_of(directory)
    (damaged / CONFIG_NAME).write_text(json.dumps(content))
    inspected(damaged)
    load(damaged, has_lora)


names = st.text(max_size=30) | st.sampled_from(["²", "9" * 5000, "\x1b[31m", "\r"])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.uint8]  # fmt: skip


@fuzz
@given(
    number=st.integers(0, 100), shape=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["shape", "dtype", "drop", "name"]), name=names, has_lora=st.booleans(),
)  # fmt: skip
def test_odd_tensors(original, number, shape, dtype, kind, name, has_lora):
    directory, model = original
    damaged = copy_of(directory)
    tensors = safetensors_torch.load_file(directory / WEIGHTS_NAME)
    key = sorted(tensors)[number % len(tensors)]
    value = tensors.pop(key)
    if kind == "shape":
        tensors[key] = torch.ones(shape, dtype=dtype)
    elif kind == "dtype":
        tensors[key] = value.to(dtype)
    elif kind == "name":
        tensors[name] = value
    fits = kind == "dtype" and dtype.is_floating_point and (dtype != torch.float8_e4m3fn or ".lora_" not in key)
    fits |= kind == "shape" and tuple(shape) == tuple(value.shape) and dtype.is_floating_point
    fits |= kind == "name" and name == key
    safetensors_torch.save_file(tensors, damaged / WEIGHTS_NAME)
    inspected(damaged)
    loaded = load(damaged, has_lora)
    assert (loaded is not None) == fits or dtype == torch.float8_e4m3fn
    if loaded is not None and dtype in (torch.float32, torch.float64) and kind != "shape":
        assert torch.allclose(output(loaded), output(model))
