"""Every example: misuse and resuming by its main(), interrupts and many processes as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

for module in ("transformers", "peft", "accelerate", "safetensors", "tqdm"):
    pytest.importorskip(module, reason="the test extra brings what examples import")

from safetensors.torch import load_file  # noqa: E402

from examples import finetune, peft_trainer, replace_linear, tutorial  # noqa: E402
from tests.helpers.processes import ROOT, needs_gloo  # noqa: E402
from tests.helpers.small_models import llama  # noqa: E402

# 336 numbers train; at this rate pairs latch on both sides of the checkpoint.
SMALL = ["--steps", "6", "--save-every", "3", "--rank", "3", "--lr", "0.1"]
LANGUAGE = [*SMALL, "--length", "16", "--batch-size", "8", "--shrink-ratio", "0.2"]
TRAINER = [*LANGUAGE, "--batch-size", "4", "--gradient-accumulation", "2", "--dropout", "0"]
PASSAGES = [*SMALL, "--batch-size", "4", "--target-modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny random Llama with a tokenizer of bytes, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("files")
    marks = ["<pad>", "<s>", "</s>"]
    words = {word: i for i, word in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = dict(zip(("pad_token", "bos_token", "eos_token"), marks, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(place / "model")
    torch.manual_seed(0)
    llama(vocab_size=len(words), pad_token_id=0, tie_word_embeddings=True).save_pretrained(place / "model")
    lines = [f"{word} and {word} and {other}, said the {other}.\n" for word in "abcdefghij" for other in "klmnopqrst"]
    (place / "text").write_text("".join(lines))
    return ["--model", str(place / "model"), "--text", str(place / "text")]


def command(example: str, arguments: list[Any], processes: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, *launcher, "-m", f"examples.{example}", *map(str, arguments)]


def run(example: str, arguments: list[Any], processes: int = 0) -> str:
    done = subprocess.run(command(example, arguments, processes), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_file(one: Path, other: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    assert any(value.any() for key, value in adapter(one).items() if "lora_B" in key)


def cut_off(whole: Path, out: Path, *kept: str) -> Path:
    """What a run would have left if it had been interrupted behind its first checkpoint."""
    out.mkdir()
    for name in kept:
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, out / name)
    return out


@pytest.fixture(scope="module")
def alone(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    finetune.main([*files, *LANGUAGE, "--dropout", "0.1", "--out", str(out)])
    return out


# One process: to the bit


def test_finetune_resumes(files: list[str], alone: Path, tmp_path: Path, capsys) -> None:
    out = cut_off(alone, tmp_path / "cut", "step-000003", "settings.json")
    # A checkpoint without its .metadata was interrupted while it was written.
    (out / "step-000006").mkdir()
    finetune.main([*files, *LANGUAGE, "--dropout", "0.1", "--out", str(out), "--resume"])
    printed = capsys.readouterr().out
    assert "step 3: held-out loss" in printed and "step 0:" not in printed and "4 of 4 pairs latched" in printed
    assert_same_file(out, alone)


@pytest.mark.nightly
def test_finetune_interrupted(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # So many steps that it cannot end before it is interrupted.
    line = command("finetune", [*files, *LANGUAGE, "--steps", "100000", "--out", out])
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # A shell's background jobs ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        while not (out / "step-000003" / ".metadata").exists():
            # The progress bar goes on.
            assert process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130, errors[-3000:]
    assert errors.rstrip().endswith("interrupted; --resume goes on from the last checkpoint")


@pytest.mark.nightly
def test_peft_trainer_resumes(files: list[str], tmp_path: Path) -> None:
    whole, usual = tmp_path / "whole", [*files, *TRAINER]
    printed = run("peft_trainer", [*usual, "--out", whole])
    assert "4 of 4 pairs latched" in printed and "'eval_loss': '5." in printed
    out = cut_off(whole, tmp_path / "cut", "checkpoint-3")
    # The next one was being written when the run was killed.
    (out / "checkpoint-6").mkdir()
    shutil.copy(whole / "checkpoint-6" / "adapter_config.json", out / "checkpoint-6")
    run("peft_trainer", [*usual, "--out", out, "--resume"])
    assert_same_file(out, whole)
    if dist.is_available() and dist.is_gloo_available() and sys.platform == "linux":
        # Two processes take at once what one has taken in two parts; the Trainer puts the model in DDP.
        run("peft_trainer", [*usual, "--gradient-accumulation", "1", "--out", tmp_path / "two"], processes=2)
        assert_near(tmp_path / "two", whole)


@pytest.mark.parametrize("left", [None, "", '{"glob'], ids=["no state", "an empty one", "half of it"])
def test_peft_trainer_passes_over_a_half_written_checkpoint(left: str | None, tmp_path: Path, capsys) -> None:
    for step, state in ((3, '{"global_step": 3}'), (20, left)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert peft_trainer.last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert capsys.readouterr().err == "checkpoint-20 is not whole and is passed over\n"
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"global_step": 20}')
    assert peft_trainer.last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"
    assert peft_trainer.last_checkpoint(tmp_path / "none") is None


def test_replace_linear_resumes_and_merges(files: list[str], tmp_path: Path, capsys) -> None:
    from transformers import AutoModel

    whole, out = tmp_path / "whole", tmp_path / "cut"
    replace_linear.main([*files, *PASSAGES, "--out", str(whole)])
    printed = capsys.readouterr().out
    assert "4 modules merged" in printed and "unmerged, the outputs are the same to the bit" in printed
    assert float(printed.split("differ by at most ")[1].split()[0]) < 1e-5
    assert not any("lora" in name for name in AutoModel.from_pretrained(whole / "merged").state_dict())
    # Its checkpoint is one file, which a shorter run leaves behind.
    replace_linear.main([*files, *PASSAGES, "--steps", "3", "--out", str(out)])
    replace_linear.main([*files, *PASSAGES, "--out", str(out), "--resume"])
    assert_same_file(out, whole)


def test_tutorial(files: list[str], tmp_path: Path, capsys) -> None:
    """It learns, and the saved adapter has the trained model's loss."""
    pytest.importorskip("matplotlib", reason="draws the plots; the bench extra brings it")
    out = tmp_path / "out"
    tutorial.main([*files, "--out", str(out), "--steps", "8"])
    printed = capsys.readouterr().out
    losses = {
        line.split(":")[0]: float(line.split("held-out loss ")[1][:5])
        for line in printed.splitlines()
        if "held-out" in line
    }
    assert losses["after"] < losses["before"]
    assert losses["loaded"] == losses["merged"] == losses["after"]
    assert "step 8: loss" in printed and "of 14 pairs have latched" in printed
    assert len((out / "stability.csv").read_text().splitlines()) == 1 + 8 * 14
    for name in ("stability.png", "latches.png"):
        assert (out / name).stat().st_size > 1000


