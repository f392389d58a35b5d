"""``merge``: what it writes is what transformers loads, to the bit; and a run that fails leaves
everything as it was.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from functools import partial

import pytest
import torch

import stablelora_kernels as slk
from stablelora_kernels.cli import main
from tests.cli.test_cli import fails
from tests.helpers.adapters import edit_config, edit_tensors
from tests.helpers.dying import in_child, needs_fork
from tests.helpers.moe_models import build, stacks
from tests.helpers.small_models import fill_b, llama, lora_config, output

transformers = pytest.importorskip(
    "transformers", reason="runs where transformers is installed: pip install .[test]"
)
safetensors = pytest.importorskip(
    "safetensors.torch", reason="runs where safetensors is installed: pip install .[test]"
)
# What the tests themselves save is no part of a command's stderr.
transformers.logging.disable_progress_bar()
WEIGHT = "model.layers.1.self_attn.q_proj"


def make_llama(tied=False):
    torch.manual_seed(0)
    return llama(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied).eval()


def reload(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


# One file for each kind that transformers may need.
TOKENIZER = {
    "added_tokens.json", "chat_template.jinja", "image_processor_config.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "qwen.tiktoken", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer_config.json", "vocab.json",
}  # fmt: skip


def prepare(tmp_path, model=None, **config):
    """A model's directory with a tokenizer's files, an adapter's for it, and the model with the
    adapter on.
    """
    model = make_llama() if model is None else model
    model.save_pretrained(tmp_path / "model")
    for name in TOKENIZER:
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "model" / "training_args.bin").write_bytes(b"\x80")
    adapted = copy.deepcopy(model)
    slk.apply_lora(adapted, lora_config(**config))
    fill_b(adapted)
    if config.get("modules_to_save"):
        with torch.no_grad():
            adapted.lm_head.weight.mul_(2)
    slk.save_adapter(adapted, tmp_path / "adapter")
    return adapted.eval()


def argv(tmp_path, *more):
    adapter, model, out = (str(tmp_path / name) for name in ("adapter", "model", "out"))
    return ["merge", adapter, "--into", model, "--out", out, *more]


def content(directory):
    """Every file's bytes, and every directory, by its path."""
    paths = sorted(directory.rglob("*"))
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("stored", "wanted", "written"),
    [
        ("float32", None, "float32"),
        ("float32", "bf16", "bfloat16"),
        ("bfloat16", "fp32", "float32"),
        ("bfloat16", None, "bfloat16"),
    ],
)
def test_what_it_writes(tmp_path, capsys, stored, wanted, written):
    """The sum in float64, rounded once, and its error; what else the model's directory has, if it
    is safe to copy.
    """
    adapted = prepare(tmp_path, make_llama().to(getattr(torch, stored)))
    dtype = getattr(torch, written)
    layer, expected = adapted.get_submodule(WEIGHT), output(adapted)
    exact = layer.weight.double() + layer.delta_weight().double()
    assert main(argv(tmp_path, "--json", *(("--dtype", wanted) if wanted else ()))) == 0
    report, merged = json.loads(capsys.readouterr().out), reload(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {dtype}
    weight, errors = merged.get_submodule(WEIGHT).weight, report["errors"]
    error = (weight.double() - exact).abs().max().item()
    assert errors[WEIGHT]["largest_error"] == pytest.approx(error, rel=1e-4)
    assert 0 < error <= torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert errors[report["worst"]]["relative"] == max(each["relative"] for each in errors.values())
    if stored == written:
        # The library's own merge, to the bit.
        slk.merge_lora(adapted)
        assert torch.equal(weight, layer.weight)
    if stored == written == "float32":
        torch.testing.assert_close(output(merged), expected)
    assert (report["merged"], report["dtype"], report["architecture"]) == (
        4,
        written,
        "LlamaForCausalLM",
    )
    assert report["copied"] == sorted(TOKENIZER) and report["untied"] is False
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert "training_args.bin" not in content(tmp_path / "out")
    assert names_in(tmp_path) == ["adapter", "model", "out"]


def test_stacks_of_experts(tmp_path, capsys):
    model = build("qwen3_moe", dtype=torch.bfloat16)
    adapted = prepare(tmp_path, model, target_modules=[], target_parameters=stacks(model))
    (name,) = (name for name, m in adapted.named_modules() if isinstance(m, slk.nn.LoRAExperts))
    assert main(argv(tmp_path)) == 0 and "2 layers merged" in capsys.readouterr().out
    slk.merge_lora(adapted)
    experts = reload(tmp_path / "out").get_submodule(name)
    expected = adapted.get_submodule(name).base_layer
    assert all(torch.equal(getattr(experts, key), p) for key, p in expected.named_parameters())


@pytest.mark.parametrize(
    ("config", "stays_tied"),
    [
        ({}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
    ids=str,
)
def test_a_tied_head_stays_tied_unless_the_adapter_changes_it(tmp_path, capsys, config, stays_tied):
    adapted = prepare(tmp_path, make_llama(tied=True), **config)
    assert main(argv(tmp_path)) == 0
    assert ("input and output embeddings" in capsys.readouterr().out) != stays_tied
    merged = reload(tmp_path / "out")
    torch.testing.assert_close(output(merged), output(adapted))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == stays_tied


def test_an_existing_directory_is_replaced_when_told_to(tmp_path, capsys):
    prepare(tmp_path)
    out = tmp_path / "out"
    # An empty one may be used.
    out.mkdir()
    assert main(argv(tmp_path)) == 0
    before = content(out)
    assert main(argv(tmp_path, "--overwrite", "--dtype", "bf16")) == 0
    assert content(out).keys() == before.keys() and reload(out).dtype == torch.bfloat16
    assert names_in(tmp_path) == ["adapter", "model", "out"]


def half_way(error):
    def save(self, directory, *args, **kwargs):
        (directory / "model.safetensors").write_bytes(b"half")
        raise error

    return save


SAVE, FULL = (transformers.LlamaForCausalLM, "save_pretrained"), OSError("No space left")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(FULL, 1), (KeyboardInterrupt(), 130)], ids=["full disk", "interrupt"]
)
def test_a_run_that_fails_leaves_everything_as_it_was(
    tmp_path, capsys, monkeypatch, error, status, there
):
    prepare(tmp_path)
    assert not there or main(argv(tmp_path)) == 0
    capsys.readouterr()
    before = content(tmp_path)
    monkeypatch.setattr(*SAVE, half_way(error))
    said = fails(capsys, *argv(tmp_path, "--overwrite"), status=status)
    assert status == 130 or "could not be written: No space left" in said
    assert content(tmp_path) == before


def stop_between_the_renames(arguments, dies):
    renames, replace = [], os.replace

    def counted(source, target):
        renames.append(source)
        if len(renames) == 2:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        replace(source, target)

    os.replace = counted
    main(arguments)


@pytest.mark.nightly
@needs_fork
def test_what_an_interrupted_or_killed_merge_left_is_put_right(tmp_path, capsys, monkeypatch):
    prepare(tmp_path)
    assert main(argv(tmp_path)) == 0
    before = content(tmp_path)
    assert (
        in_child(partial(stop_between_the_renames, argv(tmp_path, "--overwrite"), dies=False)) == 0
    )
    assert content(tmp_path) == before
    assert (
        in_child(partial(stop_between_the_renames, argv(tmp_path, "--overwrite"), dies=True))
        == signal.SIGKILL
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(*SAVE, half_way(FULL))
    assert main(argv(tmp_path)) == 1
    assert content(tmp_path) == before


def model_config(**values):
    return lambda path: edit_config(path / "model", "config.json", **values)


def model_weights(change):
    return lambda path: edit_tensors(path / "model", change, "model.safetensors")


def in_adapter(key, factor):
    key = f"base_model.model.{key}"
    return lambda path: edit_tensors(
        path / "adapter", lambda tensors: tensors.update({key: tensors[key] * factor})
    )


def merged_before(path, add=None):
    assert main(argv(path)) == 0
    if add is not None:
        (path / "out" / add).mkdir()


def a_directory_in_place_of_a_file(path):
    merged_before(path)
    file = path / "out" / "tokenizer.json"
    file.unlink()
    file.mkdir()
    (file / "notes").write_text("mine")


def another_model(path):
    make_llama().save_pretrained(path / "out")


A, NAN = f"{WEIGHT}.lora_A.weight", float("nan")
OWN_CODE = model_config(architectures=["NoSuchModel"], auto_map={"AutoModel": "x.y"})
# What is done to the directories, arguments, the exit status and the line.
FAILURES = {
    "a quantized model": (
        model_config(quantization_config={"quant_method": "bitsandbytes"}), "", 2,
        "quantized (bitsandbytes): the sum would have to be quantized anew",
    ),
    "code of the model's own": (
        OWN_CODE, "", 2, "must name a class of transformers, got 'NoSuchModel', and code of its own (auto_map) is not run",
    ),
    "--out is there": (merged_before, "", 2, "--out must be empty or not there, got "),
    "a directory of one's own in --out": (partial(merged_before, add="a"), "--overwrite", 2, "what this command wrote, got "),
    "a directory of a written file's name": (
        a_directory_in_place_of_a_file, "--overwrite", 2, "what this command wrote, got ",
    ),
    "another's model": (another_model, "--overwrite", 2, "/out' with config.json, generation_config"),
    "no config": (lambda path: (path / "model" / "config.json").unlink(), "", 2, "with config.json, got"),
    "a file as --out": (lambda path: (path / "out").write_text(""), "", 2, "--out must be a directory, got the file"),
    "--out in --into": (lambda path: (path / "out").symlink_to(path / "model"), "--overwrite", 2, "--out must not hold"),
    "--out in ADAPTER": (lambda path: (path / "out").symlink_to(path / "adapter"), "--overwrite", 2, "--out must not hold"),
    "NaN in A": (in_adapter(A, NAN), "", 1, f"'{WEIGHT}': merging would give a weight that is not finite"),
    "NaN in a saved module": (in_adapter("lm_head.weight", NAN), "", 1, "must be finite, got lm_head.weight in float32"),
    "beyond float16": (in_adapter(A, 1e6), "--dtype fp16", 1, f"got {WEIGHT}.weight in float16 with values that are not"),
    # transformers would draw the missing weight at random.
    "a weight less": (
        model_weights(lambda tensors: tensors.pop("lm_head.weight")), "", 1,
        "all weights of LlamaForCausalLM, got lm_head.weight missing",
    ),
    "another shape": (
        model_weights(lambda tensors: tensors.update({"lm_head.weight": torch.ones(5, 16)})), "", 1, "can't be loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "more", "status", "message"), FAILURES.values(), ids=FAILURES)
def test_what_is_refused(tmp_path, capsys, damage, more, status, message):
    prepare(tmp_path, modules_to_save=["lm_head"])
    damage(tmp_path)
    capsys.readouterr()
    before = content(tmp_path)
    assert message in fails(capsys, *argv(tmp_path, *more.split()), status=status)
    assert content(tmp_path) == before


def test_without_transformers(tmp_path, capsys, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'stablelora-kernels[cli]'" in fails(capsys, *argv(tmp_path))
