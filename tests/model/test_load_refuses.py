"""What load_adapter refuses: one table of damage to an adapter's files and of models that they do not fit."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from tests.helpers.adapters import edit_config, edit_tensors, fresh
from tests.helpers.small_models import Model, lora_config, refused, snapshot

pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def drop(key):
    return lambda path: edit_tensors(path, lambda tensors: tensors.pop(key))


def put(key, value):
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({key: value}))


def config(**changes):
    return lambda path: edit_config(path, **changes)


def write(name, content):
    return lambda path: (path / name).write_bytes(content)


def remove(name):
    return lambda path: (path / name).unlink()


def halve(path):
    weights = (path / WEIGHTS_NAME).read_bytes()
    (path / WEIGHTS_NAME).write_bytes(weights[: len(weights) // 2])


def pickled(name):
    def damage(path):
        (path / WEIGHTS_NAME).unlink()
        (path / name).write_bytes(pickle.dumps(Bomb()))

    return damage


class Case(NamedTuple):
    damage: Callable[[Any], Any]
    message: str
    # Into a model with this adapter's layers, without, or both.
    into: tuple[str, ...] = ("fresh", "adapted")


NEW, OLD = ("fresh",), ("adapted",)
Q0 = "base_model.model.layers.0.q_proj"
DAMAGE = {
    "a tensor less": Case(drop(f"{Q0}.lora_B.weight"), "must hold layers.0.q_proj.lora_B.weight, got 7 tensors without them"),
    "DoRA's tensor": Case(put(f"{Q0}.lora_magnitude_vector", torch.ones(8)), "got layers.0.q_proj.lora_magnitude_vector beyond"),
    "a tensor more": Case(put("base_model.model.embed.weight", torch.ones(11, 8)), "got embed.weight beyond that"),
    "a key without the prefix": Case(
        put("lm_head.weight", torch.ones(2)), "keys in .* must start with 'base_model.model.', got lm_head.weight"
    ),
    "a width": Case(
        put(f"{Q0}.lora_A.weight", torch.ones(2, 9)), r"layers.0.q_proj.lora_A.weight in .* must be \[2, 8\], got \[2, 9\]"
    ),
    "a rank": Case(
        put(f"{Q0}.lora_A.weight", torch.ones(4, 8)), r"layers.0.q_proj.lora_A.weight in .* must be \[2, 8\], got \[4, 8\]"
    ),
    "integers": Case(
        put(f"{Q0}.lora_B.weight", torch.ones(8, 2, dtype=torch.int8)), "lora_B.weight in .* must be one of .*, got torch.int8"
    ),
    "IA3": Case(config(peft_type="IA3"), "peft_type in .* must be 'LORA', got 'IA3'"),
    "DoRA": Case(config(use_dora=True), "must use plain LoRA, got use_dora=True, which is not supported"),
    "an unknown field": Case(config(lora_bias=True, x=[1]), r"must use plain LoRA, got lora_bias=True, x=\[1\], which is not"),
    "PiSSA": Case(config(init_lora_weights="pissa"), "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
    "r 0": Case(config(r=0), f"{CONFIG_NAME}: r must be at least 1, got 0"),
    "no targets": Case(config(target_modules=None), "target_modules must be a list of names, .* got None"),
    "other targets": Case(config(target_modules=["q_proj"]), "got layers.0.v_proj.lora_A.weight, .* beyond that", NEW),
    "more targets": Case(
        config(target_modules=["q_proj", "v_proj", "lm_head"]),
        "must hold lm_head.lora_A.weight, lm_head.lora_B.weight, got 8 tensors without", NEW,
    ),
    "no such target": Case(
        config(target_modules=["k_proj"]), r"target_modules must match an nn.Linear of the model, got \['k_proj'\]", NEW
    ),
    "the model's r": Case(config(r=3), "r of 'layers.0.q_proj' is 2 in the model, got 3 in ", OLD),
    "the model's alpha": Case(config(lora_alpha=8), "lora_alpha of 'layers.0.q_proj' is 16 in the model, got 8 in ", OLD),
    "the model's scaling": Case(
        config(use_rslora=True), "use_rslora of 'layers.0.q_proj' is False in the model, got True in ", OLD
    ),
    "the model's bias": Case(config(bias="all"), "bias is 'none' in the model, got 'all' in ", OLD),
    "the model's saved modules": Case(
        config(modules_to_save=["norm"]),
        r"modules_to_save is \[\] in the model, got \['layers.0.norm', 'layers.1.norm'\] in", OLD,
    ),
    "a pickle": Case(pickled("adapter_model.bin"), f"must hold {WEIGHTS_NAME}, got adapter_model.bin: a pickle"),
    "a pickle by another name": Case(pickled(WEIGHTS_NAME), "must be a safetensors file"),
    "half the weights": Case(halve, f"{WEIGHTS_NAME} must be a safetensors file, got one that cannot be read"),
    "no JSON": Case(write(CONFIG_NAME, b"{"), "must be JSON, got text that is not"),
    "a list": Case(write(CONFIG_NAME, b"[]"), "must hold a JSON object, got a list"),
    "no config": Case(remove(CONFIG_NAME), f"path must hold {CONFIG_NAME}, got .* without it"),
    "no weights": Case(remove(WEIGHTS_NAME), f"path must hold {WEIGHTS_NAME}, got .* without it"),
}  # fmt: skip


# By day into a model with layers or into one without, in turn; at night into both.
INTO = [
    pytest.param(name, into, marks=() if len(case.into) == 1 or i % 2 == number % 2 else pytest.mark.nightly)
    for number, (name, case) in enumerate(DAMAGE.items())
    for i, into in enumerate(case.into)
]


@pytest.mark.parametrize(("name", "into"), INTO)
def test_damaged_files(saved, model, name, into):
    DAMAGE[name].damage(saved)
    target = model if into == "adapted" else fresh()
    with refused(target, ValueError, DAMAGE[name].message):
        load_adapter(target, saved)


def merged(model):
    merge_lora(model)
    return model


MODELS = {
    "wider": (lambda model: Model(width=12), r"layers.0.q_proj.lora_A.weight in .* must be \[2, 12\], got \[2, 8\]"),
    "merged": (merged, "model must not be merged while an adapter is loaded, got layers.0.q_proj, .* merged"),
    "on meta": (
        lambda model: fresh().to("meta"),
        "model must hold values, got layers.0.q_proj.weight.* on the meta device",
    ),
}


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_models_that_it_does_not_fit(saved, model, make, message):
    target = make(model)
    modules = snapshot(target)[0]
    with pytest.raises(ValueError, match=message):
        load_adapter(target, saved)
    assert snapshot(target)[0] == modules


def test_directories_that_are_none(saved):
    with pytest.raises(ValueError, match=r"path must be a directory on this machine .* got 'a/b/c' \(nothing there\)"):
        load_adapter(fresh(), "a/b/c")
    with pytest.raises(ValueError, match=r"got '.*safetensors' \(a file\)"):
        load_adapter(fresh(), saved / WEIGHTS_NAME)


def test_an_adapter_on_a_layer_that_is_skipped_says_why(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")

    def make():
        return nn.ModuleDict({"enc": nn.TransformerEncoderLayer(4, 2, 4), "out": nn.Linear(4, 4)})

    peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["linear1", "out"])).save_pretrained(tmp_path)
    message = "got enc.linear1.lora_A.weight, enc.linear1.lora_B.weight beyond that; enc.linear1: nn.TransformerEncoder"
    with pytest.raises(ValueError, match=message):
        load_adapter(make(), tmp_path)


def test_without_safetensors_or_numpy(saved, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        for call in (save_adapter, load_adapter):
            with pytest.raises(ImportError, match=r"needs safetensors: pip install 'stablelora-kernels\[adapters\]'"):
                call(model, saved)
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
    put("base_model.model.lm_head.weight", torch.ones(11, 8).to(dtype))(tmp_path)
    target = model if has_lora else fresh()
    with refused(target, ValueError, rf"lm_head.weight in .* must be torch.float32 or alike, got {dtype}"):
        load_adapter(target, tmp_path)
    put("base_model.model.lm_head.weight", torch.ones(11, 8, dtype=torch.float16))(tmp_path)
    load_adapter(target, tmp_path)
    assert torch.equal(target.lm_head.weight, torch.ones(11, 8))
