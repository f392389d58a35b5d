"""save_adapter and load_adapter: PEFT's files, read by PEFT and by this library; what files are
refused; and the same under wrappers on two processes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import stablelora_kernels as slk
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.testing import nf4_weight
from tests.helpers.adapters import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapted,
    config_in,
    edit_config,
    edit_tensors,
    fresh,
)
from tests.helpers.processes import needs_gloo, spawn
from tests.helpers.quantized_weights import K, Linear4bit, N
from tests.helpers.small_models import IDS, Model, fill_b, lora_options, output, refused

safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
)


# What is written


def of_two_ranks() -> Model:
    """Layers of two ranks and alphas, and a layer that is not adapted beside others of its name."""
    model = fresh()
    slk.apply_lora(model, ["q_proj"], r=3, lora_alpha=6, use_rslora=True)
    slk.apply_lora(model, ["layers.1.v_proj"], r=1, lora_alpha=5, use_rslora=True)
    torch.manual_seed(4)
    fill_b(model)
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "one rank": lambda: adapted(1),
    "two ranks": of_two_ranks,
}


@pytest.mark.parametrize("kind", MODELS)
def test_peft_and_this_library_read_it(kind, tmp_path):
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    model = MODELS[kind]()
    slk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model))
    report = slk.load_adapter(ours := fresh(), tmp_path)
    assert torch.equal(output(ours), output(model))
    assert [row.name for row in report.replaced] == [*lora_layers(model)]
    slk.accelerate_peft(theirs)
    torch.testing.assert_close(output(theirs), output(model))


def test_the_config_is_short_where_it_can_be(tmp_path):
    slk.save_adapter(adapted(1), tmp_path)
    config = config_in(tmp_path)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["r"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    slk.save_adapter(of_two_ranks(), tmp_path)
    config = config_in(tmp_path)
    assert re.fullmatch(config["target_modules"], "layers.1.v_proj")
    assert not re.fullmatch(config["target_modules"], "layers.0.v_proj")
    assert config["rank_pattern"] == {r"^layers\.1\.v_proj": 1}


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 8}, {"r": 3, "bias": "none"}], ids=str
)
def test_what_peft_writes_is_read(options, tmp_path):
    peft = pytest.importorskip("peft", reason="runs where peft is installed: pip install .[test]")
    torch.manual_seed(2)
    lora = peft.LoraConfig(
        **lora_options(init_lora_weights=False, rank_pattern={"layers.1.q_proj": 5}) | options
    )
    theirs = peft.get_peft_model(fresh(), lora).eval()
    theirs.save_pretrained(tmp_path)
    slk.load_adapter(ours := fresh(), tmp_path)
    torch.testing.assert_close(output(ours), output(theirs))
    # Into layers that are there.
    for layer in lora_layers(ours).values():
        layer.reset_lora_parameters()
    assert not torch.allclose(output(ours), output(theirs), atol=1e-3)
    slk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(output(ours), output(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype, tmp_path):
    first = fresh().to(torch.bfloat16)
    slk.apply_lora(first, **lora_options())
    fill_b(first)
    for layer in lora_layers(first).values():
        layer.lora_A.data = layer.lora_A.data.to(dtype)
        layer.lora_B.data = layer.lora_B.data.to(dtype)
    slk.save_adapter(first, tmp_path)
    saved = safetensors_torch.load_file(tmp_path / WEIGHTS_NAME)
    assert {t.dtype for t in saved.values()} == {dtype}
    # Beside a weight of a third dtype they become float32, which loses nothing.
    for base, expected in ((torch.bfloat16, dtype), (torch.float32, torch.float32)):
        second = fresh().to(base)
        slk.load_adapter(second, tmp_path)
        for name, layer in lora_layers(second).items():
            for half in ("lora_A", "lora_B"):
                value, wanted = getattr(layer, half), getattr(first.get_submodule(name), half)
                assert value.dtype == expected and torch.equal(value, wanted.to(expected))


def test_of_a_quantized_and_of_a_merged_layer(tmp_path):
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        four_bits = Linear4bit(nf4_weight(N, K, 64, nested=True), True, torch.float32)
        return nn.ModuleDict({"four": four_bits, "plain": nn.Linear(K, N)})

    model, x = make(), torch.randn(3, K)
    slk.apply_lora(model, "all-linear", r=3)
    fill_b(model)
    expected = [layer(x) for layer in model.values()]
    model["plain"].merge()
    slk.save_adapter(model, tmp_path)
    slk.load_adapter(other := make(), tmp_path)
    assert all(torch.equal(layer(x), y) for layer, y in zip(other.values(), expected, strict=True))
    with refused(
        model, ValueError, "must not be merged while an adapter is loaded, got plain merged"
    ):
        slk.load_adapter(model, tmp_path)


def test_a_save_replaces_files_whole_and_leaves_no_others(model, saved):
    (saved / "README.md").write_text("the user's")
    before = (saved / WEIGHTS_NAME).stat().st_ino
    slk.save_adapter(adapted(2), saved)
    assert {*os.listdir(saved)} == {"README.md", CONFIG_NAME, WEIGHTS_NAME}
    assert (saved / WEIGHTS_NAME).stat().st_ino != before
    slk.load_adapter(model, saved)
    assert torch.equal(output(model), output(adapted(2)))


@pytest.mark.parametrize("fails", ["the weights", "the config"])
def test_a_save_that_fails_leaves_the_old_adapter(fails, model, saved, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    before = {name: (saved / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    if fails == "the weights":
        monkeypatch.setattr(safetensors_torch, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        slk.save_adapter(adapted(2), saved)
    assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before


@pytest.mark.parametrize("module", ["safetensors.torch", "numpy"])
def test_without_what_saving_needs(model, saved, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"needs {module[:5]}.*: pip install 'stablelora-kernels\[adapt"
    with pytest.raises(ImportError, match=message):
        slk.save_adapter(model, saved.parent / "new")
    assert os.listdir(saved.parent) == ["adapter"]


def test_what_cannot_be_saved(model, tmp_path):
    file = tmp_path / "file"
    file.touch()
    other = adapted(1)
    other.layers[0].q_proj.use_rslora = True
    for each, path, message in (
        (Model(), tmp_path / "new", "must have LoRALinear layers .*, got a Model without any"),
        (slk.LoRALinear(3, 4), tmp_path / "new", "a LoRALinear, which has no name in a file"),
        (model, file, "path must be a directory, got the file"),
        (
            other,
            tmp_path / "new",
            "use_rslora must be one value for all layers, got both; layers.0.v_proj",
        ),
        (
            adapted(1).to("meta"),
            tmp_path / "new",
            "must hold values, got layers.0.q_proj, .* on the meta",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            slk.save_adapter(each, path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_peft_model_is_told_of_pefts_methods(tmp_path, saved):
    from tests.helpers.peft_models import make

    for call, method in ((slk.save_adapter, "save_pretrained"), (slk.load_adapter, "load_adapter")):
        with pytest.raises(ValueError, match=rf"are PEFT's: call model\.{method}\("):
            call(make(), saved)


# What is read


def test_what_does_not_change_the_result_is_accepted(model, saved):
    edit_config(
        saved, layers_to_transform=[0, 1], layers_pattern="layers", init_lora_weights="orthogonal", task_type="CAUSAL_LM",
        use_dora=False, loftq_config={}, qalora_group_size=16, some_new_field=None, base_model_name_or_path="a/b",
    )  # fmt: skip
    slk.load_adapter(second := fresh(), saved)
    assert torch.equal(output(second), output(model))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def put(key, value):
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({key: value}))


def config(**changes):
    """Of a file without a copy of the config in its weights, as PEFT's."""

    def change(path):
        edit_config(path, **changes)
        edit_tensors(path, lambda tensors: None)

    return change


