"""What load_adapter refuses: one table of damage to an adapter's files and of models that they do not fit."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from tests.helpers.adapters import CONFIG_NAME, WEIGHTS_NAME, edit_config, edit_tensors, fresh
from tests.helpers.small_models import lora_config, refused

pytest.importorskip("safetensors.torch", reason="safetensors is not installed (pip install .[test])")


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
# Files that every reader refuses.
BROKEN = {
    "a pickle": (
        write("adapter_model.bin", pickle.dumps(Bomb()), instead_of=WEIGHTS_NAME),
        f"must hold {WEIGHTS_NAME}, got adapter_model.bin: a pickle can run code, so it is refused",
    ),
    "a pickle by another name": (write(WEIGHTS_NAME, pickle.dumps(Bomb())), "must be a safetensors file, got one that cannot"),
    "no JSON": (write(CONFIG_NAME, b"{"), "must be JSON, got text that is not"),
    "deep JSON": (write(CONFIG_NAME, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "must be JSON of a few levels, got it nested"),
    "a list": (write(CONFIG_NAME, b"[]"), "must hold a JSON object, got a list"),
    "no config": (lambda path: (path / CONFIG_NAME).unlink(), f"must hold {CONFIG_NAME}, got .* without it"),
    "no weights": (lambda path: (path / WEIGHTS_NAME).unlink(), f"must hold {WEIGHTS_NAME}, got .* without it"),
    "an endless alpha": (config(lora_alpha=10**400), rf"{CONFIG_NAME}: lora_alpha.* must be a finite number in .*, got 1000"),
    "alpha as a list": (config(lora_alpha=[6]), rf"{CONFIG_NAME}: lora_alpha.* must be a number, got \[6\]"),
    "a list of patterns": (config(alpha_pattern=[1]), r"alpha_pattern must be a dict of name patterns, got \[1\]"),
    "an endless pattern": (
        config(rank_pattern={"a{99999999999}": 1}), "rank_pattern must be a regular expression, got 'a.9999",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_every_reader(saved, model, capsys, damage, message):
    damage(saved)
    for target in (model, fresh()):
        with refused(target, (ValueError, TypeError), message):
            slk.load_adapter(target, saved)
    for command in (["inspect", str(saved)], ["merge", str(saved), "--into", str(saved), "--out", str(saved / "out")]):
        status, told = main(command), capsys.readouterr()
        assert status == 2 and told.out == "" and told.err.count("\n") == 1 and len(told.err) < 600
    assert not (saved / "out").exists()


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
    "IA3": (config(peft_type="IA3"), "peft_type in .* must be 'LORA', got 'IA3'", BOTH),
    "DoRA": (config(use_dora=True, x=[1]), r"must use plain LoRA, got use_dora=True, x=\[1\], which is not supported", BOTH),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights must be True, False or 'gaussian', got 'pissa'", BOTH),
    "r 0": (config(r=0), f"{CONFIG_NAME}: r must be at least 1, got 0", BOTH),
    "other targets": (config(target_modules=["q_proj"]), "got layers.0.v_proj.lora_A.weight, .* beyond that", NEW),
    "no such target": (config(target_modules=["k_proj"]), "target_modules must match an nn.Linear of the model", NEW),
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


def test_directories_that_are_none(saved):
    for path, found in (("a/b/c", "nothing there"), (saved / WEIGHTS_NAME, "a file")):
        with pytest.raises(ValueError, match=rf"path must be a directory on this machine .* got '{path}' \({found}\)"):
            slk.load_adapter(fresh(), path)


def test_an_adapter_on_a_layer_that_is_skipped_says_why(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")

    def make():
        return nn.ModuleDict({"enc": nn.TransformerEncoderLayer(4, 2, 4), "out": nn.Linear(4, 4)})

    peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["linear1", "out"])).save_pretrained(tmp_path)
    message = "got enc.linear1.lora_A.weight, enc.linear1.lora_B.weight beyond that; enc.linear1: nn.TransformerEncoder"
    with pytest.raises(ValueError, match=message):
        slk.load_adapter(make(), tmp_path)


def test_without_safetensors_or_numpy(saved, model, tmp_path, monkeypatch):
    for module, calls in (("safetensors.torch", (slk.save_adapter, slk.load_adapter)), ("numpy", (slk.save_adapter,))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            for call in calls:
                with pytest.raises(ImportError, match=rf"needs {module[:5]}.*: pip install 'stablelora-kernels\[adapt"):
                    call(model, tmp_path / "new")
            if module == "numpy":
                slk.load_adapter(fresh(), saved)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("has_lora", [False, True])
def test_modules_to_save_of_another_kind_are_refused(tmp_path, has_lora):
    model = fresh()
    slk.apply_lora(model, lora_config(modules_to_save=["lm_head"]))
    slk.save_adapter(model, tmp_path)
    target = model if has_lora else fresh()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        put("base_model.model.lm_head.weight", torch.ones(11, 8).to(dtype))(tmp_path)
        with refused(target, ValueError, rf"lm_head.weight in .* must be torch.float32 or alike, got {dtype}"):
            slk.load_adapter(target, tmp_path)
    put("base_model.model.lm_head.weight", torch.ones(11, 8, dtype=torch.float16))(tmp_path)
    slk.load_adapter(target, tmp_path)
    assert torch.equal(target.lm_head.weight, torch.ones(11, 8))
