"""disable_lora gives the base model's output; save_pretrained of a merged model writes the merged
weights.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.quantized_weights import K, N, bnb_4bit
from tests.helpers.small_models import (
    IDS,
    Model,
    fill_b,
    gpt2,
    llama,
    lora_config,
    lora_over,
    output,
    trainable,
)


def evaluated(model, fuse_projections=False, **config):
    """``model`` with branches that are not zero."""
    slk.apply_lora(model.eval(), lora_config(**config), fuse_projections=fuse_projections)
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


# Saved while merged.

WITH_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def by_load_adapter(tmp_path):
    slk.save_adapter(evaluated(llama()), tmp_path / "adapter")
    model = llama().eval()
    slk.load_adapter(model, tmp_path / "adapter")
    return model


def by_hand():
    model = llama().eval()
    attention = model.model.layers[0].self_attn
    attention.q_proj = slk.LoRALinear.from_linear(attention.q_proj, init_lora_weights=False)
    return model


MERGED = {
    "gpt2": lambda: evaluated(gpt2(), target_modules=["c_attn"]),
    "tied": lambda: evaluated(llama(tie_word_embeddings=True)),
    "with a tied head": lambda: evaluated(llama(tie_word_embeddings=True), **WITH_HEAD),
    "layers made by hand": by_hand,
}


def reload(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return output(loaded.eval())


def assert_saved_as_it_is(model, path, state_dict=None):
    """The very files of transformers' own method, which takes tensors out of the dict that it is
    given.
    """
    other = path.with_name("transformers")
    model.save_pretrained(path, state_dict=copy.copy(state_dict))
    type(model).save_pretrained(model, other, state_dict=copy.copy(state_dict))
    files = sorted(file.name for file in path.iterdir())
    assert "model.safetensors" in files and files == sorted(file.name for file in other.iterdir())
    for name in files:
        assert (path / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_model_is_saved_merged(tmp_path, kind):
    torch.manual_seed(0)
    model = MERGED[kind]()
    expected, keys, tied = output(model), list(model.state_dict()), model.config.tie_word_embeddings
    slk.merge_lora(model)
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    # As the Trainer calls it.
    torch.testing.assert_close(
        reload(model, tmp_path / "given", state_dict=model.state_dict()), expected
    )
    torch.testing.assert_close(output(model), expected)
    assert list(model.state_dict()) == keys and model.config.tie_word_embeddings == tied
    slk.unmerge_lora(model)
    assert torch.equal(output(model), expected)
    assert_saved_as_it_is(model, tmp_path / "unmerged")
    # A head that it unties stays so, and the config says so.
    slk.remove_lora(model)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings == is_tied
    torch.testing.assert_close(reload(model, tmp_path / "removed"), expected)


@pytest.mark.parametrize(
    "make", [lambda _: evaluated(llama()), by_load_adapter], ids=["apply_lora", "load_adapter"]
)
def test_layers_that_are_merged_one_by_one(tmp_path, make):
    """All of them merged, the merged weights are written; some of them, the model is refused; none,
    it is saved as it is.
    """
    model = make(tmp_path)
    expected, (first, *rest) = output(model), lora_layers(model).values()
    assert_saved_as_it_is(model, tmp_path / "given", {"lm_head.weight": torch.zeros(32, 16)})
    first.merge()
    message = r"model must be merged whole or not at all to be saved, got model\.layers\.0\.self_attn\.q_proj merged and "
    with pytest.raises(
        ValueError, match=message + r"model\.layers\.0\.self_attn\.v_proj, .* not merged"
    ):
        model.save_pretrained(tmp_path / "some")
    for layer in rest:
        layer.merge()
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    assert not (tmp_path / "some").exists()


def test_copies_and_pickles_save_themselves(tmp_path):
    model = evaluated(llama())
    slk.merge_lora(model)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        torch.testing.assert_close(reload(twin, tmp_path / str(number)), 2 * output(model))


def test_a_save_that_fails_leaves_the_model_merged(tmp_path, monkeypatch):
    model = evaluated(llama(tie_word_embeddings=True), **WITH_HEAD)
    slk.merge_lora(model)
    expected = output(model)

    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert torch.equal(output(model), expected) and model.config.tie_word_embeddings
    slk.unmerge_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