def write(name, content, instead_of=None):
    def damage(path):
        (path / (instead_of or name)).unlink()
        (path / name).write_bytes(content)

    return damage


def weights_of_another_save(path):
    slk.save_adapter(adapted(2, lora_alpha=32), path.parent / "other")
    shutil.copy(path.parent / "other" / WEIGHTS_NAME, path)


Q0 = "base_model.model.layers.0.q_proj"
HEAD = "base_model.model.lm_head"
A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
# Readers: a model without layers, and one with this adapter's.
NEW, OLD, BOTH = ("new",), ("old",), ("new", "old")
# What is done to the files, what a reader says, and which of them.
DAMAGED = {
    "a pickle": (write("adapter_model.bin", pickle.dumps(Bomb()), instead_of=WEIGHTS_NAME), f"without {WEIGHTS_NAME}", BOTH),
    "a pickle by another name": (write(WEIGHTS_NAME, pickle.dumps(Bomb())), "must be a safetensors file, got one", BOTH),
    "no JSON": (write(CONFIG_NAME, b"{"), "must be JSON, got text that is not", BOTH),
    "deep JSON": (write(CONFIG_NAME, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "must be JSON, got text", BOTH),
    "a list": (write(CONFIG_NAME, b"[1]"), "must hold a JSON object, got a list", BOTH),
    "no config": (lambda path: (path / CONFIG_NAME).unlink(), f"without {CONFIG_NAME}", BOTH),
    "another method": (config(peft_type="IA3"), "peft_type in .* must be 'LORA', got 'IA3'", BOTH),
    "an endless alpha": (config(lora_alpha=10**400), "lora_alpha in .* must be a finite number in .*, got 1000", BOTH),
    "an endless pattern": (config(rank_pattern={"a{99999999999}": 1}), "must be a regular expression, got 'a.9999", BOTH),
    "a rank of words": (config(rank_pattern={"q": "two"}), "rank_pattern in .* must be an int, got 'two'", BOTH),
    "of two saves": (weights_of_another_save, rf"/{CONFIG_NAME} and \S*/{WEIGHTS_NAME} must be of one save", BOTH),
    "a tensor less": (
        lambda path: edit_tensors(path, lambda tensors: tensors.pop(B0)),
        r"layers.0.q_proj in .* must have matrices lora_A and lora_B, got \{'A': \[2, 8\]\}", BOTH,
    ),
    "no tensors": (
        lambda path: edit_tensors(path, lambda tensors: tensors.clear()), "must hold pairs of lora_A and lora_B, got none", BOTH,
    ),
    "a layer less": (
        lambda path: edit_tensors(path, lambda tensors: [tensors.pop(key) for key in (A0, B0)]),
        "must hold the model's layers, got none for layers.0.q_proj", OLD,
    ),
    "a layer more": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update({
            f"{HEAD}.lora_A.weight": torch.ones(2, 8), f"{HEAD}.lora_B.weight": torch.ones(11, 2),
        })), "must hold the model's layers alone, got lm_head too", OLD,
    ),
    "another layer": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update(
            {key.replace("layers.0", "layers.7"): tensors[key].clone() for key in (A0, B0)},
        )), "model must have the layers of .*, got none by the name 'layers.7.q_proj'", NEW,
    ),
    "a norm": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update(
            {key.replace("q_proj", "norm"): tensors[key].clone() for key in (A0, B0)},
        )), "'layers.0.norm' in .* must be a layer that can have LoRA, but it is a LayerNorm", NEW,
    ),
    "a whole module": (
        put("base_model.model.embed.weight", torch.ones(11, 8)),
        "must be base_model.model.NAME.lora_A.weight and lora_B, got 'base_model.model.embed.weight'", BOTH,
    ),
    "no prefix": (put("lm_head.lora_A.weight", torch.ones(2)), "keys in .* got 'lm_head.lora_A.weight'", BOTH),
    "a rank": (put(A0, torch.ones(4, 8)), r"layers.0.q_proj in .* must be of rank 2, .*got \{'A': \[4, 8\]", BOTH),
    "a width": (put(A0, torch.ones(2, 7)), r"A and B of 'layers.0.q_proj' .* must be \[2, 8\] and \[8, 2\], got \[2, 7\]", BOTH),
    "integers": (put(B0, torch.ones(8, 2, dtype=torch.int8)), "lora_B.weight in .* must be one of .*, got torch.int8", BOTH),
    "DoRA": (config(use_dora=True, x=[1]), r"must describe plain LoRA, got use_dora=True, x=\[1\]; load it with PEFT", BOTH),
    "biases": (config(bias="all"), "plain LoRA, got bias='all'", BOTH),
    "whole modules": (config(modules_to_save=["norm"]), r"plain LoRA, got modules_to_save=\['norm'\]", BOTH),
    "PiSSA": (config(init_lora_weights="pissa"), "plain LoRA, got init_lora_weights='pissa'", BOTH),
    "another r": (config(r=3), r"must be of rank 3, as \S*/adapter_config.json says, got", BOTH),
    "an r beyond any memory": (config(r=10**400), "must be of rank 1000", BOTH),
    "the model's alpha": (config(lora_alpha=8), "lora_alpha of 'layers.0.q_proj' is 16 in the model, got 8 in ", OLD),
    "the model's scaling": (config(use_rslora=True), "use_rslora of .* is False in the model, got True in ", OLD),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message", "readers"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_refused(saved, model, damage, message, readers):
    """Every message names the file or its directory; no model is changed."""
    damage(saved)
    message = rf"(?s)\A(?=.*{re.escape(str(saved))}).*(?:{message})"
    for reader in readers:
        target = {"new": fresh(), "old": model}[reader]
        with refused(target, (ValueError, TypeError), message):
            slk.load_adapter(target, saved)


