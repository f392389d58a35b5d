"""``merge``: what it writes is what transformers loads, to the bit; and a run that fails leaves everything as it was."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from stablelora_kernels.cli import merge as command
from tests.cli.test_cli import fails
from tests.helpers.small_models import fill_b, llama, lora_config

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
# What the tests themselves save is no part of a command's stderr.
transformers.logging.disable_progress_bar()
IDS = torch.arange(12).view(2, 6)
WEIGHT = "model.layers.1.self_attn.q_proj"


def make_llama(tied=False):
    torch.manual_seed(0)
    return llama(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def reload(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def prepare(tmp_path, model, **config):
    """A model's directory with a tokenizer's files, an adapter's for it, and the model with the adapter on."""
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "model" / "training_args.bin").write_bytes(b"\x80")
    adapted = copy.deepcopy(model)
    slk.apply_lora(adapted, lora_config(**config))
    fill_b(adapted)
    slk.save_adapter(adapted, tmp_path / "adapter")
    return adapted.eval()


def argv(tmp_path, *more):
    adapter, model, out = (str(tmp_path / name) for name in ("adapter", "model", "out"))
    return ["merge", adapter, "--into", model, "--out", out, *more]


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_is_written_is_the_merged_model(tmp_path, capsys):
    adapted = prepare(tmp_path, make_llama())
    expected = logits(adapted)
    assert main(argv(tmp_path, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    merged = reload(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected)
    assert (logits(make_llama()) - expected).abs().max() > 1e-3
    # The library's own merge, to the bit, and its own error.
    errors = slk.merge_lora(adapted).errors
    assert torch.equal(merged.get_submodule(WEIGHT).weight, adapted.get_submodule(WEIGHT).weight)
    assert report["merged"] == 4 and report["dtype"] == "float32" and report["architecture"] == "LlamaForCausalLM"
    assert report["errors"][WEIGHT]["largest_error"] == errors[WEIGHT].largest_error > 0
    assert report["errors"][report["worst"]]["relative"] == max(e.relative for e in errors.values())
    assert report["copied"] == ["tokenizer.json", "tokenizer_config.json"] and report["untied"] is False
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert "training_args.bin" not in content(tmp_path / "out")
    assert report["bytes"] == sum(len(data) for data in content(tmp_path / "out").values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bf16"), ("bfloat16", "fp32"), ("bfloat16", None)])
def test_dtypes_are_rounded_to_once_and_the_error_is_the_stored_weights(tmp_path, capsys, stored, wanted):
    adapted = prepare(tmp_path, make_llama().to(getattr(torch, stored)))
    layer = adapted.get_submodule(WEIGHT)
    exact = layer.weight.double() + layer.delta_weight().double()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: torch.bfloat16}[wanted]
    assert main(argv(tmp_path, "--json", *(("--dtype", wanted) if wanted else ()))) == 0
    report = json.loads(capsys.readouterr().out)
    merged = reload(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {dtype} and report["dtype"] == str(dtype)[6:]
    weight = merged.get_submodule(WEIGHT).weight
    error = (weight.double() - exact).abs().max().item()
    assert report["errors"][WEIGHT]["largest_error"] == pytest.approx(error, rel=1e-4)
    assert error <= torch.finfo(dtype).eps / 2 * exact.abs().max()


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_a_head_that_was_tied_stays_apart(tmp_path, capsys, how):
    config = {"target_modules": ["q_proj", "lm_head"]} if how == "target_modules" else {"modules_to_save": ["lm_head"]}
    adapted = prepare(tmp_path, make_llama(tied=True), **config)
    if how == "modules_to_save":
        with torch.no_grad():
            adapted.lm_head.weight.mul_(2)
        slk.save_adapter(adapted, tmp_path / "adapter")
    expected = logits(adapted)
    assert main(argv(tmp_path)) == 0
    assert "input and output embeddings" in capsys.readouterr().out
    merged = reload(tmp_path / "out")
    torch.testing.assert_close(logits(merged), expected)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_a_tied_model_whose_embeddings_stay_is_stored_tied(tmp_path, capsys):
    adapted = prepare(tmp_path, make_llama(tied=True))
    assert main(argv(tmp_path)) == 0
    assert "untied" not in capsys.readouterr().out
    merged = reload(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_peft_adapter_into_gpt2(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path / "model")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    assert main(argv(tmp_path)) == 0
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(tuned))


def test_an_existing_directory_is_replaced_only_when_told_to(tmp_path, capsys):
    adapted = prepare(tmp_path, make_llama())
    out = tmp_path / "out"
    out.mkdir()
    assert main(argv(tmp_path)) == 0  # an empty one may be used
    before = content(out)
    capsys.readouterr()
    assert f"--out must be empty or not there, got '{out}'" in fails(capsys, *argv(tmp_path))
    assert content(out) == before
    assert main(argv(tmp_path, "--overwrite", "--dtype", "bf16")) == 0
    assert content(out).keys() == before.keys() and content(out) != before
    torch.testing.assert_close(logits(reload(out).float()), logits(adapted), atol=0.02, rtol=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]


@pytest.mark.parametrize("kind", ["a note", "a directory", "another model"])
def test_what_the_command_did_not_write_is_not_deleted(tmp_path, capsys, kind):
    prepare(tmp_path, make_llama())
    out = tmp_path / "out"
    if kind == "another model":
        make_llama().save_pretrained(out)
    else:
        assert main(argv(tmp_path)) == 0
        (out / "mine").mkdir() if kind == "a directory" else (out / "mine").write_text("kept")
    capsys.readouterr()
    before = sorted(out.rglob("*"))
    error = fails(capsys, *argv(tmp_path, "--overwrite"))
    assert f"--overwrite replaces only what this command wrote, got '{out}' with " in error
    assert error.strip().endswith("mine" if kind != "another model" else "model.safetensors")
    assert sorted(out.rglob("*")) == before


def test_what_a_killed_merge_left_is_put_right(tmp_path):
    prepare(tmp_path, make_llama())
    out = tmp_path / "out"
    assert main(argv(tmp_path)) == 0
    before = content(out)
    # Killed between the two renames, with the new model half written.
    out.rename(tmp_path / ".out.merge.old")
    (tmp_path / ".out.merge.tmp").mkdir()
    (tmp_path / ".out.merge.tmp" / "half").write_text("")
    (tmp_path / ".out.merge.lock").write_text("")
    with pytest.raises(RuntimeError), command._appearing(out):
        raise RuntimeError
    assert content(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "out"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_ends_every_command_alike(tmp_path, capsys, name):
    prepare(tmp_path, make_llama())
    (tmp_path / "adapter" / name).write_bytes(b"nonsense")
    errors = {fails(capsys, *argv(tmp_path)).partition("error: ")[2]}
    errors.add(fails(capsys, "inspect", str(tmp_path / "adapter")).partition("error: ")[2])
    assert len(errors) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("raised", "status"), [(OSError("No space left on device"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_leaves_everything_as_it_was(tmp_path, capsys, monkeypatch, raised, status, there):
    prepare(tmp_path, make_llama())
    out = tmp_path / "out"
    if there:
        assert main(argv(tmp_path)) == 0
        capsys.readouterr()
    before = content(out) if there else None

    def half_way(self, directory, *args, **kwargs):
        (directory / "model.safetensors").write_bytes(b"half")
        raise raised

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", half_way)
    error = fails(capsys, *argv(tmp_path, "--overwrite"), status=status)
    assert status == 130 or "could not be written: No space left on device" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", *["out"] * there]
    assert not there or content(out) == before


def test_a_directory_that_cannot_be_moved_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    replace = command.os.replace

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("device is gone")
        replace(source, target)

    monkeypatch.setattr(command.os, "replace", failing)
    with pytest.raises(OSError, match="device is gone"), command._appearing(tmp_path / "out") as new:
        (new / "a").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {"mine.txt": b"kept"}


def change(path, **values):
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps(found))


def test_what_is_not_finite_is_refused(tmp_path, capsys):
    prepare(tmp_path, make_llama(), modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = safetensors.load_file(file)

    def with_nan(key):
        tensors = {name: tensor.clone() for name, tensor in good.items()}
        tensors[key][0, 0] = float("nan")
        safetensors.save_file(tensors, file)
        return fails(capsys, *argv(tmp_path), status=1)

    assert f"'{WEIGHT}': merging would give a weight that is not finite" in with_nan(
        f"base_model.model.{WEIGHT}.lora_A.weight"
    )
    assert "must be finite, got lm_head.weight in float32" in with_nan("base_model.model.lm_head.weight")
    large = {name: tensor * (1e6 if ".1.self_attn.q_proj.lora_" in name else 1) for name, tensor in good.items()}
    safetensors.save_file(large, file)
    error = fails(capsys, *argv(tmp_path, "--dtype", "fp16"), status=1)
    assert f"got {WEIGHT}.weight in float16 with values that are not" in error
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_tried_is_refused(tmp_path, capsys, monkeypatch):
    prepare(tmp_path, make_llama())
    model, config = tmp_path / "model", tmp_path / "model" / "config.json"
    adapter, good = str(tmp_path / "adapter"), config.read_text()
    out = str(tmp_path / "out")

    def refused(**values):
        change(config, **values)
        error = fails(capsys, *argv(tmp_path))
        config.write_text(good)
        return error

    error = refused(quantization_config={"quant_method": "bitsandbytes"})
    assert "quantized (bitsandbytes): the sum would have to be quantized anew" in error
    error = refused(architectures=["NoSuchModel"], auto_map={"AutoModel": "x.y"})
    assert "must name a class of transformers, got 'NoSuchModel', and code of its own (auto_map) is not run" in error
    assert "got None" in refused(architectures=None)
    config.write_text("{")
    assert "config.json must be JSON" in fails(capsys, *argv(tmp_path))
    config.unlink()
    assert "with config.json, got" in fails(capsys, *argv(tmp_path))
    config.write_text(good)
    (tmp_path / "file").write_text("")
    assert "got the file" in fails(capsys, "merge", adapter, "--into", str(model), "--out", str(tmp_path / "file"))
    weights = str(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "ADAPTER must be a directory, got the file" in fails(
        capsys, "merge", weights, "--into", str(model), "--out", out
    )
    assert "--into must be a path or a hub id" in fails(capsys, "merge", adapter, "--into", "./no", "--out", out)
    for holder in (model, tmp_path / "adapter", tmp_path):
        error = fails(capsys, "merge", adapter, "--into", str(model), "--out", str(holder), "--overwrite")
        assert "--out must not hold" in error
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'stablelora-kernels[cli]'" in fails(capsys, *argv(tmp_path))
    assert not (tmp_path / "out").exists()


def test_an_adapter_or_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    prepare(tmp_path, make_llama())
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.load_file(weights)
    change(tmp_path / "adapter" / "adapter_config.json", use_dora=True)
    assert "must use plain LoRA, got use_dora=True" in fails(capsys, *argv(tmp_path), status=1)
    change(tmp_path / "adapter" / "adapter_config.json", use_dora=False, target_modules=["k_proj"])
    assert "must hold" in fails(capsys, *argv(tmp_path), status=1)
    # transformers would draw the missing weight at random.
    head = tensors.pop("lm_head.weight")
    safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    assert "all weights of LlamaForCausalLM, got lm_head.weight missing" in fails(capsys, *argv(tmp_path), status=1)
    safetensors.save_file(tensors | {"lm_head.weight": head[:5].clone()}, weights, metadata={"format": "pt"})
    assert "can't be loaded" in fails(capsys, *argv(tmp_path), status=1)
    weights.unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    assert "can't be loaded" in fails(capsys, *argv(tmp_path), status=1)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "model")
