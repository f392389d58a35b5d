"""save_adapter and load_adapter: what is written, what is read, and what they refuse."""

from __future__ import annotations

import os
import pickle
import re
import sys

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, edit_config, edit_tensors, fresh
from tests.helpers.small_models import fill_b, llama, lora_config, output, refused

safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install .[test] brings safetensors")


def test_the_same_adapter_gives_the_same_bytes(model, saved):
    """Merged, it is the same adapter. Often: safetensors draws the order of the header's metadata anew for each file."""
    for i in range(12):
        if i == 6:
            slk.merge_lora(model)
        slk.save_adapter(model, saved.parent / "again")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            assert (saved / name).read_bytes() == (saved.parent / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype, tmp_path):
    first = fresh().to(torch.bfloat16)
    slk.apply_lora(first, lora_config())
    fill_b(first)
    for layer in lora_layers(first).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    slk.save_adapter(first, tmp_path)
    assert {t.dtype for t in safetensors_torch.load_file(tmp_path / WEIGHTS_NAME).values()} == {dtype}
    # Beside a weight of a third dtype they become float32, which loses nothing.
    for base, expected in ((torch.bfloat16, dtype), (torch.float32, torch.float32)):
        second = fresh().to(base)
        slk.load_adapter(second, tmp_path)
        for name, layer in lora_layers(second).items():
            for half in ("lora_A", "lora_B"):
                found, wanted = getattr(layer, half), getattr(first.get_submodule(name), half)
                assert found.dtype == expected and torch.equal(found, wanted.to(expected))


def test_what_does_not_change_the_result_is_accepted(model, saved):
    edit_config(
        saved, layers_to_transform=[0, 1], layers_pattern="layers", init_lora_weights="orthogonal", task_type="CAUSAL_LM",
        use_dora=False, loftq_config={}, qalora_group_size=16, some_new_field=None,
    )  # fmt: skip
    second, expected = fresh(), output(model)
    # Removed, the first model may be given it again.
    slk.remove_lora(model, merge=False)
    for each in (model, second):
        slk.load_adapter(each, saved)
        assert torch.equal(output(each), expected)


def test_peft_finds_the_models_class(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install .[test])")
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    slk.apply_lora(model, lora_config())
    fill_b(model)
    slk.save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(theirs), output(model))


def of_two_scalings(model):
    model.lm_head = slk.LoRALinear.from_linear(model.lm_head, use_rslora=True)
    return model


