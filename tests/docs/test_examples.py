"""Every example: misuse and resuming by its main(), interrupts and many processes as a user runs
it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

for module in ("transformers", "peft", "accelerate", "safetensors", "tqdm"):
    pytest.importorskip(module, reason=f"runs where {module} is installed: pip install .[test]")

from safetensors.torch import load_file  # noqa: E402

from examples import (  # noqa: E402
    finetune,
    grpo_head,
    learning_rates,
    peft_trainer,
    replace_linear,
    tutorial,
)
from tests.helpers.processes import ROOT, answer_of, needs_gloo  # noqa: E402
from tests.helpers.small_models import llama  # noqa: E402

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="runs on systems whose processes can be forked and killed"
)
# What actions import, once for all of them; what is not installed is left out.
PRELOAD = [
    "stablelora_kernels",
    "safetensors.torch",
    "tests.helpers.small_models",
    "examples.replace_linear",
]


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action``, which can be pickled, in another process. Return the signal that killed it,
    or 0; raise what it raised.

    The process is forked from one that has imported much and run nothing: in a fork of this one,
    torch's threads would be missing, and their locks held.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    return answer_of(action, "forkserver")[1]


def kills(
    action: Callable[[], Any], prepare: Callable[[], Any], first: int = 1, every: int = 1
) -> Iterator[None]:
    """Prepare, run ``action`` in a process that is killed before its file operation ``first``, and
    yield; then ``every`` later.

    And so on: the last one lives. Deterministic: Python's audit events are counted.
    """
    for limit in range(first, 1000, every):
        prepare()
        killed = in_child(partial(_killed_at, limit, action))
        assert killed in (0, signal.SIGKILL)
        yield
        if not killed:
            return
    raise AssertionError("the action never ends")


def _killed_at(limit: int, action: Callable[[], Any]) -> None:
    count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal count
        count += event == "open" or event.startswith(("os.", "shutil.", "fcntl."))
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    action()


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
    words = {
        word: i for i, word in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = dict(zip(("pad_token", "bos_token", "eos_token"), marks, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(place / "model")
    torch.manual_seed(0)
    llama(vocab_size=len(words), pad_token_id=0, tie_word_embeddings=True).save_pretrained(
        place / "model"
    )
    lines = [
        f"{word} and {word} and {other}, said the {other}.\n"
        for word in "abcdefghij"
        for other in "klmnopqrst"
    ]
    (place / "text").write_text("".join(lines))
    return ["--model", str(place / "model"), "--text", str(place / "text")]


def run(example: str, arguments: list[Any], processes: int = 0) -> str:
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    )
    line = [sys.executable, *launcher, "-m", f"examples.{example}", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-12000:]
    return done.stdout


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path) -> None:
    """To the bit. The order of the header's metadata, which safetensors draws, may differ."""
    found, expected = adapter(one), adapter(other)
    assert found.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in found.items())
    assert any(value.any() for key, value in found.items() if "lora_B" in key)


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


def test_finetune_resumes(files: list[str], alone: Path, tmp_path: Path, capsys) -> None:
    out = cut_off(alone, tmp_path / "cut", "step-000003", "settings.json")
    # A checkpoint without its .metadata was interrupted while it was written.
    (out / "step-000006").mkdir()
    finetune.main([*files, *LANGUAGE, "--dropout", "0.1", "--out", str(out), "--resume"])
    printed = capsys.readouterr().out
    assert (
        "step 3: held-out loss" in printed
        and "step 0:" not in printed
        and "4 of 4 pairs latched" in printed
    )
    assert_same_adapter(out, alone)


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
    assert_same_adapter(out, whole)


