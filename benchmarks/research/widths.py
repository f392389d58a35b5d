"""What ``benchmarks.research stability`` trains at many widths: a planted task, and small
Transformers.

The planted task is as difficult at every width: find a change of low rank in one frozen layer.
Inputs x [32] are normal. Frozen, with n features: z = sqrt(2) relu(W_in x), the layer y = W0 z, and
a readout f = R^T relu(y) / n of 8 outputs. The target is the same network with W0 + U V^T / n, of
rank 4, whose U lies in the span of R and whose V in that of W_in, so that it changes y and f by
Theta(1) at every n. All that precedes the adapter on W0 is frozen, so z and W0 z are computed once.

The Transformers have two Llama layers of width n, heads of 32, and characters as tokens. AdamW
trains a base on the 42 plays once for each width (and process), at a learning rate of n^-1/2;
adapters on the query and value projections learn headlines.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stablelora_kernels as slk
from benchmarks.common import assets
from benchmarks.common.data import load_dataset
from benchmarks.common.models import share
from benchmarks.research.tasks import shuffled
from stablelora_kernels.functional import lora_branch

R, SCALING = 8, 2.0
INPUTS, OUTPUTS, PLANTED_RANK = 32, 8, 4
TRAIN, HELD_OUT, BATCH = 1024, 256, 64
CHARACTERS, LENGTH, LAYERS, HEAD = 128, 64, 2, 32
BLOCKS, PRETRAINING_BLOCKS, PRETRAINING_STEPS = 8, 16, 500


class Problem(NamedTuple):
    """What one run trains."""

    pairs: Sequence[slk.LoRAPair]
    step_loss: Callable[[], Tensor]  # of the next batch
    inputs: Callable[
        [], Sequence[Tensor]
    ]  # of each pair's layer for held-out examples, [samples, n]
    held_out_loss: Callable[[], float]


class Planted(NamedTuple):
    """The examples, and what a loss needs."""

    z: Tensor  # [samples, n], the adapted layer's inputs
    base: Tensor  # [samples, n], W0 z
    target: Tensor  # [samples, 8]
    readout: Tensor  # [n, 8], R / n
    scale: (
        float  # the squared error's divisor, so that the loss is 1 where the adapter adds nothing
    )

    def loss(self, A: Tensor, B: Tensor, rows: slice) -> Tensor:
        outputs = (
            torch.relu(lora_branch(self.base[rows], self.z[rows], A, B, SCALING)) @ self.readout
        )
        return (outputs - self.target[rows]).square().mean() / self.scale


@lru_cache(maxsize=1)
def plant(width: int, seed: int) -> Planted:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    w_in, readout = normal(width, INPUTS, std=INPUTS**-0.5), normal(width, OUTPUTS)
    z = math.sqrt(2) * torch.relu(normal(TRAIN + HELD_OUT, INPUTS) @ w_in.t())
    base = z @ normal(width, width, std=width**-0.5).t()
    u = readout @ normal(OUTPUTS, PLANTED_RANK, std=OUTPUTS**-0.5)
    v = w_in @ normal(INPUTS, PLANTED_RANK)
    readout = readout / width
    before = torch.relu(base) @ readout
    target = torch.relu(base + (z @ v / width) @ u.t()) @ readout
    return Planted(z, base, target, readout, (target - before).square().mean().item())


def planted(width: int, seed: int, factor: float) -> Problem:
    """A [8, n] starts as PEFT draws it (kaiming-uniform, variance 1 / 3n) times ``factor``, and B
    [n, 8] at zero.
    """
    task, generator = plant(width, seed), torch.Generator().manual_seed(1000 + seed)
    a = nn.Parameter((torch.rand(R, width, generator=generator) * 2 - 1) * width**-0.5 * factor)
    b = nn.Parameter(torch.zeros(width, R))
    batches = cycle(slice(at, at + BATCH) for at in range(0, TRAIN, BATCH))
    return Problem(
        [slk.LoRAPair("planted", a, b)],
        lambda: task.loss(a, b, next(batches)),
        lambda: [task.z[TRAIN:][:BATCH]],
        lambda: task.loss(a, b, slice(TRAIN, None)).item(),
    )


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


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Nats a character."""
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@cache
def base(width: int) -> Any:
    """The frozen, pretrained base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, lr = width // HEAD, 3e-3 * (64 / width) ** 0.5
    config = LlamaConfig(
        vocab_size=CHARACTERS, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=LENGTH, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    data = shuffled(torch.cat([blocks(text) for text in assets.plays()]), PRETRAINING_BLOCKS, 0)
    for step in range(PRETRAINING_STEPS):
        optimizer.param_groups[0]["lr"] = (
            lr * min(1.0, (step + 1) / 20) * (1 - step / PRETRAINING_STEPS)
        )
        loss_of(model, next(data)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False).eval()


def transformers(width: int, seed: int, factor: float) -> Problem:
    """Adapters on the query and value projections, with A's start times ``factor``."""
    model = share(base(width))
    torch.manual_seed(1000 + seed)
    slk.apply_lora(model, ["q_proj", "v_proj"], r=R, lora_alpha=SCALING * R)
    pairs, seen, modules = slk.lora_pairs(model), {}, dict(model.named_modules())
    for pair in pairs:
        pair.A.data.mul_(factor)
        modules[pair.name].register_forward_pre_hook(
            lambda _module, given, name=pair.name: seen.update(
                {name: given[0].detach().flatten(0, -2)}
            )
        )
    data, held_out = headlines()
    stream = shuffled(data, BLOCKS, seed)

    def inputs() -> list[Tensor]:
        model(input_ids=held_out[:4])
        return [seen[pair.name] for pair in pairs]

    def held_out_loss() -> float:
        return statistics.fmean(loss_of(model, part).item() for part in held_out.split(32))

    return Problem(pairs, lambda: loss_of(model, next(stream)), inputs, held_out_loss)
