"""What the arms learn: the next token of a text, or a text's class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.common import assets
from benchmarks.common.data import DATASETS, Batch, load_dataset, split_tokens, test_batches, training_batches
from benchmarks.common.models import Classifier, NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAYS = "plays"
_TEST_BATCH = 16


@dataclass(frozen=True)
class Head:
    """What turns a backbone into a model whose ``forward(input_ids, attention_mask)`` gives logits [labels, classes].

    ``classes`` is None for a causal language model, which has a pretrained head.
    """

    classes: int | None = None

    def put_on(self, model: nn.Module, hidden_size: int, seed: int) -> nn.Module:
        return NextToken(model) if self.classes is None else Classifier(model, hidden_size, self.classes, seed)


@dataclass(frozen=True)
class Task:
    """Batches to train on and held-out batches. Each has input_ids, attention_mask and the labels of the model's logits."""

    name: str
    head: Head
    held_out: list[Batch]
    # The held-out accuracy of always answering the most frequent class; None for next tokens.
    majority: float | None

    @property
    def metric(self) -> str:
        """The figure of merit of the held-out batches: "loss" or "accuracy"."""
        return "loss" if self.majority is None else "accuracy"

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless batches in an order that ``seed`` decides."""
        raise NotImplementedError


@dataclass(frozen=True)
class NextTokens(Task):
    """Random pieces of a text, each token to be predicted from those before it."""

    tokens: torch.Tensor
    batch_size: int
    length: int

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.tokens) - self.length, (self.batch_size,), generator=generator).tolist()
            yield _shifted(torch.stack([self.tokens[start : start + self.length + 1] for start in starts]))


def _shifted(rows: torch.Tensor) -> Batch:
    inputs = rows[:, :-1].contiguous()
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": rows[:, 1:].flatten()}


@dataclass(frozen=True)
class Classes(Task):
    """Texts of a data set and their classes."""

    dataset: Any
    tokenizer: Any
    batch_size: int

    def batches(self, seed: int) -> Iterator[Batch]:
        return training_batches(self.dataset, self.tokenizer, batch_size=self.batch_size, seed=seed)


def is_causal(data: str) -> bool:
    """Whether the task on ``data`` needs a causal language model."""
    return data not in DATASETS


def open_task(
    data: str, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, length: int, held_out: int, seed: int
) -> Task:
    """The task on ``data``: "plays" or a text file for next tokens, "sarcasm" or "reuters-52" for classes.

    ``length`` is the tokens of a piece of a text, ``held_out`` the number of pieces or texts to test on; ``seed`` draws those
    of "sarcasm".

    Raises:
        AssetError: the data can't be had.
        ValueError: the text is too short, or there are fewer texts than ``held_out``.
    """
    if is_causal(data):
        text = "\n".join(assets.plays()) if data == PLAYS else Path(data).expanduser().read_text(encoding="utf-8")
        tokens, rows = split_tokens(text, tokenizer, length + 1, held_out)
        return NextTokens(
            data, Head(), [_shifted(part) for part in rows.split(_TEST_BATCH)], None, tokens, batch_size, length
        )
    dataset = load_dataset(data, seed=seed, held_out=held_out)
    test = list(test_batches(dataset, tokenizer, batch_size=4 * _TEST_BATCH))
    return Classes(data, Head(len(dataset.classes)), test, dataset.majority, dataset, tokenizer, batch_size)


def hidden_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size
