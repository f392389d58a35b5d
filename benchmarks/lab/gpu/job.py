"""The main job on this GPU: ``python -m benchmarks``, one seed of a fine-tuning run by every arm.

pytest runs it as a section of ``benchmarks.lab.gpu``. Its files go to ``job/`` beside the rows. A
dry run trains a tiny model with random weights on the README.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import assets
from benchmarks.common.records import read_records
from benchmarks.lab.gpu.rows import NOTE_LENGTH, ROOT
from benchmarks.lab.gpu.times import DRY

# 2,048 tokens a step: with the command's own 128, a GPU waits for Python.
ON_A_GPU = "--device cuda --batch-size 8 --length 256 --seeds 1 --steps 30"
DRY_RUN = "--device cpu --dtype fp32 --batch-size 2 --length 8 --held-out 2 --seeds 1 --steps 1"
# An interrupted run writes what it has measured, which takes a while.
TO_WRITE_S = 20.0
END = time.monotonic() + float(os.environ.get("SLK_GPU_SECONDS", "600")) - TO_WRITE_S


def tiny_model(directory: Path) -> Path:
    """Write a small Llama with random weights, and a tokenizer of bytes, into ``directory``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def options(scratch: Path) -> list[str]:
    """The command's options. Skip the test if the model or the text cannot be had."""
    if DRY:
        model = tiny_model(scratch / "model")
        return [*DRY_RUN.split(), "--model", str(model), "--data", str(ROOT / "README.md")]
    try:
        for asset in (assets.SMOLLM2, assets.SHAKESPEARE):
            assets.fetch(asset)
    except assets.AssetError as error:
        pytest.skip(str(error))
    return ON_A_GPU.split()


def test_job(tmp_path: Path, request: Any, record_property: Any) -> None:
    out = request.config.getoption("--rows").parent / "job"
    # An earlier run's figures must not pass for this one's.
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks", "--out", str(out), *options(tmp_path)]
    begun = time.monotonic()
    printed = tmp_path / "printed.txt"
    with printed.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            status = process.wait(max(1.0, END - begun))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            status = process.wait()
    note = f"{' '.join(command[2:])}: {time.monotonic() - begun:.0f} s, exit status {status}"
    # 130: interrupted, with the figures so far.
    assert status in (0, 130) and (out / "result.csv").exists(), (
        f"{note}\n{printed.read_text(errors='replace')}"[-NOTE_LENGTH:]
    )
    case = "a tiny Llama" if DRY else "SmolLM2-135M"
    for row in json.loads(read_records(out / "result.csv").to_json(orient="records")):
        record_property("row", row | {"case": case, "note": note})
