"""disable_lora: the base model's output while its block is open, and nothing of it afterwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.peft_models import make as make_peft
from tests.helpers.quantized_weights import K, N, bnb_4bit
from tests.helpers.small_models import IDS, Model, fill_b, llama, lora_config, lora_over, output, trainable


def adapted(model=None, fuse_projections=False, **config):
    """A model with branches that are not zero, and its output without them."""
    torch.manual_seed(0)
    model = Model() if model is None else model
    base = output(model)
    slk.apply_lora(model, lora_config(**config), fuse_projections=fuse_projections)
    fill_b(model)
    return model, base


def with_peft(accelerated, **config):
    torch.manual_seed(0)
    base = output(Model())
    model = make_peft(**config)
    if config:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    if accelerated:
        slk.accelerate_peft(model)
    # Somebody has frozen one half.
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    return model, base


ALL = {"target_modules": "all-linear"}
MODELS = {
    "ours": adapted,
    "fused projections": lambda: adapted(llama(), fuse_projections=True, **ALL),
    "PEFT": lambda: with_peft(False),
    "PEFT, accelerated": lambda: with_peft(True),
    "PEFT's modules_to_save": lambda: with_peft(True, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_nested_overlapping_and_after_an_error(kind):
    """The model is off until the last block ends, whichever was the first."""
    model, base = MODELS[kind]()
    active, flags = output(model), trainable(model)
    assert not torch.allclose(active, base, atol=1e-3)
    with slk.disable_lora(model):
        assert torch.equal(output(model), base)
        part = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        with slk.disable_lora(part), slk.disable_lora(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), active)
    first, second = slk.disable_lora(model), slk.disable_lora(model)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(output(model), base)
    second.__exit__(None, None, None)
    assert torch.equal(output(model), active)
    with pytest.raises(KeyError, match="why"), slk.disable_lora(model):
        raise KeyError("why")
    assert torch.equal(output(model), active) and trainable(model) == flags


@pytest.mark.parametrize("kind", [kind for kind in MODELS if "PEFT" in kind])
def test_beside_pefts_own_switch(kind):
    """disable_adapter in the block leaves the flags to it, and a model that PEFT has disabled stays so."""
    model, base = MODELS[kind]()
    flags = trainable(model)
    with slk.disable_lora(model):
        assert model.get_model_status().enabled is False
        with model.disable_adapter():
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    assert model.get_model_status().enabled is True and trainable(model) == flags
    model.base_model.disable_adapter_layers()
    with slk.disable_lora(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), base)


def test_part_of_a_projection_group():
    """The others go on with their branch, and the group is there again afterwards."""
    model, twin = (adapted(llama(), fuse_projections=fused, **ALL)[0] for fused in (True, False))
    twin.load_state_dict(model.state_dict())
    active = output(model)
    parts = [each.model.layers[0].self_attn.k_proj for each in (model, twin)]
    with slk.disable_lora(parts[0]), slk.disable_lora(parts[1]):
        for _ in range(3):
            torch.testing.assert_close(output(model), output(twin))
        assert not torch.allclose(output(model), active, atol=1e-3)
    assert torch.equal(output(model), active)


def test_copies_made_in_the_block_are_not_in_it():
    model, base = adapted()
    active = output(model)
    # In DataParallel as well.
    with slk.disable_lora(nn.DataParallel(model)):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(torch.equal(output(twin), active) for twin in twins) and torch.equal(output(model), base)
    assert all(torch.equal(output(twin), active) for twin in twins)


def test_a_compiled_model_is_compiled_once_more():
    model, base = adapted()
    active, graphs = output(model), []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(output(compiled), active)
        with slk.disable_lora(compiled):
            torch.testing.assert_close(output(compiled), base)
    assert len(graphs) == 2


def test_a_block_inside_of_compiled_code():
    model, base = adapted()
    active = output(model)
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def both(ids):
        policy = model(ids)
        with slk.disable_lora(model):
            reference = model(ids)
        return policy, reference

    for _ in range(2):
        for found, expected in zip(both(IDS), (active, base), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_4_bit_layer_is_as_before():
    """bitsandbytes' own forward casts its bias in place and takes its first input's dtype for good."""
    base = bnb_4bit(nn.Linear(K, N), None)
    base.bias.data = base.bias.data.float() + 1e-4
    base.compute_dtype = None
    layer = lora_over(base)
    x = torch.randn(3, K)
    bias, before = layer.bias.clone(), layer(x)
    with slk.disable_lora(layer):
        layer(x.bfloat16())
    assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, bias)
    assert base.compute_dtype is None and torch.equal(layer(x), before)
