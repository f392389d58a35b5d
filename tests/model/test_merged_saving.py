"""save_pretrained of a merged model writes the merged weights; of an unmerged one it is transformers' own."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch

from stablelora_kernels.model.apply import apply_lora
from stablelora_kernels.model.merge import merge_lora, remove_lora, unmerge_lora
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.save_load import load_adapter, save_adapter
from stablelora_kernels.nn.linear import LoRALinear
from tests.helpers.small_models import fill_b, gpt2, llama, lora_config, output

pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")


def adapted(kind="llama", **config):
    torch.manual_seed(0)
    if kind == "gpt2":
        model, targets = gpt2(), {"target_modules": ["c_attn"]}
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


def assert_saved_as_it_is(model, path, state_dict=None):
    """The very files of transformers' own method, which takes tensors out of the dict that it is given."""
    other = path.with_name("transformers")
    model.save_pretrained(path, state_dict=copy.copy(state_dict))
    type(model).save_pretrained(model, other, state_dict=copy.copy(state_dict))
    files = sorted(file.name for file in path.iterdir())
    assert "model.safetensors" in files and files == sorted(file.name for file in other.iterdir())
    for name in files:
        assert (path / name).read_bytes() == (other / name).read_bytes(), name


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
    assert torch.equal(output(model), expected)
    assert_saved_as_it_is(model, tmp_path / "unmerged")


@pytest.mark.parametrize("way", ["apply_lora", "load_adapter"])
def test_layers_that_are_merged_one_by_one(tmp_path, way):
    """All of them merged, the merged weights are written; some of them, the model is refused; none, it is saved as it is."""
    model = adapted()
    if way == "load_adapter":
        save_adapter(model, tmp_path / "adapter")
        model = llama().eval()
        load_adapter(model, tmp_path / "adapter")
    layers = lora_layers(model)
    expected = output(model)
    assert_saved_as_it_is(model, tmp_path / "unmerged")
    assert_saved_as_it_is(model, tmp_path / "given", {"lm_head.weight": torch.zeros(32, 16)})
    first, *rest = layers.values()
    first.merge()
    message = (
        r"model must be merged whole or not at all to be saved, got model\.layers\.0\.self_attn\.q_proj merged and "
    )
    with pytest.raises(ValueError, match=message + r"model\.layers\.0\.self_attn\.v_proj, .* not merged"):
        model.save_pretrained(tmp_path / "some")
    assert not (tmp_path / "some").exists()
    for layer in rest:
        layer.merge()
    torch.testing.assert_close(reload(model, tmp_path / "merged"), expected)
    # A part of the model that has LoRA layers of its own.
    rest[-1].unmerge()
    with pytest.raises(ValueError, match="merged whole or not at all"):
        model.model.save_pretrained(tmp_path / "part")
    remove_lora(model, merge=False)
    assert "save_pretrained" not in vars(model) | vars(model.model)


def test_layers_put_in_by_hand(tmp_path):
    """merge_lora finds them."""
    torch.manual_seed(0)
    model = llama().eval()
    attention = model.model.layers[0].self_attn
    attention.q_proj = LoRALinear.from_linear(attention.q_proj, init_lora_weights=False)
    expected = output(model)
    merge_lora(model)
    torch.testing.assert_close(reload(model, tmp_path), expected)


def test_a_load_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = adapted()
    save_adapter(model, tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr("stablelora_kernels.model.save_load._copy_all", fail)
    twin = llama()
    with pytest.raises(RuntimeError, match="no memory"):
        load_adapter(twin, tmp_path)
    assert "save_pretrained" not in vars(twin)


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


def test_a_state_dict_by_position_is_not_written(tmp_path):
    model = adapted()
    merge_lora(model)
    expected = output(model)
    model.save_pretrained(tmp_path, True, model.state_dict())
    assert torch.allclose(output(type(model).from_pretrained(tmp_path).eval()), expected, atol=1e-6)


def test_it_has_the_signature_of_the_method_and_says_when_its_model_is_gone(tmp_path):
    model = adapted()
    own = type(model).save_pretrained
    found = inspect.signature(model.save_pretrained)
    assert list(found.parameters) == list(inspect.signature(own).parameters)[1:]
    assert model.save_pretrained.__doc__ == own.__doc__
    assert inspect.signature(copy.deepcopy(model).save_pretrained) == found
    save = model.save_pretrained
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="the model that this save_pretrained saves is gone"):
        save(tmp_path)
