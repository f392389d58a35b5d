"""save_adapter and load_adapter: what is written and what is read."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn

from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora, remove_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.adapters import edit_config, fresh
from tests.helpers.small_models import fill_b, llama, lora_config, output

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed (pip install .[test])"
)


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
    # safetensors draws the order of the header's metadata anew for each file.
    for _ in range(12):
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


def test_a_model_of_torchs_own_classes_says_so(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, lora_config(target_modules=["0"]))
    save_adapter(model, tmp_path)
    mapping = json.loads((tmp_path / CONFIG_NAME).read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "Sequential" and mapping["parent_library"].startswith("torch.")