# Many processes: equal to one, whichever engine and number of processes wrote the checkpoint


def assert_near(one: Path, other: Path) -> None:
    """Gradients are averaged in another order."""
    found, expected = adapter(one), adapter(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# By day, tests/optim trains and resumes in several processes.
@needs_gloo
@pytest.mark.nightly
@pytest.mark.parametrize(("first", "then"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_finetune_on_two_processes_resumed_on_four(files: list[str], tmp_path: Path, first: str, then: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run("finetune", [*files, *LANGUAGE, "--out", one])
    arguments = [*files, *LANGUAGE, "--checkpointing", "--gradient-accumulation", "2"]
    printed = run("finetune", [*arguments, "--out", two, "--distributed", first], processes=2)
    assert printed.count("held-out loss") == 2
    four = cut_off(two, tmp_path / "four", "step-000003", "settings.json")
    run("finetune", [*arguments, "--out", four, "--distributed", then, "--resume"], processes=4)
    for out in (two, four):
        assert_near(out, one)
        assert latches(out) == latches(one)
    assert len(set(latches(one).values())) > 1


def latches(out: Path) -> dict[str, int]:
    """The step at which each pair latched, from a checkpoint, whoever wrote it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(out / "step-000006", out / "step-000006.pt")
    state = torch.load(out / "step-000006.pt", weights_only=False)["optimizer"]["state"]
    return {name: int(entry["latched_at"]) for name, entry in state.items() if "latched_at" in entry}


# Misuse: one line that says what is wrong, before anything is written


LANGUAGE_ERRORS = {
    "--steps 0": "--steps must be at least 1, got 0",
    "--length 1": "--length must be from 2 to a twentieth of the text's",
    "--length 9999": "--length must be from 2 to a twentieth of the text's",
    "--model tests": "--model must be smollm2, minilm, a local directory or a hub id, got tests: ",
    "--text nowhere.txt": "--text must be a text file, got nowhere.txt",
    "--target-modules nothing": "nothing",
    "--resume": "--resume needs a checkpoint in --out",
}
FINETUNE_ERRORS = {
    "--batch-size 3 --gradient-accumulation 2": "a multiple of 1 processes x 2 parts, got 3",
    "--distributed fsdp": "--distributed fsdp needs torchrun --nproc-per-node N",
    "--distributed tpu": "invalid choice: 'tpu'",
}
PASSAGE_ERRORS = {
    "--batch-size 1": "--batch-size must be at least 2, got 1",
    "--batch-size 99": "--text must have 396 passages of 4 lines, got 25",
    "--target-modules nothing": "--target-modules: target_modules must match an nn.Linear of the model",
    "--resume": "has none: leave --resume out",
}
MISUSE = [(finetune, LANGUAGE, arguments) for arguments in (LANGUAGE_ERRORS | FINETUNE_ERRORS).items()]
MISUSE += [(peft_trainer, LANGUAGE, arguments) for arguments in LANGUAGE_ERRORS.items()]
MISUSE += [(replace_linear, PASSAGES, arguments) for arguments in PASSAGE_ERRORS.items()]
MISUSE += [(tutorial, [], ("--steps 0", "--steps"))]


@pytest.mark.parametrize(
    ("example", "usual", "error"), MISUSE, ids=[f"{example.__name__} {error[0]}" for example, _, error in MISUSE]
)
def test_misuse(example, usual, error, files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, message = error
    with pytest.raises(SystemExit) as raised:
        example.main([*files, *usual, "--out", str(tmp_path / "out"), *arguments.split()])
    code = raised.value.code
    assert code != 0 and message in (capsys.readouterr().err if code == 2 else str(code))
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_mixed_with_another(files: list[str], alone: Path, monkeypatch) -> None:
    before = sorted(alone.iterdir())
    usual = [*files, *LANGUAGE, "--dropout", "0.1", "--out", str(alone)]
    for arguments, message in (
        ([], "holds step-000006 of another run: --resume it, or name another directory"),
        (["--resume", "--lr", "0.2"], "--lr was 0.1 in .*, got 0.2"),
        (["--resume", "--rank", "4"], "--rank was 3 in .*, got 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            finetune.main([*usual, *arguments])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        finetune.main([*usual, "--resume"])
    with pytest.raises(SystemExit):
        tutorial.main([*files, "--out", str(alone)])
    assert sorted(alone.iterdir()) == before


# Where and how a user runs them


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python sees the installed package and not the repository."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "stablelora_kernels").symlink_to(ROOT / "stablelora_kernels")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}


@pytest.mark.nightly
@pytest.mark.parametrize("program", ["finetune", "peft_trainer", "replace_linear", "tutorial", "cluster_plan"])
def test_by_its_path_from_any_directory(program: str, tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """--help comes after all imports."""
    line = [sys.executable, ROOT / "examples" / f"{program}.py", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.returncode == 0 and f"usage: {program}" in done.stdout, done.stderr


@pytest.mark.download
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        # Few tokens in bfloat16: without AVX-512, a CPU takes a second for each.
        ("finetune", ["--batch-size", "2", "--length", "32", "--text", ROOT / "README.md"]),
        ("peft_trainer", ["--batch-size", "1", "--length", "16", "--text", ROOT / "README.md", "--bf16"]),
        ("replace_linear", ["--batch-size", "8"]),
    ],
)
def test_with_the_real_model(example: str, arguments: list[Any], tmp_path: Path) -> None:
    printed = run(example, [*arguments, "--steps", "2", "--save-every", "1", "--out", tmp_path / "out"])
    assert f"adapter in {tmp_path / 'out' / 'adapter'}" in printed


def test_the_file_to_copy_runs_outside_the_clone(files: list[str], tmp_path: Path, elsewhere: dict[str, str]) -> None:
    """It learns, and PEFT loads what it saves."""
    import peft
    from transformers import AutoModelForCausalLM

    shutil.copy(ROOT / "examples" / "one_file.py", tmp_path)
    arguments = [*files, "--out", str(tmp_path / "run"), "--steps", "20", "--length", "16", "--lr", "1e-2"]
    line = [sys.executable, "one_file.py", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("held-out loss")]
    before, after = (float(line.split(word)[0].split()[-1].strip(",")) for word in (" before", " after"))
    assert after < before - 0.1, line
    assert "LoRA on 14 modules" in done.stdout and "2 x gated MLP (silu)" in done.stdout
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files[1]), tmp_path / "run" / "adapter")
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
