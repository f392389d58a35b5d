"""disable_lora gives the base model's output, of this library's layers and of PEFT's."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from tests.helpers.small_models import (
    IDS,
    Model,
    fill_b,
    llama,
    lora_options,
    output,
    trainable,
)


def evaluated(model, fuse_projections=False, **config):
    """``model`` with branches that are not zero."""
    slk.apply_lora(model.eval(), **lora_options(**config), fuse_projections=fuse_projections)
    fill_b(model)
    return model


def adapted(model=None, **config):
    """A model with branches that are not zero, and its output without them."""
    torch.manual_seed(0)
    model = Model() if model is None else model
    base = output(model)
    return evaluated(model, **config), base


def with_peft(accelerated, **config):
    torch.manual_seed(0)
    from tests.helpers.peft_models import make

    base = output(Model())
    model = make(**config)
    if "modules_to_save" in config:
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
    """disable_adapter in the block leaves the flags to it, and a model that PEFT has disabled stays
    so.
    """
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
        assert all(torch.equal(output(twin), active) for twin in twins) and torch.equal(
            output(model), base
        )
    assert all(torch.equal(output(twin), active) for twin in twins)


def test_the_block_holds_in_every_thread():
    """As where DataParallel computes, or a server's worker."""
    model, base = adapted()
    active = output(model)
    with ThreadPoolExecutor(1) as worker:
        for _ in range(2):
            with slk.disable_lora(model):
                assert torch.equal(worker.submit(output, model).result(), base)
            assert torch.equal(worker.submit(output, model).result(), active)


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


@pytest.mark.parametrize("kind", ["ours", "PEFT"])
def test_a_bias_that_trains_is_refused(kind):
    """Its base value is not kept."""
    model, _ = MODELS["ours"]() if kind == "ours" else with_peft(False, bias="lora_only")
    if kind == "ours":
        model.layers[0].q_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="trained in place: disable_lora"), slk.disable_lora(model):
        pass


def test_models_without_lora_are_refused():
    for model, message in (
        (Model(), "must have LoRALinear layers or PEFT's, got a Model without any"),
        ([], "model must be an nn.Module, got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message), slk.disable_lora(model):
            pass
