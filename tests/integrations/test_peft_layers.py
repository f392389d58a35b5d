"""accelerate_peft's layers in a model's life: replaced, restored, copied and switched; what is not understood stays PEFT's."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.peft_models import (
    assert_equal_to_pefts,
    calls,
    config,
    grads,
    make,
    make_base,
    one_layer,
    peft,
)
from tests.helpers.processes import printed
from tests.helpers.small_models import Model, assert_untouched, llama, output, reasons, snapshot

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
lora = peft.tuners.lora


def test_state_is_untouched_and_restore_is_exact():
    model, other = make(("more", {"use_dora": True})), make()
    forward, others = lora.Linear.forward, [type(m) for m in other.modules()]
    before, keys, text = snapshot(model), list(model.state_dict()), repr(model)
    classes = [type(m) for m in model.modules()]
    slots = [dict(m.__dict__) for m in model.modules()]
    report = slk.accelerate_peft(model)
    assert_untouched(model, before)
    assert list(model.state_dict()) == keys
    assert [dict(m.__dict__) for m in model.modules()] == slots
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert repr(model) == text
    assert sum(type(m).__module__ == "stablelora_kernels.integrations.peft_layers" for m in model.modules()) == 4
    # Twice is once, and nothing is patched.
    accelerated = [type(m) for m in model.modules()]
    assert slk.accelerate_peft(model) == report and [type(m) for m in model.modules()] == accelerated
    assert lora.Linear.forward is forward and [type(m) for m in other.modules()] == others
    slk.restore_peft(model)
    assert [type(m) for m in model.modules()] == classes and repr(model) == text
    assert_untouched(model, before)
    slk.restore_peft(model)


def test_pefts_own_operations_afterwards(tmp_path, backend):
    """Add, switch, save, delete, load, merge and unload, on an accelerated model and on one that is not."""

    def story(model, directory):
        seen = [output(model)]
        torch.manual_seed(1)
        model.add_adapter("late", config(r=3))
        model.set_adapter("late")
        seen.append(output(model))
        model.save_pretrained(directory)
        model.delete_adapter("late")
        model.set_adapter("default")
        seen.append(output(model))
        model.load_adapter(directory / "late", "back")
        model.set_adapter("back")
        seen.append(output(model))
        model.add_weighted_adapter(["default", "back"], [0.7, 0.3], "both", combination_type="cat")
        model.set_adapter("both")
        seen.append(output(model))
        unloaded = copy.deepcopy(model).unload()
        merged = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(m, lora.LoraLayer) for part in (unloaded, merged) for m in part.modules())
        return [*seen, output(unloaded), output(merged)]

    plain, fast = make(), make()
    slk.accelerate_peft(fast)
    for one, other in zip(story(plain, tmp_path / "plain"), story(fast, tmp_path / "fast"), strict=True):
        torch.testing.assert_close(other, one)
    from safetensors.torch import load_file

    for name in ("adapter_model.safetensors", "late/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "fast" / name), load_file(tmp_path / "plain" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = peft.PeftModel.from_pretrained(make_base(), tmp_path / "fast").eval()
    torch.testing.assert_close(output(again), output(make()))


def test_layers_that_an_adapter_adds_later(monkeypatch):
    model = make(target_modules=["q_proj"])
    slk.accelerate_peft(model)
    torch.manual_seed(1)
    model.add_adapter("more", config())
    model.base_model.set_adapter(["default", "more"])
    count, expected = calls(monkeypatch), output(model)
    assert count == {"lora_linear": 2, "lora_branch": 2}
    assert len(slk.accelerate_peft(model).replaced) == 6
    torch.testing.assert_close(output(model), expected)


def test_dora_added_later_is_pefts_own(backend, monkeypatch):
    model = make()
    slk.accelerate_peft(model)
    torch.manual_seed(1)
    model.add_adapter("dora", config(use_dora=True))
    count = calls(monkeypatch)
    for active in ("dora", ["default", "dora"]):
        model.base_model.set_adapter(active)
        found = output(model)
        assert not count
        slk.restore_peft(model)
        assert torch.equal(output(model), found)
        report = slk.accelerate_peft(model)
    assert {m.adapter for m in report.replaced} == {"default"}
    assert set(reasons(report).values()) == {"adapter 'dora' is a variant of LoRA (DoraLinearVariant)"}
    model.set_adapter("default")
    output(model)
    assert count == {"lora_linear": 4}


class Zoo(nn.Module):
    """One of each kind of layer that PEFT's LoRA takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 8)
        self.conv1d = transformers.pytorch_utils.Conv1D(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, ids):
        x = self.conv1d(torch.tanh(self.linear(self.embed(ids))))
        return self.conv(self.attention(x, x, x)[0].unsqueeze(1)).squeeze(1)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_understood_is_named_and_stays_pefts(backend, monkeypatch):
    names = ["embed", "linear", "conv1d", "attention", "conv"]
    model = make(model=Zoo(), target_modules=names)
    expected = output(model)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"strict=True, but .* base_model.model.embed \(lora.Embedding is not"):
        slk.accelerate_peft(model, strict=True)
    assert [type(m) for m in model.modules()] == before
    report = slk.accelerate_peft(model)
    prefix = "base_model.model."
    assert [m.name for m in report.replaced] == [prefix + "linear", prefix + "conv1d"]
    known = "is not a layer that the ops are known to fit"
    assert reasons(report) == {
        prefix + "embed": f"lora.Embedding {known}",
        prefix + "attention": f"lora.MultiheadAttention {known}",
        prefix + "attention.base_layer.out_proj": "nn.MultiheadAttention reads its weight instead of calling it",
        prefix + "conv": f"lora.Conv2d {known}",
    }
    assert "skipped" in str(report) and "adapter 'default'" in str(report)
    count = calls(monkeypatch)
    torch.testing.assert_close(output(model), expected)
    # Conv1D computes its own product.
    assert count == {"lora_linear": 1, "lora_branch": 1}
    assert_equal_to_pefts(model)
    assert slk.accelerate_peft(make(), strict=True).skipped == ()


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_variants_are_named(variant):
    model = make(model=llama(pad_token_id=0), task_type="CAUSAL_LM", **variant)
    before = [type(m) for m in model.modules()]
    report = slk.accelerate_peft(model)
    assert not report.replaced and len(report.skipped) == 4
    assert all(re.match("adapter 'default' is a variant of LoRA", reason) for reason in reasons(report).values())
    assert [type(m) for m in model.modules()] == before