def test_peft_trainer_passes_over_a_half_written_checkpoint(tmp_path: Path, capsys) -> None:
    for step, state in ((3, '{"global_step": 3}'), (20, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert peft_trainer.last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert capsys.readouterr().err == "checkpoint-20 is not whole and is passed over\n"


def test_replace_linear_resumes_and_merges(files: list[str], tmp_path: Path, capsys) -> None:
    from transformers import AutoModel

    whole, out = tmp_path / "whole", tmp_path / "cut"
    replace_linear.main([*files, *PASSAGES, "--out", str(whole)])
    printed = capsys.readouterr().out
    assert "unmerged, the outputs are the same to the bit" in printed
    assert float(printed.split("differ by at most ")[1].split()[0]) < 1e-5
    assert not any(
        "lora" in name for name in AutoModel.from_pretrained(whole / "merged").state_dict()
    )
    # Its checkpoint is one file, which a shorter run leaves behind.
    replace_linear.main([*files, *PASSAGES, "--steps", "3", "--out", str(out)])
    replace_linear.main([*files, *PASSAGES, "--out", str(out), "--resume"])
    assert_same_adapter(out, whole)


@needs_fork
@pytest.mark.nightly
def test_replace_linear_killed_while_it_saves(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"

    def prepare() -> None:
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        replace_linear.save_checkpoint({"step": 1}, file)

    save = partial(replace_linear.save_checkpoint, {"step": 2}, file)
    steps = [torch.load(file, weights_only=True)["step"] for _ in kills(save, prepare)]
    assert steps == sorted(steps) and set(steps) == {1, 2}


def test_tutorial(files: list[str], tmp_path: Path, capsys) -> None:
    """It learns, and the saved adapter has the trained model's loss."""
    pytest.importorskip(
        "matplotlib", reason="runs where matplotlib is installed: pip install .[bench]"
    )
    out = tmp_path / "out"
    tutorial.main([*files, "--out", str(out), "--steps", "8"])
    printed = capsys.readouterr().out
    lines = [line.split(": ", 1) for line in printed.splitlines() if "held-out" in line]
    losses = {when: float(found.split("held-out loss ")[1][:5]) for when, found in lines}
    assert losses["after"] < losses["before"]
    assert losses["loaded"] == losses["merged"] == losses["after"]
    assert len((out / "stability.csv").read_text().splitlines()) == 1 + 8 * 14


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
def test_finetune_on_two_processes_resumed_on_four(
    files: list[str], tmp_path: Path, first: str, then: str
) -> None:
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
    return {
        name: int(entry["latched_at"]) for name, entry in state.items() if "latched_at" in entry
    }


MISUSE = [
    (finetune, "--steps 0", "--steps must be at least 1, got 0"),
    (finetune, "--length 9999", "--length must be from 2 to a twentieth of the text's"),
    (
        finetune,
        "--model tests",
        "must be smollm2, minilm, a local directory or a hub id, got tests: ",
    ),
    (finetune, "--text nowhere.txt", "--text must be a text file, got nowhere.txt"),
    (
        finetune,
        "--batch-size 3 --gradient-accumulation 2",
        "a multiple of 1 processes x 2 parts, got 3",
    ),
    (finetune, "--distributed fsdp", "--distributed fsdp needs torchrun --nproc-per-node N"),
    (finetune, "--resume", "--resume needs a checkpoint in --out"),
    (peft_trainer, "--resume", "--resume needs a checkpoint in --out"),
    (replace_linear, "--batch-size 99", "--text must have 396 passages of 4 lines, got 25"),
    (
        replace_linear,
        "--target-modules nothing",
        "target_modules must match an nn.Linear of the model",
    ),
    (replace_linear, "--resume", "has none: leave --resume out"),
]


@pytest.mark.parametrize(("example", "wrong", "message"), MISUSE)
def test_misuse_is_named_before_anything_is_written(
    example, wrong, message, files, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(ROOT)
    usual = PASSAGES if example is replace_linear else LANGUAGE
    with pytest.raises(SystemExit) as raised:
        example.main([*files, *usual, "--out", str(tmp_path / "out"), *wrong.split()])
    # argparse prints its message; the examples exit with theirs.
    assert raised.value.code and message in f"{raised.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_mixed_with_another(files: list[str], alone: Path) -> None:
    before = sorted(alone.iterdir())
    usual = [*files, *LANGUAGE, "--dropout", "0.1", "--out", str(alone)]
    for arguments, message in (
        ([], "holds step-000006 of another run: --resume it, or name another directory"),
        (["--resume", "--lr", "0.2"], "--lr was 0.1 in .*, got 0.2"),
    ):
        with pytest.raises(SystemExit, match=message):
            finetune.main([*usual, *arguments])
    assert sorted(alone.iterdir()) == before


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python sees the installed package and not the repository."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "stablelora_kernels").symlink_to(ROOT / "stablelora_kernels")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}


@pytest.mark.nightly
@pytest.mark.parametrize("program", ["finetune", "peft_trainer", "replace_linear", "tutorial"])
def test_by_its_path_from_any_directory(
    program: str, tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """--help comes after all imports."""
    line = [sys.executable, ROOT / "examples" / f"{program}.py", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.returncode == 0 and f"usage: {program}" in done.stdout, done.stderr


@pytest.mark.nightly
def test_the_file_to_copy_runs_outside_the_clone(
    files: list[str], tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """It learns, and PEFT loads what it saves."""
    import peft
    from transformers import AutoModelForCausalLM

    shutil.copy(ROOT / "examples" / "one_file.py", tmp_path)
    arguments = [
        *files,
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "20",
        "--length",
        "16",
        "--lr",
        "1e-2",
    ]
    line = [sys.executable, "one_file.py", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("held-out loss")]
    before, after = (
        float(line.split(word)[0].split()[-1].strip(",")) for word in (" before", " after")
    )
    assert after < before - 0.1, line
    assert "LoRA on 14 modules" in done.stdout and "2 x gated MLP (silu)" in done.stdout
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(files[1]), tmp_path / "run" / "adapter"
    )
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


# Starts the example and saves what each process has trained.
OF_EACH_PROCESS = """
import os, torch, transformers
train = transformers.Trainer.train
def train_and_save(trainer):
    train(trainer)
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save(trained, f"trained-{os.environ['RANK']}")
transformers.Trainer.train = train_and_save
import one_file
one_file.main()
"""


@pytest.mark.nightly
@needs_gloo
def test_the_file_to_copy_trains_one_adapter_in_many_processes(
    files: list[str], tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    """evaluate() before train() would leave each process to its own gradients."""
    shutil.copy(ROOT / "examples" / "one_file.py", tmp_path)
    (tmp_path / "start.py").write_text(OF_EACH_PROCESS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    small = ["--steps", "4", "--length", "16", "--out", str(tmp_path / "run")]
    line = [sys.executable, *launcher, "start.py", *files, *small]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=elsewhere)
    assert done.returncode == 0, done.stderr[-8000:]
    first, second = (torch.load(tmp_path / f"trained-{rank}") for rank in range(2))
    assert first.keys() == second.keys() and any(p.any() for n, p in first.items() if "lora_B" in n)
    assert all(p.equal(second[name]) for name, p in first.items())
    assert done.stdout.count("held-out loss") == 1
    (saved,) = (tmp_path / "run" / "adapter").glob("adapter_model.safetensors")
    assert all(
        value.equal(first[name.replace(".weight", ".default.weight")])
        for name, value in load_file(saved).items()
    )


def test_learning_rates_trains_eight_adapters(files: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    small = ["--steps", "3", "--length", "16", "--rank", "2", "--out", str(out)]
    learning_rates.main([*files, *small])
    printed = capsys.readouterr().out
    rates = [f"{rate:g}: " for rate in learning_rates.RATES]
    assert len(rates) == 8 and all(rate in printed.splitlines()[1] for rate in rates)
    (best,) = [path for path in out.iterdir() if path.is_dir()]
    assert f"best learning rate {learning_rates.RATE_OF[best.name]:g}, held-out loss" in printed
    weights = load_file(best / "adapter_model.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        learning_rates.main([*files, *small])
    assert "--out must be a new directory" in capsys.readouterr().err


def test_grpo_with_an_adapter_on_the_head_learns() -> None:
    """And its first ratios are exactly 1, or it raises."""
    rewards = grpo_head.main(["--steps", "6"])
    assert len(rewards) == 6 and rewards[0] < 0.6 < rewards[-1]
