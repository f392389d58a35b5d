"""keep_in_4_bits: what compressed-tensors stores as NVFP4A16 computes as decompressed, and trains
with PEFT.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels import quantized
from stablelora_kernels.testing.cases import BF16
from tests.helpers.small_models import llama

peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
pytest.importorskip(
    "compressed_tensors", reason="runs where compressed-tensors is installed: pip install .[test]"
)
pytest.importorskip(
    "torchao.prototype.mx_formats", reason="runs where torchao is installed: pip install .[test]"
)

pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*")
NAMES = ["0", "2", "3"]


def compressed(preset: str = "NVFP4A16", last: str | None = None) -> nn.Sequential:
    """A model as transformers leaves it: packed layers, and a hook that decompresses them. ``last``:
    another format of the last layer. "A and B": A's weights, and B's inputs.
    """
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64, bias=False), nn.Linear(64, 32)
    ).to(BF16)
    presets = dict.fromkeys(NAMES, preset) | {"3": last or preset}
    groups = {}
    for name, (weights, *inputs) in ((name, of.split(" and ")) for name, of in presets.items()):
        groups[name] = preset_name_to_scheme(weights, [f"re:^{name}$"])
        for of in inputs:
            groups[name].input_activations = preset_name_to_scheme(of, []).input_activations
    compress(model, groups)
    return model


def compress(model: nn.Module, groups: dict[str, Any], **settings: Any) -> Any:
    """Pack a model's layers by their ranges, as compressed-tensors' own programs do. ``groups``: its
    schemes. Returns the compressor.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig(config_groups=groups, **settings)
    apply_quantization_config(model, config)
    for layer in model.modules():
        if not hasattr(layer, "weight_scale"):
            continue
        group = layer.quantization_scheme.weights.group_size or layer.in_features
        largest = layer.weight.detach().float().unflatten(1, (-1, group)).abs().amax(-1) / 6
        if hasattr(layer, "weight_global_scale"):
            layer.weight_global_scale.data.fill_(448 / largest.max())
            largest = largest * layer.weight_global_scale
        layer.weight_scale.data.copy_(largest)
        for other in ("input_global_scale", "output_global_scale"):
            if hasattr(layer, other):
                getattr(layer, other).data.fill_(100.0)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    return compressor


def decompressed(model: nn.Module) -> nn.Module:
    """A copy whose weights are plain, by compressed-tensors."""
    from compressed_tensors.compressors import decompress_module

    plain = copy.deepcopy(model)
    plain._forward_pre_hooks.clear()
    for name in NAMES:
        decompress_module(plain.get_submodule(name), leave_decompressed=False)
    return plain


def test_layers_keep_their_bytes_and_compute_as_decompressed():
    model = compressed()
    plain = decompressed(model)
    stored = {
        name: (layer.weight_packed.data_ptr(), layer.weight_scale.data_ptr())
        for name in NAMES
        for layer in (model.get_submodule(name),)
    }
    assert slk.keep_in_4_bits(model) == NAMES
    assert slk.keep_in_4_bits(model) == []
    x = torch.randn(5, 64, dtype=BF16)
    # The model's hook decompresses nothing more.
    assert torch.equal(model(x), plain(x))
    for name in NAMES:
        layer = model.get_submodule(name)
        assert [*layer._parameters] == ["weight", "bias"]
        weight = quantized.read(layer.weight)
        assert (weight.packed.data_ptr(), weight.scale.data_ptr()) == stored[name]
        theirs = plain.get_submodule(name).weight
        # One scale is inverted first; the products of 4 bits and a scale are rounded once more.
        torch.testing.assert_close(weight.dequantize(BF16), theirs, rtol=2**-7, atol=0)
        assert (weight.dequantize(BF16) != theirs).float().mean() < 1e-3


