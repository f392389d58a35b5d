"""save_adapter and load_adapter: what is written, what is read from a directory or the hub, and
what files are refused.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from stablelora_kernels.model.modules import lora_layers
from tests.helpers.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapted,
    config_in,
    edit_config,
    edit_tensors,
    fresh,
)
from tests.helpers.small_models import fill_b, lora_config, output, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
)


def test_the_same_adapter_gives_the_same_bytes(model, saved):
    """Merged, it is the same adapter. Often: safetensors draws the order of the header's metadata
    anew for each file.
    """
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
        layer.lora_A.data = layer.lora_A.data.to(dtype)
        layer.lora_B.data = layer.lora_B.data.to(dtype)
    slk.save_adapter(first, tmp_path)
    assert {t.dtype for t in safetensors_torch.load_file(tmp_path / WEIGHTS_NAME).values()} == {
        dtype
    }
    # Beside a weight of a third dtype they become float32, which loses nothing.
    for base, expected in ((torch.bfloat16, dtype), (torch.float32, torch.float32)):
        second = fresh().to(base)
        slk.load_adapter(second, tmp_path)
        for name, layer in lora_layers(second).items():
            for half in ("lora_A", "lora_B"):
                found, wanted = getattr(layer, half), getattr(first.get_submodule(name), half)
                assert found.dtype == expected and torch.equal(found, wanted.to(expected))


def test_weights_that_a_saved_module_ties_are_saved(tmp_path):
    """safetensors refuses tensors that share memory."""
    head = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("tokens", "labels")})
    head["labels"].weight = head["tokens"].weight
    first = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": head})
    second = copy.deepcopy(first)
    slk.apply_lora(first, lora_config(target_modules=["q_proj"], modules_to_save=["head"]))
    nn.init.normal_(head["tokens"].weight)
    slk.save_adapter(first, tmp_path)
    slk.load_adapter(second, tmp_path)
    assert torch.equal(second["head"]["tokens"].weight, head["tokens"].weight)
    assert second["head"]["labels"].weight is second["head"]["tokens"].weight


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


def weights_of_another_save(path):
    slk.save_adapter(adapted(2, lora_alpha=32), path.parent / "other")
    shutil.copy(path.parent / "other" / WEIGHTS_NAME, path)


Q0 = "base_model.model.layers.0.q_proj"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
# Readers: a model without layers, one with this adapter's layers, both, or commands too.
NEW = ("new",)
OLD = ("old",)
BOTH = ("new", "old")
READ = ("new", "old", "inspect")
ALL = ("new", "old", "inspect", "merge")
# What is done to the files, what a reader says, and which of them.
DAMAGED = {
    "a pickle": (
        write("adapter_model.bin", pickle.dumps(Bomb()), instead_of=WEIGHTS_NAME),
        f"must hold {WEIGHTS_NAME}, got .* with adapter_model.bin: a pickle can run code, so it is refused", ALL,
    ),
    "a pickle by another name": (
        write(WEIGHTS_NAME, pickle.dumps(Bomb())), "must be a safetensors file, got one that cannot", ALL,
    ),
    "no JSON": (write(CONFIG_NAME, b"{"), "must be JSON, got text that is not", ALL),
    "deep JSON": (
        write(CONFIG_NAME, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "must be JSON of a few levels, got it nested", ALL,
    ),
    "no config": (lambda path: (path / CONFIG_NAME).unlink(), f"must hold {CONFIG_NAME}, got .* without it", ALL),
    "an endless alpha": (
        config(lora_alpha=10**400), rf"{CONFIG_NAME}: lora_alpha.* must be a finite number in .*, got 1000", READ,
    ),
    "an endless pattern": (
        config(rank_pattern={"a{99999999999}": 1}), "rank_pattern must be a regular expression, got 'a.9999", READ,
    ),
    "of two saves": (weights_of_another_save, rf"/{CONFIG_NAME} and \S*/{WEIGHTS_NAME} must be of one save", ALL),
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
    "another r": (
        config(r=3),
        rf"{WEIGHTS_NAME} must be \[3, 8\], got \[2, 8\], where r in \S*/{CONFIG_NAME} is 3$", NEW,
    ),
    "an r beyond any memory": (
        config(r=10**400, rank_pattern={"v_proj": 10**12}),
        r"must be \[10{400}, 8\], got \[2, 8\], where r in .* is 10{400}$", NEW,
    ),
    "an r beyond any memory, and no tensors": (
        lambda path: (config(r=10**12)(path), edit_tensors(path, lambda tensors: tensors.clear())),
        f"{WEIGHTS_NAME} must hold layers.0.q_proj.lora_A.weight, .*, got 0 tensors without them", NEW,
    ),
    "the model's r": (config(r=3), "r of 'layers.0.q_proj' is 2 in the model, got 3 in ", OLD),
    "the model's alpha": (config(lora_alpha=8), "lora_alpha of 'layers.0.q_proj' is 16 in the model, got 8 in ", OLD),
    "the model's scaling": (config(use_rslora=True), "use_rslora of .* is False in the model, got True in ", OLD),
    "the model's bias": (config(bias="all"), "bias is 'none' in the model, got 'all' in ", OLD),
    "the model's saved modules": (
        config(modules_to_save=["norm"]), r"modules_to_save is \[\] in the model, got \['layers.0.norm', .*\] in", OLD,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message", "readers"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_refused(saved, model, capsys, damage, message, readers):
    """Every message names the file or its directory."""
    damage(saved)
    message = rf"(?s)\A(?=.*{re.escape(str(saved))}).*(?:{message})"
    for target in [{"new": fresh(), "old": model}[reader] for reader in readers[:2]]:
        with refused(target, (ValueError, TypeError), message):
            slk.load_adapter(target, saved)
    commands = {
        "inspect": [],
        "merge": ["--into", str(saved.parent), "--out", str(saved.parent / "out")],
    }
    for command in readers[2:]:
        status, told = main([command, str(saved), *commands[command]]), capsys.readouterr()
        assert status == 2 and told.out == "" and told.err.count("\n") == 1 and len(told.err) < 600
        assert re.search(message, told.err)


def test_files_of_two_saves_are_read_after_what_the_error_asks_for(saved):
    weights_of_another_save(saved)
    with pytest.raises(ValueError) as error:
        slk.load_adapter(fresh(), saved)
    mapping = config_in(saved)["auto_mapping"]
    del mapping[re.search(r"remove '(\w+)' from auto_mapping", str(error.value))[1]]
    edit_config(saved, auto_mapping=mapping)
    slk.load_adapter(fresh(), saved)


@pytest.mark.parametrize("module", ["safetensors.torch", "numpy"])
def test_without_what_saving_needs(model, saved, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"needs {module[:5]}.*: pip install 'stablelora-kernels\[adapt"
    ):
        slk.save_adapter(model, saved.parent / "new")
    assert os.listdir(saved.parent) == ["adapter"]


def test_modules_to_save_of_another_dtype(tmp_path):
    """Of a kind that can be trained it is cast; another is refused."""
    model, key = adapted(1, modules_to_save=["lm_head"]), "base_model.model.lm_head.weight"
    slk.save_adapter(model, tmp_path)
    for target in (model, fresh()):
        put(key, torch.ones(11, 8, dtype=torch.int64))(tmp_path)
        with refused(
            target,
            ValueError,
            "lm_head.weight in .* must be torch.float32 or alike, got torch.int64",
        ):
            slk.load_adapter(target, tmp_path)
        put(key, torch.ones(11, 8, dtype=torch.float16))(tmp_path)
        slk.load_adapter(target, tmp_path)
        assert torch.equal(target.lm_head.weight, torch.ones(11, 8))


# From the hub.


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A hub with one adapter, at its top and in a folder of it. The fixture is the list of what it
    was asked for.
    """
    hub = pytest.importorskip(
        "huggingface_hub", reason="runs where huggingface_hub is installed: pip install .[test]"
    )
    monkeypatch.chdir(tmp_path)
    snapshot, asked = tmp_path / "cache", []
    slk.save_adapter(adapted(1), snapshot)
    shutil.copytree(snapshot, snapshot / "a" / "b")

    def download(repo_id, **kwargs):
        asked.append((repo_id, kwargs))
        if repo_id == "no/route":
            raise ConnectionError("no route\nto host")
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("options", "folder"),
    [({}, ""), ({"revision": "v1"}, ""), ({"subfolder": "a/b"}, "a/b/")],
    ids=str,
)
def test_it_downloads_the_two_files(asked, model, options, folder):
    slk.load_adapter(second := fresh(), "org/an-adapter", **options)
    assert torch.equal(output(second), output(model))
    patterns = {"allow_patterns": [f"{folder}{CONFIG_NAME}", f"{folder}{WEIGHTS_NAME}"]}
    revision = {"revision": options["revision"]} if "revision" in options else {}
    assert asked == [("org/an-adapter", patterns | revision)]
    assert options or main(["inspect", "org/an-adapter"]) == 0


