"""The tasks of ``benchmarks.research paper``: batches with the labels of a model's logits.

Examples are split once, whatever a run's seed: test examples are the same for all runs, validation
examples choose the learning rate. A run's seed shuffles the training examples and draws A.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import assets
from benchmarks.common.data import Batch, load_dataset, test_batches, training_batches
from benchmarks.common.models import Classifier, NextToken

VALIDATION, TEST, LENGTH = 600, 1000, 128


class Task(NamedTuple):
    model: Callable[[Any, int], nn.Module]  # of the backbone and a seed
    batches: Callable[[int, int], Iterator[Batch]]  # to train on, of a batch size and a seed
    validation: Sequence[Batch]
    test: Sequence[Batch]


def classes(name: str, tokenizer: Any) -> Task:
    """Each text's class from the mean of the last hidden states, of ``"sarcasm"`` or
    ``"reuters-52"``.
    """
    dataset = load_dataset(name, seed=0, held_out=TEST + VALIDATION if name == "sarcasm" else TEST)
    parts = [dataset.test[TEST:], dataset.test[:TEST]]
    if not parts[0]:
        # The official split is train and test only.
        parts[0] = dataset.train[:VALIDATION]
        dataset = replace(dataset, train=dataset.train[VALIDATION:])
    return Task(
        lambda backbone, seed: Classifier(
            backbone, backbone.config.hidden_size, len(dataset.classes), seed
        ),
        lambda size, seed: training_batches(dataset, tokenizer, batch_size=size, seed=seed),
        *(
            list(test_batches(replace(dataset, test=part), tokenizer, batch_size=64))
            for part in parts
        ),
    )


def plays(tokenizer: Any, held_out_blocks: int = 60) -> Task:
    """The next tokens of blocks of the 42 plays: whole plays are held out, so that no scene is on
    both sides.
    """
    found = [
        torch.tensor(tokenizer(text)["input_ids"]).unfold(0, LENGTH, LENGTH)
        for text in assets.plays()
    ]
    rng = random.Random(0)
    order = rng.sample(found, len(found))
    validation, test, train = (torch.cat(part) for part in (order[:4], order[4:8], order[8:]))
    held_out = [part[rng.sample(range(len(part)), held_out_blocks)] for part in (validation, test)]
    return Task(
        lambda backbone, _seed: NextToken(backbone),
        lambda size, seed: map(labeled, shuffled(train, size, seed)),
        *([labeled(rows) for rows in part.split(4)] for part in held_out),
    )


def labeled(ids: Tensor) -> Batch:
    """The next token is the label. The last one has none, which is -100."""
    labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def shuffled(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of rows, in a new order each epoch."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        yield from (
            rows[order[start : start + size]] for start in range(0, len(order) - size + 1, size)
        )
