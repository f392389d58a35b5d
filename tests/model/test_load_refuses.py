"""What load_adapter refuses: files that are broken, or do not fit the model."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from torch import nn

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import edit_config, edit_tensors, fresh
from tests.helpers.small_models import Model, lora_config, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.update({key: value})


Q0 = "base_model.model.layers.0.q_proj"
TENSOR_ERRORS = [
    (drop(f"{Q0}.lora_B.weight"), r"must hold layers.0.q_proj.lora_B.weight, got 7 tensors without them"),
    (put(f"{Q0}.lora_magnitude_vector", torch.ones(8)), r"got layers.0.q_proj.lora_magnitude_vector beyond that"),
    (put("base_model.model.embed.weight", torch.ones(11, 8)), r"got embed.weight beyond that"),
    (put("lm_head.weight", torch.ones(2)), r"keys in .* must start with 'base_model.model.', got lm_head.weight"),
    (
        put(f"{Q0}.lora_A.weight", torch.ones(2, 9)),
        r"layers.0.q_proj.lora_A.weight in .* must be \[2, 8\], got \[2, 9\]",
    ),
    (
        put(f"{Q0}.lora_A.weight", torch.ones(4, 8)),
        r"layers.0.q_proj.lora_A.weight in .* must be \[2, 8\], got \[4, 8\]",
    ),
    (
        put(f"{Q0}.lora_B.weight", torch.ones(8, 2, dtype=torch.int8)),
        r"lora_B.weight in .* must be one of .*, got torch.int8",
    ),
]
CONFIG_ERRORS = [
    ({"peft_type": "IA3"}, "peft_type in .* must be 'LORA', got 'IA3'"),
    ({"use_dora": True}, "must use plain LoRA, got use_dora=True, which is not supported"),
    ({"lora_bias": True, "x": [1]}, r"must use plain LoRA, got lora_bias=True, x=\[1\], which is not supported"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
    ({"r": 0}, f"{CONFIG_NAME}: r must be at least 1, got 0"),
    ({"target_modules": None}, "target_modules must be a list of names, .* got None"),
]


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize(("change", "message"), TENSOR_ERRORS, ids=range(len(TENSOR_ERRORS)))
def test_tensors_that_do_not_fit(saved, model, has_lora, change, message):
    edit_tensors(saved, change)
    target = model if has_lora else fresh()
    with refused(target, ValueError, message):
        load_adapter(target, saved)


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize(("changes", "message"), CONFIG_ERRORS, ids=lambda value: str(value)[:20])
def test_a_config_that_does_not_fit(saved, model, has_lora, changes, message):
    edit_config(saved, **changes)
    target = model if has_lora else fresh()
    with refused(target, ValueError, message):
        load_adapter(target, saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, "r of 'layers.0.q_proj' is 2 in the model, got 3 in "),
        ({"lora_alpha": 8}, "lora_alpha of 'layers.0.q_proj' is 16 in the model, got 8 in "),
        ({"use_rslora": True}, "use_rslora of 'layers.0.q_proj' is False in the model, got True in "),
        ({"bias": "all"}, "bias is 'none' in the model, got 'all' in "),
        ({"modules_to_save": ["norm"]}, r"modules_to_save is \[\] in the model, got \['layers.0.norm', 'layers.1.norm'\] in"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_the_models(saved, model, changes, message):
    edit_config(saved, **changes)
    with refused(model, ValueError, message):
        load_adapter(model, saved)


def test_a_config_that_names_other_layers(saved):
    target = fresh()
    edit_config(saved, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"got layers.0.v_proj.lora_A.weight, .* beyond that"):
        load_adapter(target, saved)
    edit_config(saved, target_modules=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(
        ValueError, match=r"must hold lm_head.lora_A.weight, lm_head.lora_B.weight, got 8 tensors without"
    ):
        load_adapter(target, saved)
    edit_config(saved, target_modules=["k_proj"])
    with pytest.raises(ValueError, match=r"target_modules must match an nn.Linear of the model, got \['k_proj'\]"):
        load_adapter(target, saved)
    assert not lora_layers(target)


def test_a_wider_model(saved):
    target = Model(width=12)
    with pytest.raises(ValueError, match=r"layers.0.q_proj.lora_A.weight in .* must be \[2, 12\], got \[2, 8\]"):
        load_adapter(target, saved)
    assert not lora_layers(target)


def test_a_merged_model_is_refused(saved, model):
    merge_lora(model)
    with pytest.raises(
        ValueError, match=r"model must not be merged while an adapter is loaded, got layers.0.q_proj, .* merged"
    ):
        load_adapter(model, saved)


def test_a_model_on_meta_is_refused(saved):
    target = fresh().to("meta")
    with pytest.raises(ValueError, match=r"model must hold values, got layers.0.q_proj.weight.* on the meta device"):
        load_adapter(target, saved)
    assert not lora_layers(target)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_NAME])
def test_a_pickle_is_refused_whatever_its_name(saved, name):
    (saved / WEIGHTS_NAME).unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    message = (
        "must be a safetensors file" if name == WEIGHTS_NAME else f"must hold {WEIGHTS_NAME}, got {name}: a pickle"
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(fresh(), saved)


def test_directories_that_are_none(saved, tmp_path):
    with pytest.raises(
        ValueError, match=r"path must be a directory on this machine .* got 'user/an/adapter' \(nothing there\)"
    ):
        load_adapter(fresh(), "user/an/adapter")
    with pytest.raises(ValueError, match=r"got '.*safetensors' \(a file\)"):
        load_adapter(fresh(), saved / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"path must hold {CONFIG_NAME}, got .* without it"):
        load_adapter(fresh(), tmp_path)
    (saved / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=f"path must hold {WEIGHTS_NAME}, got .* without it"):
        load_adapter(fresh(), saved)


def test_an_adapter_on_a_layer_that_is_skipped_says_why(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")

    def make():
        return nn.ModuleDict({"enc": nn.TransformerEncoderLayer(4, 2, 4), "out": nn.Linear(4, 4)})

    peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["linear1", "out"])).save_pretrained(tmp_path)
    message = (
        r"got enc.linear1.lora_A.weight, enc.linear1.lora_B.weight beyond that; enc.linear1: nn.TransformerEncoderLayer"
    )
    with pytest.raises(ValueError, match=message):
        load_adapter(make(), tmp_path)


def test_files_that_are_broken(saved):
    config = (saved / CONFIG_NAME).read_text()
    (saved / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match="must be JSON, got text that is not"):
        load_adapter(fresh(), saved)
    (saved / CONFIG_NAME).write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        load_adapter(fresh(), saved)
    (saved / CONFIG_NAME).write_text(config)
    weights = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} must be a safetensors file, got one that cannot be read"):
        load_adapter(fresh(), saved)


def test_without_safetensors(saved, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ImportError, match=r"needs safetensors: pip install 'stablelora-kernels\[adapters\]'"):
            call(model, saved)


def test_without_numpy_nothing_is_written(saved, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"save_adapter needs numpy: pip install 'stablelora-kernels\[adapters\]'"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    load_adapter(fresh(), saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("has_lora", [False, True])
def test_modules_to_save_of_another_kind_are_refused(tmp_path, dtype, has_lora):
    model = fresh()
    apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, put("base_model.model.lm_head.weight", torch.ones(11, 8).to(dtype)))
    target = model if has_lora else fresh()
    with refused(target, ValueError, rf"lm_head.weight in .* must be torch.float32 or alike, got {dtype}"):
        load_adapter(target, tmp_path)
    edit_tensors(tmp_path, put("base_model.model.lm_head.weight", torch.ones(11, 8, dtype=torch.float16)))
    load_adapter(target, tmp_path)
    assert torch.equal(target.lm_head.weight, torch.ones(11, 8))
