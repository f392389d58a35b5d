"""Real texts: loading, splitting, and batches that every arm sees in the same order."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import assets

# Sorting windows of this many batches by length removes about a third of the padding and keeps
# batches random.
_WINDOW = 8

Example = tuple[str, int]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dataset:
    """Examples to train on and examples held out, as (text, class index)."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    max_tokens: int

    @property
    def majority(self) -> float:
        """The held-out accuracy of always answering the most frequent class."""
        labels = [label for _, label in self.test]
        return max(labels.count(c) for c in set(labels)) / len(labels)


def load_dataset(name: str, *, seed: int, held_out: int) -> Dataset:
    """``held_out`` test examples and all the training examples of ``name``, shuffled by ``seed``."""
    if name not in assets.DATASETS:
        raise ValueError(f"data must be one of {', '.join(assets.DATASETS)}, got {name!r}")
    if name == "reuters-52":
        # Keep the official split. Training drops texts that are also in the test file.
        train, test = map(_read_tab, assets.fetch(assets.REUTERS))
        classes, length = tuple(sorted({label for _, label in train})), 128
        unseen = {text: classes.index(label) for text, label in test if label in classes}
        rest = _shuffled(
            {text: classes.index(label) for text, label in train if text not in unseen}, seed
        )
        kept = _shuffled(unseen, seed)[:held_out]
    else:
        classes, length, examples = ("sincere", "sarcastic"), 64, {}
        with assets.fetch(assets.SARCASM)[0].open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                # Remove duplicates before the split; otherwise one headline could be on both sides.
                examples.setdefault(record["input"][-1]["content"].strip(), int(record["ideal"]))
        if not 0 < held_out < len(examples):
            raise ValueError(f"held_out must be in [1, {len(examples) - 1}], got {held_out}")
        order = _shuffled(examples, seed)
        kept, rest = order[:held_out], order[held_out:]
    return Dataset(name, classes, tuple(rest), tuple(kept), length)


def _read_tab(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [*csv.reader(file, delimiter="\t")]
    # Orange's format has three header rows (names, types, roles); these files also have blank rows.
    return [(row[1].strip(), row[0]) for row in rows[3:] if len(row) == 2 and row[0]]


def _shuffled(examples: dict[str, int], seed: int) -> list[Example]:
    # Sort first, so that the order depends on the seed alone, not on the file.
    return random.Random(seed).sample(sorted(examples.items()), len(examples))


def collate(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> Batch:
    """One batch, padded on the right to its longest text."""
    texts, labels = zip(*examples, strict=True)
    options = {
        "padding": True,
        "padding_side": "right",
        "truncation": True,
        "max_length": max_tokens,
    }
    encoded = tokenizer([*texts], **options, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {
        "labels": torch.tensor(labels)
    }


def training_batches(
    dataset: Dataset, tokenizer: Any, *, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Endless batches: a new shuffle each epoch, texts of similar length together."""
    if batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size must be at most the {len(dataset.train)} training examples, got {batch_size}"
        )
    rng = random.Random(seed)
    while True:
        order = rng.sample(dataset.train, len(dataset.train))
        for start in range(0, len(order), batch_size * _WINDOW):
            window = sorted(
                order[start : start + batch_size * _WINDOW], key=lambda example: len(example[0])
            )
            batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            rng.shuffle(batches)
            # Skip a short last batch: its step time does not compare.
            yield from (
                collate(each, tokenizer, dataset.max_tokens)
                for each in batches
                if len(each) == batch_size
            )


def test_batches(dataset: Dataset, tokenizer: Any, *, batch_size: int) -> Iterator[Batch]:
    """The held-out examples once, sorted by length: fewer pads, and the same order for every arm."""
    order = sorted(dataset.test, key=lambda example: (len(example[0]), example[0]))
    for start in range(0, len(order), batch_size):
        yield collate(order[start : start + batch_size], tokenizer, dataset.max_tokens)


def split_tokens(
    text: str, tokenizer: Any, length: int, held_out: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``text`` as one row of tokens to train on, and up to ``held_out`` rows of ``length`` tokens
    from its last twentieth.

    Raises:
        ValueError: the last twentieth is shorter than ``length``.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    last = tokens[len(tokens) - len(tokens) // 20 :]
    if length < 2 or len(last) < length:
        raise ValueError(
            f"length must be from 2 to a twentieth of the text's {len(tokens)} tokens, got {length}"
        )
    rows = min(held_out, len(last) // length)
    return tokens[: -len(last)], last[: rows * length].view(rows, length)
