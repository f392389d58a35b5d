"""save_pretrained of a merged model writes the merged weights; of an unmerged one it is transformers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.small_models import fill_b, gpt2, llama, lora_config, output

pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
WITH_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def by_load_adapter(tmp_path):
    slk.save_adapter(adapted(llama()), tmp_path / "adapter")
    model = llama().eval()
    slk.load_adapter(model, tmp_path / "adapter")
    return model


def by_hand():
    model = llama().eval()
    attention = model.model.layers[0].self_attn
    attention.q_proj = slk.LoRALinear.from_linear(attention.q_proj, init_lora_weights=False)
    return model


def adapted(model, **config):
    slk.apply_lora(model.eval(), lora_config(**config))
    fill_b(model)
    return model


MODELS = {
    "gpt2": lambda: adapted(gpt2(), target_modules=["c_attn"]),
    "tied": lambda: adapted(llama(tie_word_embeddings=True)),
    "with a tied head": lambda: adapted(llama(tie_word_embeddings=True), **WITH_HEAD),
    "layers made by hand": by_hand,
}


def reload(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    loaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return output(loaded.eval())


def assert_saved_as_it_is(model, path, state_dict=None):
    """The very files of transformers' own method, which takes tensors out of the dict that it is given."""
    other = path.with_name("transformers")
    model.save_pretrained(path, state_dict=copy.copy(state_dict))
    type(model).save_pretrained(model, other, state_dict=copy.copy(state_dict))
    files = sorted(file.name for file in path.iterdir())
    assert "model.safetensors" in files and files == sorted(file.name for file in other.iterdir())
    for name in files:
        assert (path / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_is_saved_merged(tmp_path, kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    expected, keys, tied = output(model), list(model.state_dict()), model.config.tie_word_embeddings
    slk.merge_lora(model)
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    # As the Trainer calls it.
    torch.testing.assert_close(reload(model, tmp_path / "given", state_dict=model.state_dict()), expected)
    torch.testing.assert_close(output(model), expected)
    assert list(model.state_dict()) == keys and model.config.tie_word_embeddings == tied
    slk.unmerge_lora(model)
    assert torch.equal(output(model), expected)
    assert_saved_as_it_is(model, tmp_path / "unmerged")
    # A head that it unties stays so.
    slk.remove_lora(model)
    torch.testing.assert_close(reload(model, tmp_path / "removed"), expected)


@pytest.mark.parametrize("make", [lambda _: adapted(llama()), by_load_adapter], ids=["apply_lora", "load_adapter"])
def test_layers_that_are_merged_one_by_one(tmp_path, make):
    """All of them merged, the merged weights are written; some of them, the model is refused; none, it is saved as it is."""
    model = make(tmp_path)
    expected, (first, *rest) = output(model), lora_layers(model).values()
    assert_saved_as_it_is(model, tmp_path / "given", {"lm_head.weight": torch.zeros(32, 16)})
    first.merge()
    message = (
        r"model must be merged whole or not at all to be saved, got model\.layers\.0\.self_attn\.q_proj merged and "
    )
    with pytest.raises(ValueError, match=message + r"model\.layers\.0\.self_attn\.v_proj, .* not merged"):
        model.save_pretrained(tmp_path / "some")
    for layer in rest:
        layer.merge()
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    assert not (tmp_path / "some").exists()


def test_copies_and_pickles_save_themselves(tmp_path):
    model = adapted(llama())
    slk.merge_lora(model)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        torch.testing.assert_close(reload(twin, tmp_path / str(number)), 2 * output(model))


def test_a_save_that_fails_leaves_the_model_merged(tmp_path, monkeypatch):
    model = adapted(llama(tie_word_embeddings=True), **WITH_HEAD)
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
