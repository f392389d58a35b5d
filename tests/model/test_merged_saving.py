"""save_pretrained of a merged model writes the merged weights, and nothing of it stays after unmerging."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora, remove_lora, unmerge_lora
from tests.helpers.small_models import fill_b, llama, lora_config, output

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")


def adapted(kind="llama", **config):
    torch.manual_seed(0)
    if kind == "gpt2":
        settings = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
        model, targets = transformers.GPT2LMHeadModel(settings).eval(), {"target_modules": ["c_attn"]}
    else:
        model, targets = llama(tie_word_embeddings=kind == "tied").eval(), {}
    base = output(model)
    apply_lora(model, lora_config(**targets | config))
    fill_b(model)
    assert not torch.allclose(output(model), base, atol=1e-3)
    return model


def reload(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return output(loaded.eval())


@pytest.mark.parametrize(
    ("kind", "config"), [("llama", {}), ("gpt2", {}), ("tied", {"target_modules": ["q_proj", "lm_head"]}), ("tied", {})]
)
def test_a_merged_model_is_saved_merged(tmp_path, kind, config):
    model = adapted(kind, **config)
    expected, keys, names = output(model), list(model.state_dict()), [name for name, _ in model.named_modules()]
    merge_lora(model)
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    # As the Trainer calls it.
    torch.testing.assert_close(reload(model, tmp_path / "given", state_dict=model.state_dict()), expected)
    torch.testing.assert_close(output(model), expected)
    assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
    assert model.config.tie_word_embeddings == (kind in ("tied", "gpt2"))
    unmerge_lora(model)
    assert "save_pretrained" not in vars(model) and torch.equal(output(model), expected)


def test_copies_and_pickles_save_themselves(tmp_path):
    model = adapted()
    merge_lora(model)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        torch.testing.assert_close(reload(twin, tmp_path / str(number)), 2 * output(model))


def test_a_save_that_fails_leaves_the_model_merged(tmp_path, monkeypatch):
    model = adapted("tied", target_modules=["q_proj", "lm_head"])
    merge_lora(model)
    expected = output(model)

    def fail(self, directory):
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert torch.equal(output(model), expected) and model.config.tie_word_embeddings
    unmerge_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_remove_lora_unties_stays_so(tmp_path):
    model = adapted("tied", target_modules=["q_proj", "lm_head"])
    expected = output(model)
    remove_lora(model)
    torch.testing.assert_close(reload(model, tmp_path), expected)
    assert "save_pretrained" not in vars(model)


def test_a_merged_model_is_freed_when_nobody_holds_it():
    model = adapted()
    merge_lora(model)
    gc.disable()
    try:
        gone = weakref.ref(model.model.layers[0].self_attn.q_proj)
        del model
        assert gone() is None
    finally:
        gc.enable()
