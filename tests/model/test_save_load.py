"""save_adapter and load_adapter: what is written, what is read, and what save_adapter refuses."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, config_in, edit_config, fresh
from tests.helpers.small_models import fill_b, llama, lora_config, output

safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install .[test] brings safetensors")


def test_the_same_adapter_gives_the_same_bytes(model, saved):
    """Merged, it is the same adapter. Often: safetensors draws the order of the header's metadata anew for each file."""
    for i in range(12):
        if i == 6:
            slk.merge_lora(model)
        slk.save_adapter(model, saved.parent / "again")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            assert (saved / name).read_bytes() == (saved.parent / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype, tmp_path):
    first = fresh().to(torch.bfloat16)
    slk.apply_lora(first, lora_config())
    fill_b(first)
    for layer in lora_layers(first).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    slk.save_adapter(first, tmp_path)
    assert {t.dtype for t in safetensors_torch.load_file(tmp_path / WEIGHTS_NAME).values()} == {dtype}
    # Beside a weight of a third dtype they become float32, which loses nothing.
    for base, expected in ((torch.bfloat16, dtype), (torch.float32, torch.float32)):
        second = fresh().to(base)
        slk.load_adapter(second, tmp_path)
        for name, layer in lora_layers(second).items():
            for half in ("lora_A", "lora_B"):
                found, wanted = getattr(layer, half), getattr(first.get_submodule(name), half)
                assert found.dtype == expected and torch.equal(found, wanted.to(expected))


def test_saving_a_layer_in_two_places_warns(tmp_path):
    def twice():
        model = fresh()
        model.layers[1].q_proj = model.layers[0].q_proj
        return model

    ours, second = twice(), twice()
    # What is skipped is not claimed.
    slk.apply_lora(ours, lora_config(target_modules=["q_proj", "norm"]))
    fill_b(ours)
    message = "'layers.0.q_proj' is registered in 2 places; load_adapter adapts them all, peft only the first"
    with pytest.warns(UserWarning, match=message):
        slk.save_adapter(ours, tmp_path)
    assert config_in(tmp_path)["target_modules"] == ["q_proj"]
    slk.load_adapter(second, tmp_path)
    assert torch.equal(output(second), output(ours))


def test_what_does_not_change_the_result_is_accepted(model, saved):
    edit_config(
        saved, layers_to_transform=[0, 1], layers_pattern="layers", init_lora_weights="orthogonal", task_type="CAUSAL_LM",
        use_dora=False, loftq_config={}, qalora_group_size=16, some_new_field=None,
    )  # fmt: skip
    second, expected = fresh(), output(model)
    # Removed, the first model may be given it again.
    slk.remove_lora(model, merge=False)
    for each in (model, second):
        slk.load_adapter(each, saved)
        assert torch.equal(output(each), expected)


def test_the_task_is_kept_and_peft_finds_the_class(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval() for _ in range(2))
    slk.apply_lora(model, lora_config())
    fill_b(model)
    slk.save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(theirs), output(model))
    # A task that a file or a config names stays, whatever the class.
    edit_config(tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    slk.load_adapter(second, tmp_path / "adapter")
    slk.save_adapter(second, tmp_path / "again")
    assert config_in(tmp_path / "again")["task_type"] == "FEATURE_EXTRACTION"


def test_a_model_of_torchs_own_classes_says_so(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    slk.apply_lora(model, lora_config(target_modules=["0"]))
    slk.save_adapter(model, tmp_path)
    config = config_in(tmp_path)
    assert config["task_type"] is None and config["auto_mapping"]["base_model_class"] == "Sequential"
    assert config["auto_mapping"]["parent_library"].startswith("torch.")


def of_two_scalings(model):
    model.lm_head = slk.LoRALinear.from_linear(model.lm_head, use_rslora=True)
    return model


def with_complex_buffer(_):
    model = fresh()
    slk.apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    model.lm_head.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    return model


REFUSED = {
    "no LoRA": (lambda model: fresh(), ValueError, r"model must have LoRALinear layers \(apply_lora makes them\), got a Model"),
    "a layer": (lambda model: slk.LoRALinear(2, 2), ValueError, "got a LoRALinear, which has no name in a file"),
    "no module": (lambda model: {}, TypeError, "model must be an nn.Module, got dict"),
    "on meta": (lambda model: copy.deepcopy(model).to("meta"), ValueError, "must hold values, got .* on the meta device"),
    "two scalings": (of_two_scalings, ValueError, "use_rslora must be one value for all layers, got both; lm_head differ"),
    "a dtype": (with_complex_buffer, ValueError, "lm_head.phase must be of a dtype that safetensors can hold, got .*complex128"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_save_refuses(model, saved, make, error, message):
    with pytest.raises(error, match=message):
        slk.save_adapter(make(model), saved.parent / "x")
    assert os.listdir(saved.parent) == ["adapter"]


def test_save_refuses_a_file(model, saved):
    with pytest.raises(ValueError, match=f"path must be a directory, got the file '.*{CONFIG_NAME}'"):
        slk.save_adapter(model, saved / CONFIG_NAME)