# Under wrappers


def made(seed: int) -> Model:
    """A model of one base and of adapters that go by the seed. An odd rank is cut unevenly."""
    torch.manual_seed(0)
    model = Model()
    slk.apply_lora(model, **lora_options(r=3))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.normal_(), layer.lora_B.normal_()
    return model


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_parts(model: Model, wrap) -> Model:
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrap(layer)
    return model


def shard(model: Model, blocks: bool) -> Model:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers if blocks else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


# What a user may have around a model, in processes that are in contact.
AROUND: dict[str, Callable[[Model], nn.Module]] = {
    "data parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "ddp of compiled parts": lambda model: DistributedDataParallel(with_parts(model, compiled)),
    "fsdp": lambda model: shard(model, blocks=True),
    # A forward leaves the root's parameters whole.
    "fsdp of the root alone": lambda model: shard(model, blocks=False),
    "compiled fsdp of checkpointed parts": lambda model: compiled(
        shard(with_parts(model, checkpoint_wrapper), True)
    ),
}


def save_and_load(around: Callable[[Model], nn.Module], place: Path, is_cut: bool) -> None:
    first, second = around(made(seed=1)), around(made(seed=2))
    with torch.no_grad():
        expected = first(IDS)
        assert not torch.allclose(second(IDS), expected)
        slk.save_adapter(first, place)
        # The others don't wait for the one that writes.
        dist.barrier()
        report = slk.load_adapter(second, place)
        layers = lora_layers(second).values()
        assert all(isinstance(layer.lora_A, DTensor) == is_cut for layer in layers)
        assert torch.equal(second(IDS), expected)
    # Of shards, of which a process holds some.
    assert report.trainable == 4 * 3 * 16
    assert [row.name.removeprefix("module.") for row in report.replaced] == [
        f"layers.{i}.{p}_proj" for i in range(2) for p in "qv"
    ]


