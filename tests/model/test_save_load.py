"""save_adapter and load_adapter: what is written, what is read, and every refusal."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys

import pytest
import torch
from torch import nn

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora, remove_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import Model, fill_b, llama, lora_config, output, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)


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


def fresh():
    torch.manual_seed(0)
    return Model().eval()


def edit_config(directory, **changes):
    file = directory / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory, change):
    tensors = safetensors_torch.load_file(directory / WEIGHTS_NAME)
    change(tensors)
    safetensors_torch.save_file(tensors, directory / WEIGHTS_NAME)


# Saving


def test_files(saved):
    assert sorted(os.listdir(saved)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert sorted(os.listdir(saved.parent)) == ["adapter"]
    tensors = safetensors_torch.load_file(saved / WEIGHTS_NAME)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"base_model.model.layers.{i}.{name}_proj.lora_{ab}.weight": (2, 8) if ab == "A" else (8, 2)
        for i in (0, 1)
        for name in "qv"
        for ab in "AB"
    }
    config = json.loads((saved / CONFIG_NAME).read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 16, ["q_proj", "v_proj"])


def test_the_same_adapter_gives_the_same_bytes(model, saved):
    save_adapter(model, saved.parent / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (saved / name).read_bytes() == (saved.parent / "again" / name).read_bytes()


def test_saving_over_an_adapter_replaces_it(model, saved):
    (saved / "README.md").write_text("kept")
    fill_b(model)
    save_adapter(model, saved)
    assert sorted(os.listdir(saved)) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    second = fresh()
    load_adapter(second, str(saved))
    assert torch.equal(output(second), output(model))


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_no_trace(model, saved, exists, monkeypatch):
    target = saved if exists else saved.parent / "deep" / "new"
    before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, target)
    assert target.exists() == exists
    assert not any(name.endswith(".tmp") for name in os.listdir(target.parent))
    assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype, tmp_path):
    first = fresh().to(torch.bfloat16)
    apply_lora(first, lora_config())
    fill_b(first)
    for layer in lora_layers(first).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    save_adapter(first, tmp_path)
    assert {t.dtype for t in safetensors_torch.load_file(tmp_path / WEIGHTS_NAME).values()} == {dtype}
    second = fresh().to(torch.bfloat16)
    load_adapter(second, tmp_path)
    for name, layer in lora_layers(second).items():
        assert (layer.lora_A.dtype, layer.lora_B.dtype) == (dtype, dtype)
        assert torch.equal(layer.lora_A, first.get_submodule(name).lora_A)
        assert torch.equal(layer.lora_B, first.get_submodule(name).lora_B)
    # Beside a weight of a third dtype they become float32, which loses nothing.
    third = fresh()
    load_adapter(third, tmp_path)
    assert {layer.lora_A.dtype for layer in lora_layers(third).values()} == {torch.float32}
    assert torch.equal(third.layers[0].q_proj.lora_B, first.layers[0].q_proj.lora_B.float())


def test_a_merged_model_saves_the_same_adapter(model, saved):
    merge_lora(model)
    save_adapter(model, saved.parent / "merged")
    assert (saved / WEIGHTS_NAME).read_bytes() == (saved.parent / "merged" / WEIGHTS_NAME).read_bytes()


def test_names_that_a_list_cannot_tell_apart_become_a_regex(tmp_path):
    # As an end of a name, "fc" would name "x.fc" as well.
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(4, 4), "x": nn.ModuleDict({"fc": nn.Linear(4, 4)})})

    ours = make()
    apply_lora(ours, lora_config(target_modules="fc"))
    ours._stablelora_config = lora_config(target_modules=["fc"])
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"] == "fc"
    second = make()
    assert [m.name for m in load_adapter(second, tmp_path).replaced] == ["fc"]


def test_what_was_skipped_is_not_claimed(tmp_path):
    ours = fresh()
    apply_lora(ours, lora_config(target_modules=["q_proj", "norm"]))
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"] == ["q_proj"]


def test_saving_a_layer_in_two_places_warns(tmp_path):
    ours = fresh()
    ours.layers[1].q_proj = ours.layers[0].q_proj
    apply_lora(ours, lora_config(target_modules=["q_proj"]))
    fill_b(ours)
    message = "'layers.0.q_proj' is registered in 2 places; load_adapter adapts them all, peft only the first"
    with pytest.warns(UserWarning, match=message):
        save_adapter(ours, tmp_path)
    second = fresh()
    second.layers[1].q_proj = second.layers[0].q_proj
    load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(ours))


def test_save_refuses(model, saved, tmp_path):
    with pytest.raises(
        ValueError, match=r"model must have LoRALinear layers \(apply_lora makes them\), got a Model without"
    ):
        save_adapter(fresh(), tmp_path / "x")
    with pytest.raises(ValueError, match="got a LoRALinear, which has no name in a file"):
        save_adapter(LoRALinear(2, 2), tmp_path / "x")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        save_adapter({}, tmp_path / "x")
    with pytest.raises(ValueError, match=f"path must be a directory, got the file '.*{CONFIG_NAME}'"):
        save_adapter(model, saved / CONFIG_NAME)
    with pytest.raises(ValueError, match=r"model must hold values, got .* on the meta device"):
        save_adapter(copy.deepcopy(model).to("meta"), tmp_path / "x")
    model.lm_head = LoRALinear.from_linear(model.lm_head, use_rslora=True)
    with pytest.raises(ValueError, match="use_rslora must be one value for all layers, got both; lm_head differ"):
        save_adapter(model, tmp_path / "x")
    assert os.listdir(tmp_path) == ["adapter"]


# Loading


def test_what_does_not_change_the_result_is_accepted(model, saved):
    edit_config(
        saved, layers_to_transform=[0, 1], layers_pattern="layers", init_lora_weights="orthogonal", task_type="CAUSAL_LM",
        use_dora=False, loftq_config={}, qalora_group_size=16, some_new_field=None,
    )  # fmt: skip
    second = fresh()
    load_adapter(second, saved)
    assert torch.equal(output(second), output(model))


def test_after_removal_an_adapter_loads_again(model, saved):
    remove_lora(model, merge=False)
    load_adapter(model, saved)
    second = fresh()
    load_adapter(second, saved)
    assert torch.equal(output(second), output(model))


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
        ValueError, match=r"path must be a directory on this machine .* got 'user/adapter' \(nothing there\)"
    ):
        load_adapter(fresh(), "user/adapter")
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
        with pytest.raises(ImportError, match=r"pip install 'stablelora-kernels\[adapters\]'"):
            call(model, saved)


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


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    model = fresh()
    apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    model.lm_head.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(
        ValueError, match=r"lm_head.phase must be of a dtype that safetensors can hold, got torch.complex128"
    ):
        save_adapter(model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_the_task_is_kept_and_peft_finds_the_class(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    apply_lora(model, lora_config())
    fill_b(model)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(theirs), output(model))
    # A task that a file or a config names stays, whatever the class.
    edit_config(tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(second, tmp_path / "adapter")
    save_adapter(second, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_NAME).read_text())["task_type"] == "FEATURE_EXTRACTION"
    plain = fresh()
    apply_lora(plain, lora_config())
    save_adapter(plain, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / CONFIG_NAME).read_text())["task_type"] is None
    with pytest.raises(TypeError, match="task_type must be a string or None, got 3"):
        lora_config(task_type=3)