def test_pefts_adapters_train_and_a_merge_is_refused(backend, calls):
    results = []
    for keep in (False, True):
        model = compressed()
        if keep:
            slk.keep_in_4_bits(model)
        else:
            model = decompressed(model)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if keep:
            assert slk.accelerate_peft(model, strict=True).notes == ()
        torch.manual_seed(2)
        x = torch.randn(37, 64, dtype=BF16, requires_grad=True)
        y = model(x)
        y.sum().backward()
        of_pairs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": x.grad} | of_pairs)
    assert calls.layers == {"lora_linear" if backend == "triton" else "lora_branch": 2}
    assert len(results[0]) == 6 and results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        atol = 2**-5 * value.abs().max().item()
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=atol, msg=name)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        model.merge_adapter()


def test_apply_lora_reads_them_and_names_the_way_there():
    model = compressed()
    with pytest.raises(ValueError, match=r"has no weight, .* see keep_in_4_bits"):
        slk.apply_lora(model, ["0", "2"])
    slk.keep_in_4_bits(model)
    assert [row.name for row in slk.apply_lora(model, ["0", "2"]).replaced] == ["0", "2"]
    x = torch.randn(5, 64, dtype=BF16)
    torch.testing.assert_close(model(x), decompressed(compressed())(x), rtol=2**-6, atol=2**-6)


def test_other_formats_beside_them_are_decompressed_at_once():
    model = compressed(last="MXFP4A16")
    plain = decompressed(model)
    assert slk.keep_in_4_bits(model) == NAMES[:2]
    assert torch.equal(model[3].weight, plain[3].weight) and not model._forward_pre_hooks
    x = torch.randn(5, 64, dtype=BF16)
    torch.testing.assert_close(model(x), plain(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("preset", ["NVFP4", "NVFP4A16 and FP8_DYNAMIC", "MXFP4A16", "FP8_DYNAMIC"])
def test_other_formats_are_left_alone(preset):
    model = compressed(preset)
    names = [*dict(model.named_parameters())]
    assert slk.keep_in_4_bits(model) == []
    assert [*dict(model.named_parameters())] == names


def test_layers_that_accelerate_moves_keep_its_hook():
    accelerate = pytest.importorskip("accelerate", reason="runs where accelerate is installed")
    model = compressed()
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.AlignDevicesHook("cpu"))
    forward = model[0].forward
    plain = decompressed(model)
    assert slk.keep_in_4_bits(model) == NAMES[1:]
    assert model[0].forward is forward
    x = torch.randn(5, 64, dtype=BF16)
    torch.testing.assert_close(model(x), plain(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("package", ["torchao", "compressed_tensors"])
def test_errors(package, monkeypatch):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        slk.keep_in_4_bits(3)
    model = compressed(last="MXFP4A16")
    modules = {"torchao": "torchao.prototype.mx_formats.nvfp4_tensor"}
    monkeypatch.setitem(sys.modules, modules.get(package, "compressed_tensors.compressors"), None)
    with pytest.raises(ImportError, match=f"keep_in_4_bits needs {package}: pip install"):
        slk.keep_in_4_bits(model)
    assert "weight_packed" in dict(model.named_modules())["0"]._parameters
    assert model._forward_pre_hooks and slk.keep_in_4_bits(nn.Linear(2, 2)) == []


@pytest.mark.nightly
def test_a_checkpoint_of_transformers_trains_in_a_trainer(tmp_path, calls):
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    made = llama(
        vocab_size=60,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    ).to(BF16)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    compressor = compress(made, {"all": scheme}, ignore=["lm_head"])
    made._forward_pre_hooks.clear()
    made.save_pretrained(tmp_path / "model")
    compressor.update_config(tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert len(slk.keep_in_4_bits(model)) == 7
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    slk.accelerate_peft(model, strict=True)
    ids = torch.randint(3, 60, (8, 12)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    given = {"max_steps": 2, "use_cpu": True, "report_to": [], "learning_rate": 1e-2}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), **given), train_dataset=rows)
    trainer.train()
    assert calls.layers == {"lora_branch": 14}
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert type(base.weight).__name__ == "NVFP4Tensor" and not hasattr(base, "weight_packed")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    slk.keep_in_4_bits(fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "checkpoint-2")
    slk.accelerate_peft(again, strict=True)
    tokens = torch.tensor(ids[:2])
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