REFUSED = {
    "no LoRA": (lambda model: fresh(), r"model must have LoRALinear layers \(apply_lora makes them\), got a Model"),
    "a layer": (lambda model: slk.LoRALinear(2, 2), "got a LoRALinear, which has no name in a file"),
    "on meta": (lambda model: model.to("meta"), "must hold values, got .* on the meta device"),
    "two scalings": (of_two_scalings, "use_rslora must be one value for all layers, got both; lm_head differ"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_save_refuses(model, saved, make, message):
    with pytest.raises(ValueError, match=message):
        slk.save_adapter(make(model), saved.parent / "x")
    assert os.listdir(saved.parent) == ["adapter"]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def put(key, value):
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({key: value}))


def config(**changes):
    return lambda path: edit_config(path, **changes)


def write(name, content, instead_of=None):
    def damage(path):
        (path / (instead_of or name)).unlink()
        (path / name).write_bytes(content)

    return damage


Q0 = "base_model.model.layers.0.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
# fmt: off
# What is done to the files, and what every reader says.
BROKEN = {
    "a pickle": (
        write("adapter_model.bin", pickle.dumps(Bomb()), instead_of=WEIGHTS_NAME),
        f"must hold {WEIGHTS_NAME}, got adapter_model.bin: a pickle can run code, so it is refused",
    ),
    "a pickle by another name": (write(WEIGHTS_NAME, pickle.dumps(Bomb())), "must be a safetensors file, got one that cannot"),
    "no JSON": (write(CONFIG_NAME, b"{"), "must be JSON, got text that is not"),
    "deep JSON": (write(CONFIG_NAME, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "must be JSON of a few levels, got it nested"),
    "no config": (lambda path: (path / CONFIG_NAME).unlink(), f"must hold {CONFIG_NAME}, got .* without it"),
    "an endless alpha": (config(lora_alpha=10**400), rf"{CONFIG_NAME}: lora_alpha.* must be a finite number in .*, got 1000"),
    "an endless pattern": (
        config(rank_pattern={"a{99999999999}": 1}), "rank_pattern must be a regular expression, got 'a.9999",
    ),
}
# fmt: on


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_every_reader(saved, model, capsys, damage, message):
    damage(saved)
    for target in (model, fresh()):
        with refused(target, (ValueError, TypeError), message):
            slk.load_adapter(target, saved)
    status, told = main(["inspect", str(saved)]), capsys.readouterr()
    assert status == 2 and told.out == "" and told.err.count("\n") == 1 and len(told.err) < 600
    assert re.search(message, told.err)


# Into a model without layers, one with this adapter's layers, or both.
BOTH, NEW, OLD = ("new", "old"), ("new",), ("old",)
MISFITS = {
    "a tensor less": (
        lambda path: edit_tensors(path, lambda tensors: tensors.pop(B0)),
        "must hold layers.0.q_proj.lora_B.weight, got 7 tensors without them", BOTH,
    ),
    "a tensor more": (put("base_model.model.embed.weight", torch.ones(11, 8)), "got embed.weight beyond that", BOTH),
    "no prefix": (
        put("lm_head.weight", torch.ones(2)), "keys in .* must start with 'base_model.model.', got lm_head.weight", BOTH,
    ),
    "a rank": (put(A0, torch.ones(4, 8)), r"layers.0.q_proj.lora_A.weight in .* must be \[2, 8\], got \[4, 8\]", BOTH),
    "integers": (put(B0, torch.ones(8, 2, dtype=torch.int8)), "lora_B.weight in .* must be one of .*, got torch.int8", BOTH),
    "DoRA": (config(use_dora=True, x=[1]), r"must use plain LoRA, got use_dora=True, x=\[1\], which is not supported", BOTH),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights must be True, False or 'gaussian', got 'pissa'", BOTH),
    "other targets": (config(target_modules=["q_proj"]), "got layers.0.v_proj.lora_A.weight, .* beyond that", NEW),
    "the model's r": (config(r=3), "r of 'layers.0.q_proj' is 2 in the model, got 3 in ", OLD),
    "the model's alpha": (config(lora_alpha=8), "lora_alpha of 'layers.0.q_proj' is 16 in the model, got 8 in ", OLD),
    "the model's scaling": (config(use_rslora=True), "use_rslora of .* is False in the model, got True in ", OLD),
    "the model's bias": (config(bias="all"), "bias is 'none' in the model, got 'all' in ", OLD),
    "the model's saved modules": (
        config(modules_to_save=["norm"]), r"modules_to_save is \[\] in the model, got \['layers.0.norm', .*\] in", OLD,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message", "into"), MISFITS.values(), ids=MISFITS)
def test_what_the_config_and_the_model_do_not_call_for(saved, model, damage, message, into):
    damage(saved)
    for target in [{"new": fresh(), "old": model}[kind] for kind in into]:
        with refused(target, ValueError, message):
            slk.load_adapter(target, saved)


def test_a_merged_model_and_one_without_values_are_refused(saved, model):
    slk.merge_lora(model)
    with refused(model, ValueError, "must not be merged while an adapter is loaded, got layers.0.q_proj, .* merged"):
        slk.load_adapter(model, saved)
    with pytest.raises(ValueError, match=r"model must hold values, got layers.0.q_proj.weight.* on the meta device"):
        slk.load_adapter(fresh().to("meta"), saved)


@pytest.mark.parametrize("module", ["safetensors.torch", "numpy"])
def test_without_what_saving_needs(model, saved, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {module[:5]}.*: pip install 'stablelora-kernels\[adapt"):
        slk.save_adapter(model, saved.parent / "new")
    assert os.listdir(saved.parent) == ["adapter"]


@pytest.mark.parametrize("has_lora", [False, True])
def test_modules_to_save_of_another_kind_are_refused(tmp_path, has_lora):
    model = fresh()
    slk.apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    slk.save_adapter(model, tmp_path)
    target = model if has_lora else fresh()
    put("base_model.model.lm_head.weight", torch.ones(11, 8, dtype=torch.int64))(tmp_path)
    with refused(target, ValueError, "lm_head.weight in .* must be torch.float32 or alike, got torch.int64"):
        slk.load_adapter(target, tmp_path)
    put("base_model.model.lm_head.weight", torch.ones(11, 8, dtype=torch.float16))(tmp_path)
    slk.load_adapter(target, tmp_path)
    assert torch.equal(target.lm_head.weight, torch.ones(11, 8))
