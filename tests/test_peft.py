"""accelerate_peft on real PEFT models: every feature of theirs, against PEFT's own forward, on both backends."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from small_models import IDS, Model, assert_untouched, output, reasons, snapshot
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS, assert_no_worse

peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
lora = peft.tuners.lora
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
QV = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def config(**kwargs):
    return peft.LoraConfig(**QV | kwargs)


def make(*adapters, model=None, **kwargs):
    """The small model with one adapter of ``kwargs``, and more by name; no branch is zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model or Model(), config(**kwargs))
    for name, more in adapters:
        model.add_adapter(name, config(**more))
    return model.eval()


def calls(monkeypatch):
    """Counts the calls of the two ops that the layers make."""
    from stablelora_kernels import peft_layers

    count: Counter[str] = Counter()
    for name in ("lora_linear", "lora_branch"):
        op = getattr(peft_layers, name)

        def counted(*args, name=name, op=op, **kwargs):
            count[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(peft_layers, name, counted)
    return count


def grads(model, out=None):
    """The gradient of every parameter that trains, of a loss that weighs every output differently."""
    model.zero_grad()
    out = model(IDS) if out is None else out
    out = getattr(out, "logits", out)
    (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_equal_to_pefts(model):
    """The accelerated model's output and gradients against PEFT's own, of the same model, up to rounding of the largest."""
    slk.restore_peft(model)
    expected = {"Y": output(model)} | grads(model)
    slk.accelerate_peft(model)
    found = {"Y": output(model)} | grads(model)
    assert found.keys() == expected.keys() and len(found) > 1
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and value.any(), name
        atol = 16 * EPS[value.dtype] * expected[name].abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


ADAPTERS = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank 3": {"r": 3},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"layers.1.q_proj": 5}, "alpha_pattern": {"v_proj": 1.5}},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS)
def test_output_and_gradients_are_pefts(kwargs, backend, monkeypatch):
    model = make(**kwargs)
    layers = sum(isinstance(m, lora.Linear) for m in model.modules())
    assert_equal_to_pefts(model)
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": layers} and layers >= 4


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_lora_bias(backend, monkeypatch):
    """q_proj has a bias of its own, v_proj has none."""
    model = make(lora_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    assert_equal_to_pefts(model)
    model.add_adapter("more", config(lora_bias=True))
    model.base_model.set_adapter(["default", "more"])
    assert_equal_to_pefts(model)
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": 4, "lora_branch": 4}


def test_several_adapters_and_switching(backend, monkeypatch):
    model = make(("more", {"r": 3, "lora_alpha": 2}), ("q", {"target_modules": ["q_proj"]}))
    slk.accelerate_peft(model)
    outputs = []
    for active in ("default", "more", "q", ["default", "more"], ["q", "default", "more"]):
        model.base_model.set_adapter(active)
        assert_equal_to_pefts(model)
        outputs.append(output(model))
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])
    count = calls(monkeypatch)
    output(model)
    assert count == {"lora_linear": 4, "lora_branch": 6}


def test_disabled_and_merged_are_pefts_own_bits(backend, monkeypatch):
    model = make()
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    plain = output(make_base())
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    active = output(model)
    assert count["lora_linear"] == 4 and not torch.allclose(active, plain, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(output(model), active)
    # Disabling unmerges, in PEFT's own forward.
    with model.disable_adapter():
        torch.testing.assert_close(output(model), plain)
    assert not any(m.merged for m in model.modules() if isinstance(m, lora.Linear))
    model.merge_adapter()
    model.unmerge_adapter()
    assert count["lora_linear"] == 4
    torch.testing.assert_close(output(model), active)
    assert count["lora_linear"] == 8


def make_base():
    torch.manual_seed(0)
    return Model().eval()


def test_mixed_batches(backend, monkeypatch):
    model = make(("more", {"r": 3}), ("q", {"target_modules": ["q_proj"]}))
    ids = torch.arange(30).view(6, 5) % 11
    names = ["more", "__base__", "default", "more", "q", "__base__"]
    with torch.no_grad():
        expected = model(ids, adapter_names=names)
        slk.accelerate_peft(model)
        count = calls(monkeypatch)
        found = model(ids, adapter_names=names)
    torch.testing.assert_close(found, expected)
    # Two adapters on each of four layers, and one on two of them.
    assert count == {"lora_branch": 10}
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(ids, adapter_names=["nobody"] * 6)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=["more"])


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_in_training_only(p, backend):
    model = make(lora_dropout=p)
    slk.accelerate_peft(model)
    still = output(model)
    slk.restore_peft(model)
    torch.testing.assert_close(output(model), still)
    slk.accelerate_peft(model)
    model.train()
    torch.manual_seed(1)
    first = output(model)
    torch.manual_seed(1)
    assert torch.equal(output(model), first)
    assert not torch.allclose(first, still, atol=1e-3)
    model.eval()
    assert torch.equal(output(model), still)


def test_dropout_has_the_right_mean():
    """One layer, many draws: the branch's mean is the branch, and the base product is never dropped."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 4)), config(target_modules=["0"], lora_dropout=0.5))
    x = torch.randn(1, 64)
    base, still = model.base_model.model[0].base_layer(x), model.eval()(x)
    slk.accelerate_peft(model.train())
    with torch.no_grad():
        draws = model(x.expand(4000, 64))
    error = (draws.mean(0) - still[0]).abs() / (draws.std(0) / 4000**0.5)
    assert (error < 5).all() and draws.std(0).min() > 0
    model.base_model.model[0].lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(model(x), base)


def test_scaling_is_read_at_each_call(backend):
    model = make()
    slk.accelerate_peft(model)
    layers = [m for m in model.modules() if isinstance(m, lora.Linear)]
    before = output(model)
    for change in (
        lambda m: m.scale_layer(1.5),
        lambda m: m.unscale_layer(),
        lambda m: m.set_scale("default", 0.5),
    ):
        for layer in layers:
            change(layer)
        assert_equal_to_pefts(model)
    assert not torch.allclose(output(model), before, atol=1e-3)
    for layer in layers:
        layer.scaling["default"] = 0
    torch.testing.assert_close(output(model), output(make_base()))


def low_precision(model, dtype):
    """The base in ``dtype`` beside float32 adapters, as PEFT leaves a model that was loaded so."""
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts float32 tensors of at least so many elements that an operator makes."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == FP32 and out.numel() >= self.elements:
            self.count += 1
        return out


def one_layer(dtype, lora_dtype=FP32, rows=96, width=80, **kwargs):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(width, width))
    model = low_precision(peft.get_peft_model(linear, config(target_modules=["0"], r=8, **kwargs)), dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(lora_dtype)
    return model, torch.randn(rows, width).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_adapters_without_a_float32_copy_of_the_activations(dtype, backend):
    model, x = one_layer(dtype)
    with Copies(x.numel()) as pefts:
        model(x)
    slk.accelerate_peft(model)
    with Copies(x.numel()) as ours:
        y = model(x)
    assert y.dtype == dtype
    # In the interpreter, some of what the kernels do runs on PyTorch's operators.
    assert pefts.count > 0 and ours.count == 0
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert model.base_model.model[0].lora_A["default"].weight.grad.dtype == FP32


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_error_against_float64_is_pefts(dtypes, autocast, backend):
    """Of PEFT's own forward in the dtype of the products: where PEFT computes the branch in float32, that is autocast."""
    if autocast and dtypes[0] == FP16:
        pytest.skip("autocast is tried to bfloat16")
    model, x = one_layer(*dtypes)
    low = BF16 if autocast else dtypes[0]
    layer = model.base_model.model[0]
    grad = torch.randn(x.shape).to(low)

    def run(model, x, lower=False):
        model.zero_grad()
        with torch.autocast("cpu", low, enabled=autocast or lower):
            y = model(x)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return y, *torch.autograd.grad(y, (x, *weights), grad.to(y.dtype))

    eager = run(model, x, lower=low != FP32 and dtypes[1] == FP32)
    slk.accelerate_peft(model)
    found = run(model, x)
    a, b = (layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double())
    w, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    ref = slk.reference.lora_linear_grads_ref(grad.double(), x.double(), w, a, b, layer.scaling["default"])
    y = slk.reference.lora_linear_ref(x.double(), w, bias, a, b, layer.scaling["default"])
    for name, mine, theirs, exact in zip(
        ("Y", "dX", "dA", "dB"), found, eager, (y, ref["dX"], ref["dA"], ref["dB"]), strict=True
    ):
        assert_no_worse(mine.detach(), exact.detach(), theirs.detach(), dtype=low, name=name)
    assert found[0].dtype == (low if autocast else dtypes[0])


def test_adapters_that_do_not_fit_are_pefts_own(monkeypatch):
    """bfloat16 adapters beside float32 activations: PEFT casts the activations."""
    model, x = one_layer(FP32, BF16)
    expected = model(x)
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    assert torch.equal(model(x), expected) and not count
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == BF16
    assert count == {"lora_linear": 1}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, p, backend):
    model = make(model=llama(), lora_dropout=p).train()
    model.enable_input_require_grads()
    slk.accelerate_peft(model)
    ids = torch.arange(12).view(2, 6)

    def gradients():
        torch.manual_seed(3)
        return grads(model, model(ids))

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) == 8
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def test_generate(backend, monkeypatch):
    model = make(("more", {}), model=llama())
    ids = torch.tensor([[1, 5, 7], [1, 9, 3]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    modes = ({}, {"num_beams": 2}, {"adapter_names": ["more", "__base__"]})
    expected = [model.generate(**options, **mode) for mode in modes]
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    for mode, tokens in zip(modes, expected, strict=True):
        assert torch.equal(model.generate(**options, **mode), tokens)
    assert count["lora_linear"] and count["lora_branch"]


def test_train_and_eval_flips(backend):
    model = make(lora_dropout=0.5)
    slk.accelerate_peft(model)
    still = output(model)
    for _ in range(2):
        assert not torch.allclose(output(model.train()), still, atol=1e-3)
        assert torch.equal(output(model.eval()), still)


def test_state_is_untouched_and_restore_is_exact():
    model = make(("more", {"use_dora": True}))
    before, keys, text = snapshot(model), list(model.state_dict()), repr(model)
    classes = [type(m) for m in model.modules()]
    slots = [dict(m.__dict__) for m in model.modules()]
    slk.accelerate_peft(model)
    assert_untouched(model, before)
    assert list(model.state_dict()) == keys
    assert [dict(m.__dict__) for m in model.modules()] == slots
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert repr(model) == text
    assert sum(type(m).__module__ == "stablelora_kernels.peft_layers" for m in model.modules()) == 4
    slk.restore_peft(model)
    assert [type(m) for m in model.modules()] == classes and repr(model) == text
    assert_untouched(model, before)
    slk.restore_peft(model)


def test_nothing_is_patched():
    model, other = make(), make()
    forward, classes = lora.Linear.forward, [type(m) for m in other.modules()]
    slk.accelerate_peft(model)
    assert lora.Linear.forward is forward and [type(m) for m in other.modules()] == classes


def test_twice_is_once():
    model = make()
    first = slk.accelerate_peft(model)
    classes = [type(m) for m in model.modules()]
    assert slk.accelerate_peft(model) == first
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how, tmp_path, monkeypatch):
    model = make()
    slk.accelerate_peft(model)
    before = output(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    count = calls(monkeypatch)
    assert torch.equal(output(twin), before) and count == {"lora_linear": 4}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    assert torch.equal(output(model), before) and not torch.allclose(output(twin), before, atol=1e-3)
    slk.restore_peft(twin)
    assert all(type(m) is lora.Linear for m in twin.modules() if isinstance(m, lora.LoraLayer))
    assert output(model) is not None and count["lora_linear"] == 16


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
    count = calls(monkeypatch)
    expected = output(model)
    assert count == {"lora_linear": 2, "lora_branch": 2}
    assert len(slk.accelerate_peft(model).replaced) == 6
    torch.testing.assert_close(output(model), expected)
    slk.restore_peft(model)
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
    model = make(model=llama(), task_type="CAUSAL_LM", **variant)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["accelerate", "shard"])
def test_fully_sharded(first, backend, monkeypatch):
    """FSDP with its parameters in one flat one, which each forward sees as tensors; one process is enough for that."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    expected = output(make())
    model = make()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
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
    finally:
        dist.destroy_process_group()


def test_what_does_not_fit_is_pefts_own_error():
    model, x = one_layer(FP32)
    slk.accelerate_peft(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :7])
    layer = model.base_model.model[0]
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(80, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x)


def test_empty_and_flat_inputs(backend):
    model, _ = one_layer(FP32)
    slk.accelerate_peft(model)
    for shape in ((0, 80), (80,), (2, 3, 80), (2, 0, 80)):
        given = torch.randn(shape)
        slk.restore_peft(model)
        expected = model(given)
        slk.accelerate_peft(model)
        torch.testing.assert_close(model(given), expected, rtol=1e-5, atol=8 * EPS[FP32])


@pytest.mark.parametrize("several", [False, True])
def test_torch_compile_has_no_graph_break(several, backend):
    model = make(("more", {}))
    model.base_model.set_adapter(["default", "more"] if several else "default")
    slk.accelerate_peft(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    expected = grads(model)
    for name, grad in grads(model, compiled(IDS)).items():
        torch.testing.assert_close(grad, expected[name])


def test_the_optimizer_trains_it():
    model = make().train()
    slk.accelerate_peft(model)
    optimizer = slk.StableLoRAAdamW.from_model(model, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_errors():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.accelerate_peft("model")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        slk.restore_peft("model")
    for model in (Model(), peft.get_peft_model(Model(), peft.LoHaConfig(target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=f"model must have PEFT LoRA layers, got a {type(model).__name__}"):
            slk.accelerate_peft(model)


def test_peft_is_imported_only_when_it_is_asked_for(monkeypatch):
    code = "import sys, stablelora_kernels; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft is not installed"):
        slk.accelerate_peft(Model())
    monkeypatch.undo()
    monkeypatch.setattr(peft, "__version__", "0.15.2")
    with pytest.raises(ImportError, match=r"peft must be 0\.16 or newer, .* got 0\.15\.2"):
        slk.accelerate_peft(Model())
