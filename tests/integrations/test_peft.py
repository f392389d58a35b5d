"""accelerate_peft on real PEFT models: every feature of theirs, against PEFT's own forward, on both backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.testing import EPS
from tests.helpers.inputs import FP32
from tests.helpers.peft_models import assert_equal_to_pefts, calls, config, grads, make, make_base, one_layer, peft
from tests.helpers.small_models import IDS, llama, output

lora = peft.tuners.lora


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
    for _ in range(2):
        torch.manual_seed(1)
        first = output(model.train())
        torch.manual_seed(1)
        assert torch.equal(output(model), first)
        assert not torch.allclose(first, still, atol=1e-3)
        assert torch.equal(output(model.eval()), still)


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, p, backend):
    model = make(model=llama(pad_token_id=0), lora_dropout=p).train()
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


def test_generate(backend, monkeypatch):
    model = make(("more", {}), model=llama(pad_token_id=0))
    ids = torch.tensor([[1, 5, 7], [1, 9, 3]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    modes = ({}, {"num_beams": 2}, {"adapter_names": ["more", "__base__"]})
    expected = [model.generate(**options, **mode) for mode in modes]
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    for mode, tokens in zip(modes, expected, strict=True):
        assert torch.equal(model.generate(**options, **mode), tokens)
    assert count["lora_linear"] and count["lora_branch"]


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


@pytest.mark.covering(1)
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