def on_a_rank(rank: int, world: int, place: Path) -> None:
    for name, around in AROUND.items():
        save_and_load(around, place / name, is_cut="fsdp" in name)
        assert not list(place.rglob(".*")), name


def tensors_and_config(place: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    tensors = safetensors_torch.load_file(place / WEIGHTS_NAME)
    return {name: t.numpy().tobytes() for name, t in tensors.items()}, config_in(place)


@needs_gloo
def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    slk.save_adapter(made(seed=1), tmp_path / "alone")
    spawn(on_a_rank, 2, tmp_path)
    for name in AROUND:
        assert tensors_and_config(tmp_path / name) == tensors_and_config(tmp_path / "alone"), name


@needs_gloo
def test_what_wrappers_refuse(tmp_path: Path, mesh) -> None:
    """LoRA comes before what would not know its layers; and an adapter is whole."""
    slk.save_adapter(made(0), tmp_path / "adapter")
    flat = FullyShardedDataParallel(made(0), use_orig_params=True, device_id=torch.device("cpu"))
    part = made(0)
    part.layers[0] = DistributedDataParallel(part.layers[0])
    for model, calls, message in (
        (
            DistributedDataParallel(Model()),
            ("load",),
            "LoRA before DistributedDataParallel is around it",
        ),
        (
            shard(Model(), True),
            ("load",),
            "has a weight that is sharded; put LoRA on before fully_shard",
        ),
        (flat, ("save", "load"), r"sharded by fully_shard \(FSDP2\), got FullyShardedDataParallel"),
        (
            part,
            ("save", "load"),
            "in DistributedDataParallel as a whole, got its part 'layers.0' in one",
        ),
    ):
        for call in calls:
            with refused(model, ValueError, message):
                if call == "save":
                    slk.save_adapter(model, tmp_path / "other")
                else:
                    slk.load_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "other").exists()


def test_a_file_without_alpha_has_pefts(model, saved):
    """8, not this library's 16."""
    config(lora_alpha=8)(saved)
    content = config_in(saved)
    del content["lora_alpha"]
    (saved / CONFIG_NAME).write_text(json.dumps(content))
    slk.load_adapter(second := fresh(), saved)
    assert {layer.lora_alpha for layer in lora_layers(second).values()} == {8}
