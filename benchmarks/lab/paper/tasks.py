"""The tasks of ``benchmarks.lab.paper``: batches to train on, a loss, and what is measured on validation and test examples.

Examples are split once, whatever a run's seed: test examples are the same for all runs, validation examples choose the learning
rate. A run's seed shuffles the training examples and draws A.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import assets
from benchmarks.common.data import Batch, Dataset, Example, load_dataset, test_batches, training_batches
from benchmarks.common.models import Classifier

VALIDATION = 600
TEST = 1000


@dataclass(frozen=True)
class Result:
    """Scores on held-out examples. Language modeling has only the loss, in nats per token."""

    loss: float
    accuracy: float | None


@dataclass
class Task:
    """``train``, ``validation`` and ``test`` are examples of the same kind."""

    name: str
    tokenizer: Any
    train: tuple[Any, ...]
    validation: tuple[Any, ...]
    test: tuple[Any, ...]

    def model(self, backbone: Any, seed: int) -> nn.Module:
        """The backbone and its head. Parameters of the head require gradients if they are trained."""
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def evaluate(self, model: nn.Module, examples: tuple[Any, ...]) -> Result:
        raise NotImplementedError


@dataclass
class Classification(Task):
    """A linear head on the mean of the last hidden states."""

    dataset: Dataset

    def model(self, backbone: Any, seed: int) -> nn.Module:
        return Classifier(backbone, backbone.config.hidden_size, len(self.dataset.classes), seed)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        return training_batches(self.dataset, self.tokenizer, batch_size=batch_size, seed=seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), batch["labels"])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: tuple[Example, ...]) -> Result:
        loss, right = 0.0, 0
        for batch in test_batches(replace(self.dataset, test=examples), self.tokenizer, batch_size=64):
            logits = self._logits(model, batch).float()
            loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
            right += int((logits.argmax(1) == batch["labels"]).sum())
        return Result(loss / len(examples), right / len(examples))


class _LastToken(nn.Module):
    """Logits over the vocabulary after the last token of each text; the head is the embedding, as SmolLM2 has it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return F.linear(hidden[torch.arange(len(last)), last], self.backbone.embed_tokens.weight)


@dataclass
class MultipleChoice(Classification):
    """A question as text. Training teaches the right answer's token; the likeliest answer token scores."""

    template: str
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        tokens = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in self.answers]
        if any(len(ids) != 1 for ids in tokens) or len({ids[0] for ids in tokens}) != len(tokens):
            raise ValueError(f"answers must be one token each, all different, got {self.answers} as {tokens}")
        self._tokens = torch.tensor([ids[0] for ids in tokens])
        asked = [tuple((self.template.format(text), label) for text, label in part) for part in self._parts()]
        self.train, self.validation, self.test = asked
        longer = len(self.tokenizer(self.template.format(""))["input_ids"])
        self.dataset = replace(self.dataset, train=self.train, max_tokens=self.dataset.max_tokens + longer)

    def _parts(self) -> tuple[Any, Any, Any]:
        # Cut long headlines here: the tokenizer would cut the question, which comes last. Hardly any is so long.
        limit = 6 * self.dataset.max_tokens
        return tuple(  # type: ignore[return-value]
            tuple((text[:limit], label) for text, label in part) for part in (self.train, self.validation, self.test)
        )

    def model(self, backbone: Any, seed: int) -> nn.Module:
        return _LastToken(backbone)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"]).float()
        return F.cross_entropy(logits, self._tokens[batch["labels"]])

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["input_ids"], batch["attention_mask"])[:, self._tokens]


class _NextToken(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.backbone(input_ids=input_ids).last_hidden_state
        return F.linear(hidden, self.backbone.embed_tokens.weight)


@dataclass
class LanguageModelling(Task):
    """Blocks of tokens of one length."""

    def model(self, backbone: Any, seed: int) -> nn.Module:
        return _NextToken(backbone)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        if batch_size > len(self.train):
            raise ValueError(f"batch_size must be at most the {len(self.train)} training blocks, got {batch_size}")
        rng = random.Random(seed)
        while True:
            order = rng.sample(self.train, len(self.train))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield {"input_ids": torch.stack(order[start : start + batch_size])}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["input_ids"]).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: tuple[Tensor, ...]) -> Result:
        losses = [
            self.loss(model, {"input_ids": torch.stack(examples[start : start + 4])}).item()
            * len(examples[start : start + 4])
            for start in range(0, len(examples), 4)
        ]
        return Result(sum(losses) / len(examples), None)


def _plays(tokenizer: Any, length: int = 128, held_out_blocks: int = 60) -> dict[str, tuple[Tensor, ...]]:
    """Blocks of the 42 plays: whole plays are held out, so that no scene is on both sides."""
    blocks = []
    for text in assets.plays():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        blocks.append(list(ids[: len(ids) // length * length].view(-1, length)))
    rng = random.Random(0)
    order = rng.sample(range(len(blocks)), len(blocks))
    parts = {"validation": order[:4], "test": order[4:8], "train": order[8:]}
    found = {}
    for name, plays in parts.items():
        chosen = [block for play in plays for block in blocks[play]]
        found[name] = tuple(chosen if name == "train" else rng.sample(chosen, held_out_blocks))
    return found


def make_task(name: str, tokenizer: Any, generative: bool) -> Task:
    """``"sarcasm"`` (a question if ``generative``), ``"reuters-52"`` or ``"plays"``."""
    if name == "plays":
        return LanguageModelling(name, tokenizer, **_plays(tokenizer))
    held_out = TEST + VALIDATION if name == "sarcasm" else TEST
    found = load_dataset(name, seed=0, held_out=held_out)
    test, train = found.test[:TEST], found.train
    validation = found.test[TEST:]
    if not validation:
        # The official split is train and test only.
        validation, train = train[:VALIDATION], train[VALIDATION:]
    found = replace(found, train=train, test=test)
    parts = {"train": train, "validation": validation, "test": test}
    if generative and name == "sarcasm":
        # Six tokens beside the fourteen of a headline: a longer question takes longer, on a CPU in proportion.
        template = "{}\nIs this sarcastic?"
        return MultipleChoice(name, tokenizer, **parts, dataset=found, template=template, answers=(" no", " yes"))
    return Classification(name, tokenizer, **parts, dataset=found)