def test_a_local_directory_wins(asked, model, tmp_path):
    slk.save_adapter(model, tmp_path / "org" / "an-adapter" / "best")
    slk.load_adapter(second := fresh(), "org/an-adapter", subfolder="best")
    assert torch.equal(output(second), output(model))
    match = "revision is for hub ids, got 'v1' with 'org/an-adapter', a path on this machine"
    with refused(second, ValueError, match):
        slk.load_adapter(second, "org/an-adapter", revision="v1", subfolder="best")
    assert asked == []


NOTHING, OUTSIDE = r"\(nothing there\)", "subfolder must be a relative path inside of path, got "
NOT_THERE = "'no/route' is no path on this machine, and the hub did not give it: no route"


def test_what_is_not_on_the_hub(asked, monkeypatch, capsys):
    for path in ("name", "a/b/c", "../a", "/a/b", Path("org/an-adapter")):
        with refused(
            second := fresh(), ValueError, rf"path must be a directory on this machine .* {NOTHING}"
        ):
            slk.load_adapter(second, path)
    for folder in ("/tmp", "a/../../b"):
        with refused(second, ValueError, OUTSIDE):
            slk.load_adapter(second, "org/an-adapter", subfolder=folder)
    assert asked == []
    with refused(
        second,
        ValueError,
        f"with safetensors, got 'org/an-adapter' without a/{CONFIG_NAME}, a/{WEIGHTS_NAME}",
    ):
        slk.load_adapter(second, "org/an-adapter", subfolder="a")
    with refused(second, ValueError, f"path {NOT_THERE}$"):
        slk.load_adapter(second, "no/route")
    assert main(["inspect", "no/route"]) == 2
    assert f"ADAPTER {NOT_THERE}\n" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(
        second,
        ImportError,
        "is no path on this machine, and a hub id needs huggingface_hub: pip install",
    ):
        slk.load_adapter(second, "no/route")