def test_hooks_are_called(monkeypatch):
    """On the base layer: it computes its own product. On what holds A: PEFT's forward calls it. On every module: likewise."""
    model = make()
    expected = output(model)
    slk.accelerate_peft(model)
    layer = model.base_model.model.layers[0].q_proj
    count, seen = calls(monkeypatch), []

    def hook(module, args, out):
        seen.append(module)

    for place, made in (
        (layer.base_layer.register_forward_hook, {"lora_linear": 3, "lora_branch": 1}),
        (layer.lora_A["default"].register_forward_hook, {"lora_linear": 3}),
        (layer.lora_dropout["default"].register_forward_hook, {"lora_linear": 3}),
        (layer.register_forward_hook, {"lora_linear": 4}),
        (nn.modules.module.register_module_forward_hook, {}),
    ):
        handle = place(hook)
        torch.testing.assert_close(output(model), expected)
        assert seen and count == made
        handle.remove()
        seen.clear()
        count.clear()
    layer.base_layer.forward = lambda x: nn.Linear.forward(layer.base_layer, x) + 1
    assert not torch.allclose(output(model), expected, atol=1e-3)
    assert count == {"lora_linear": 3, "lora_branch": 1}


def test_a_layer_with_another_forward_is_left_alone():
    model = make()
    layer = model.base_model.model.layers[0].q_proj
    layer.forward = layer.forward
    report = slk.accelerate_peft(model)
    assert list(reasons(report).values()) == ["its forward was replaced (as accelerate's hooks do)"]
    assert type(layer) is lora.Linear and len(report.replaced) == 3


def test_peft_without_a_peft_model():
    torch.manual_seed(0)
    assert_equal_to_pefts(peft.inject_adapter_in_model(config(), Model()).eval())


@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fully_sharded(first, backend, monkeypatch, mesh):
    """FSDP with its parameters in one flat one, which each forward sees as tensors; one process is enough for that."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    expected = output(make())
    model = make()
    if first == "accelerate":
        slk.accelerate_peft(model)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    report = slk.accelerate_peft(model)
    assert len(report.replaced) == 4 and not report.skipped
    count = calls(monkeypatch)
    torch.testing.assert_close(output(model), expected)
    assert count == {"lora_linear": 4}
    found = grads(model)
    assert sum("lora_" in name and bool(grad.any()) for name, grad in found.items()) == 8


def test_errors():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.accelerate_peft("model")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.restore_peft("model")
    for model in (Model(), peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=f"model must have PEFT LoRA layers, got a {type(model).__name__}"):
            slk.accelerate_peft(model)


def test_peft_is_imported_only_when_it_is_asked_for(monkeypatch):
    assert printed("import sys, stablelora_kernels; print('peft' in sys.modules)") == "False"
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (slk.accelerate_peft, slk.restore_peft):
        with pytest.raises(
            ImportError, match=r"needs peft: pip install 'stablelora-kernels\[peft\]' \(import of peft halted"
        ):
            call(Model())
    monkeypatch.undo()
    monkeypatch.setattr(peft, "__version__", "0.15.2")
    with pytest.raises(ImportError, match=r"peft must be 0\.16 or newer, .* got 0\.15\.2: pip install .*\[peft\]"):
        slk.accelerate_peft(Model())


def test_an_input_that_must_not_be_cast_is_pefts_own_error():
    model, x = one_layer(torch.bfloat16)
    slk.accelerate_peft(model)
    model(x)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)


def test_reports_of_typos_and_of_dora_alone():
    for names, notes in (
        (["q_proj", "v_porj"], ("target_modules 'v_porj' matches nothing (adapter 'default')",)),
        (["q_proj", "v_proj"], ()),
    ):
        assert slk.accelerate_peft(make(target_modules=names)).notes == notes
    text = str(slk.accelerate_peft(make(target_modules=["q_proj"], use_dora=True)))
    assert text.startswith("No LoRA module runs on this library's ops; ") and "variant of LoRA" in text
