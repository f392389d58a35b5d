"""A family of small Transformers over characters, scaled in width: pretrained on the 42 plays, adapted to headlines.

Two Llama layers of width n with heads of 32; everything else is the same at every width. AdamW trains the base once for each
width, at a learning rate of n^-1/2. A seed draws the adapters and the order of the headlines.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stablelora_kernels as slk
from benchmarks.common import assets
from benchmarks.common.data import load_dataset
from benchmarks.common.models import share
from benchmarks.lab.stability import planted_task
from benchmarks.lab.stability.training import Arm, finite, fit

CHARACTERS, LENGTH, LAYERS, HEAD = 128, 64, 2, 32
# Blocks a step; a step of pretraining has PRETRAINING_BATCH.
BATCH, PRETRAINING_BATCH, PRETRAINING_STEPS = 8, 16, 500
PROBES = (1, 2, 5, 10, 20, 50, 100)
TARGETS = ["q_proj", "v_proj"]


def blocks(text: str) -> Tensor:
    """[blocks, LENGTH] of characters; characters outside ASCII become question marks."""
    ids = torch.tensor(list(text.encode("ascii", errors="replace")))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@cache
def headlines() -> tuple[Tensor, Tensor]:
    """Blocks to train on, and held out."""
    found = load_dataset("sarcasm", seed=0, held_out=1000)
    train, test = ("\n".join(text for text, _ in part) for part in (found.train, found.test))
    return blocks(train), blocks(test)[:128]


def batches(data: Tensor, seed: int, size: int) -> Iterator[Tensor]:
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(data)), len(data))
        for start in range(0, len(order) - size + 1, size):
            yield data[order[start : start + size]]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Nats a character."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def new_model(width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = width // HEAD
    config = LlamaConfig(
        vocab_size=CHARACTERS, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=LENGTH, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@cache
def base(width: int, directory: Path, steps: int = PRETRAINING_STEPS) -> Any:
    """The frozen base, pretrained unless ``directory`` holds it."""
    file = directory / f"base{width}_{steps}.pt"
    model = new_model(width)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 * (64 / width) ** 0.5, fused=True)
        data = batches(torch.cat([blocks(text) for text in assets.plays()]), 0, PRETRAINING_BATCH)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (64 / width) ** 0.5 * min(1.0, (step + 1) / 20) * (1 - step / steps)
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        unfinished.replace(file)
    return model.requires_grad_(False).eval()


class Inputs:
    """The inputs of the adapted layers, by name."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        for name in names:
            modules[name].register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.seen[name] = given[0].detach().flatten(0, -2)

        return keep


def train(
    base_model: Any, seed: int, arm: Arm, lr: float, steps: int, probe: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """As :func:`benchmarks.lab.stability.training.train`."""
    model = share(base_model)
    torch.manual_seed(1000 + seed)
    slk.apply_lora(
        model,
        slk.LoRAConfig(r=planted_task.R, lora_alpha=planted_task.SCALING * planted_task.R, target_modules=TARGETS),
    )
    pairs = slk.lora_pairs(model)
    with torch.no_grad():
        for pair in pairs:
            pair.A.mul_(arm.start)
    seen = Inputs(model, [pair.name for pair in pairs]).seen
    data, held_out = headlines()
    stream = batches(data, seed, BATCH)

    @torch.no_grad()
    def inputs() -> list[Tensor]:
        model(input_ids=held_out[:4])
        return [seen[pair.name] for pair in pairs]

    found, records = fit(pairs, lambda: loss_of(model, next(stream)), inputs, arm, lr, steps, probe)
    with torch.no_grad():
        loss = statistics.fmean(loss_of(model, part).item() for part in held_out.split(32))
    return {"loss": finite(loss), **found}, records
