"""What PEFT and this library save for backward, and what fits a GPU. Counted on tensors without
memory, and by formula.

    python -m benchmarks.lab.memory

prints four tables in a minute:

- a gated MLP of an 8B Llama on a GPU, by formula; tests compare the formula with hooks
- one decoder layer of that model, counted by hooks; under autocast its tensors are on the CPU
- *Will it fit?*: a training step's memory at its peak, and the most tokens that fit 24 and 80 GiB
(``benchmarks.lab.step_memory`` counts them)
- how many tokens fit with which options of ``accelerate_peft`` (``memory_plan``)

The MLP's rows that cannot be counted here follow from source code: Liger's ``LigerSiLUMulFunction``
saves G and U (src/liger_kernel/ops/swiglu.py), and Unsloth's ``LoRA_MLP`` saves x, G and U
(unsloth/kernels/fast_lora.py). Frozen weights and adapters are those of ``memory_plan``.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, PEFT, PLAIN, adapt
from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.tables import markdown
from benchmarks.lab import step_memory
from benchmarks.lab.step_memory import (
    FROM_LOGITS,
    LIGER_LOSS,
    LINEAR,
    MODELS,
    Step,
    Terms,
)

# Not read here: scripts that judge the pages' figures take these from this file.
from benchmarks.lab.step_memory import LOGITS as LOGITS
from stablelora_kernels.integrations.memory_plan import (
    Decoder,
    MemoryPlan,
    PlannedStep,
    memory_plan,
)
from stablelora_kernels.integrations.step_memory import (
    ADAPTER,
    BF16,
    COUNTED_ATTENTION,
    GIB,
    USABLE,
    most_tokens,
    patched,
    register_attention,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.chunks import (
    GPU_LOGIT_BYTES as GPU_LOGIT_BYTES,
)

# A gated MLP of M tokens, width K, inner width F and rank r: bfloat16 weights and activations,
# float32 adapters on all three projections, on a GPU. Parameters do not count. What is kept:
GROUPS = X, G, U, ACT, H, COPIES, MASKS, SMALL = (
    "X", "G", "U", "act(G)", "H = act(G) ∘ U", "float32 copies of X and H", "masks", "S, A and B",
)  # fmt: skip
# Llama 3's 8B, and the tokens of one step.
LLAMA_8B = {"M": 8192, "K": 4096, "F": 14336, "r": 16}
# Bytes by group, and by unit: of "MK", "MF" and "Mr".
Groups = dict[str, dict[str, float]]
_GATED: Groups = {G: {"MF": 2}, U: {"MF": 2}}
# PyTorch's SiLU keeps its input, and the product both factors.
_SILU = _GATED | {ACT: {"MF": 2}}
# PEFT casts each layer's input to the adapter's dtype; A's product keeps the cast, or what dropout
# made of it. Gate and up draw a mask of bool each.
_PEFT, _PEFT_DROPOUT = {COPIES: {"MK": 8, "MF": 4}, SMALL: {"Mr": 12}}, {MASKS: {"MK": 2, "MF": 1}}
# Ours keep S in bfloat16, and masks of a bit an element.
_OURS, _BITS = {X: {"MK": 2}, SMALL: {"Mr": 6}}, {MASKS: {"MK": 2 / 8, "MF": 1 / 8}}
# By row of the table: what is kept, and what dropout adds, or None if there is no dropout.
MLP_ROWS: dict[str, tuple[Groups, Groups | None]] = {
    "frozen": (_SILU, {}),
    "PEFT": (_SILU | _PEFT, _PEFT_DROPOUT),
    "PEFT, Liger's SwiGLU": (_GATED | _PEFT, _PEFT_DROPOUT),
    "Unsloth": ({X: {"MK": 2}} | _GATED, None),
    "`apply_lora`, also with `fuse_projections`": (_SILU | _OURS | {H: {"MF": 2}}, _BITS),
    "`apply_lora`, Liger's SwiGLU": (_GATED | _OURS | {H: {"MF": 2}}, _BITS),
    "`fuse_mlp`": (_GATED | _OURS, _BITS),
}


def kept(dropout: bool, **sizes: int) -> pd.DataFrame:
    """Bytes by row and group of tensors at M, K, F and r; a row that has no dropout is empty."""
    found = {}
    for row, (terms, more) in MLP_ROWS.items():
        groups = terms if not dropout else {} if more is None else terms | more
        found[row] = {
            group: sum(
                count * math.prod(sizes[name] for name in unit) for unit, count in each.items()
            )
            for group, each in groups.items()
        }
    return pd.DataFrame(found, index=GROUPS).T


def mlp_table() -> str:
    cells = [["kept by an MLP", "bytes, no dropout", "MiB, no dropout", "MiB, dropout"]]
    totals = [kept(dropout, **LLAMA_8B).sum(axis=1, min_count=1) / MIB for dropout in (False, True)]
    for row, (terms, _) in MLP_ROWS.items():
        counts = sum(map(Counter, terms.values()), Counter())
        words = " + ".join(f"{counts[unit]} {unit}" for unit in ("MK", "MF", "Mr") if counts[unit])
        cells.append([row, words])
        mib = [total[row] for total in totals]
        cells[-1] += ["" if math.isnan(each) else f"{each:,.0f}" for each in mib]
    return markdown(cells, 2)


# One decoder layer, counted.

FUSED = ACCELERATED + MLP_FUSED


class LayerRow(NamedTuple):
    """An arm, and whether Liger-Kernel's norms, rotary embedding and SwiGLU are the model's."""

    arm: str
    liger: bool = False


LAYER_ROWS = {
    LayerRow(FROZEN): "frozen",
    LayerRow(PEFT): "PEFT",
    LayerRow(PEFT, liger=True): "PEFT, Liger-Kernel",
    LayerRow(PLAIN): PLAIN,
    LayerRow(ACCELERATED): "`accelerate_peft`",
    LayerRow(FUSED): "`accelerate_peft`, `fuse_mlp`",
    LayerRow(FUSED, liger=True): "the same, Liger-Kernel",
}
# The arguments of saved_mib. Without more words adapters are float32, PEFT's default.
COLUMNS: dict[str, dict[str, Any]] = {
    "no dropout": {"dropout": 0.0},
    "dropout 0.05": {"dropout": 0.05},
    "autocast, no dropout": {"dropout": 0.0, "autocast": True},
    "bfloat16 adapters, no dropout": {"dropout": 0.0, "float32": False},
}


class _WithoutProducts(TorchDispatchMode):
    """A product of two matrices is memory that nobody has written, which saves its time."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.mm.default:
            return func(*args, **kwargs)
        x, weight = args
        return x.new_empty(x.shape[0], weight.shape[1])


def saved_mib(
    arm: str,
    dropout: float,
    float32: bool = True,
    tokens: int = 4096,
    liger: bool = False,
    autocast: bool = False,
) -> float:
    """MiB that a decoder layer's graph keeps: bfloat16 weights, float32 or bfloat16 adapters of
    rank 16, one sequence.
    """
    # PyTorch has no autocast for tensors without memory.
    device = torch.device("cpu" if autocast else "meta")
    register_attention()
    shape = MODELS["llama-8b"]
    config = shape.config(attn_implementation=COUNTED_ATTENTION)
    with patched(step_memory.liger_patches(shape, arm) if liger else ()):
        with torch.device("meta"):
            layer: Any = (
                shape.part("DecoderLayer")(config, 0).to(torch.bfloat16).requires_grad_(False)
            )
        model = adapt(layer, arm, LINEAR, r=16, dropout=dropout, float32=float32).train()
        model.to_empty(device=device)
        with device:
            x = torch.empty(1, tokens, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
            angles = torch.empty(1, tokens, shape.head_dim, dtype=torch.bfloat16)
        owned = [*model.parameters(), *model.buffers(), angles]

        def forward() -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return layer(x, position_embeddings=(angles, angles))

        with _WithoutProducts() if autocast else nullcontext():
            return saved_for_backward(forward, owned) / MIB


@cache
def layer_counts() -> pd.DataFrame:
    """By row and column, the MiB that a layer of an 8B Llama saves on 4,096 tokens."""
    found = {
        name: [saved_mib(row.arm, liger=row.liger, **column) for row in LAYER_ROWS]
        for name, column in COLUMNS.items()
    }
    return pd.DataFrame(found, index=[*LAYER_ROWS.values()])


def layer_table(counts: pd.DataFrame) -> str:
    rows = [[row, *map("{:,.0f}".format, values)] for row, *values in counts.itertuples()]
    return markdown([["kept for backward, MiB", *COLUMNS], *rows])


# Whole models.

SHAPES = {
    "Llama 3.1 8B": MODELS["llama-8b"],
    "Qwen3 14B": MODELS["qwen3-14b"],
    "Llama 3.1 70B": MODELS["llama-70b"],
}
TOKENS, CARDS = 8192, (24, 80)
# Of a bfloat16 adapter: value, gradient and both moments, which AdamW keeps in its dtype.
BF16_ADAPTER = 4 * BF16


class Arguments(NamedTuple):
    """What a user gives PEFT and the Trainer."""

    arm: str
    loss: str = FROM_LOGITS
    # ``autocast_adapter_dtype=False`` makes them bfloat16.
    float32: bool = True
    # ``use_liger_kernel=True``, which also gives ``LIGER_LOSS``.
    liger: bool = False


DEFAULT = Arguments(PEFT)
# PEFT at its best, by two documented arguments.
BEST = Arguments(PEFT, LIGER_LOSS, False, True)
OURS = BEST._replace(arm=FUSED)
# By model and its weights. A bfloat16 model of 14B needs 80 GiB, one of 70B more.
FITS = (
    ("Llama 3.1 8B", "bf16"),
    ("Llama 3.1 8B", "NF4"),
    ("Qwen3 14B", "NF4"),
    ("Llama 3.1 70B", "NF4"),
)


@cache
def decoder_of(name: str, weights: str) -> Decoder:
    """The count of a model with this library."""
    return Decoder(
        SHAPES[name].config(), 16, "all-linear", weights.lower(), torch.bfloat16, "sm_90"
    )


class Run(NamedTuple):
    """A model and how it trains."""

    name: str
    weights: str
    checkpointing: bool
    given: Arguments

    @property
    def start(self) -> float:
        """The bytes before any token: weights; adapters with gradients and moments."""
        an_adapter = ADAPTER if self.given.float32 else BF16_ADAPTER
        return decoder_of(self.name, self.weights).start(an_adapter)

    def at(self, tokens: int) -> dict[str, Terms]:
        """Bytes by moment and term, beside those before any token."""
        step = Step(
            SHAPES[self.name],
            self.given.arm,
            self.given.loss,
            self.checkpointing,
            float32=self.given.float32,
            nf4=self.weights == "NF4",
            liger=self.given.liger,
        )
        return step_memory.moments(step, tokens)

    def gib(self, tokens: int) -> float:
        """A step's memory at its peak."""
        return (self.start + max(sum(terms.values()) for terms in self.at(tokens).values())) / GIB

    def most_tokens(self, card: int) -> int:
        """How many tokens a card of so many GiB holds."""
        return most_tokens(
            lambda tokens: [sum(terms.values()) for terms in self.at(tokens).values()],
            USABLE * card * GIB - self.start,
        )


def _step_cells(runs: Sequence[Run]) -> list[str]:
    """Of runs side by side: a step's GiB, and the most tokens of each card."""
    cells = ["→".join(f"{run.gib(TOKENS):.1f}" for run in runs)]
    for card in CARDS:
        most = [run.most_tokens(card) for run in runs]
        cells.append("→".join(f"{tokens:,}" for tokens in most) if any(most) else "none")
    return cells


_STEP_HEADS = [f"{TOKENS:,} tokens, GiB", *(f"most tokens, {card} GiB" for card in CARDS)]


def fit_table() -> str:
    """PEFT by default, PEFT at its best, and this library with the same arguments."""
    cells = [["model", "weights", "checkpointing", "before any token, GiB", *_STEP_HEADS]]
    for (name, weights), checkpointing in product(FITS, (False, True)):
        runs = [Run(name, weights, checkpointing, given) for given in (DEFAULT, BEST, OURS)]
        starts = "→".join(f"{run.start / GIB:.1f}" for run in runs)
        row = [name, weights, "yes" if checkpointing else "no", starts]
        cells.append(row + _step_cells(runs))
    return markdown(cells, 3)


# By model: weights, and the GiB of cards that hold them.
PLANS = (
    ("Llama 3.1 8B", "bf16", (24, 80)),
    ("Llama 3.1 8B", "NF4", (24, 80)),
    ("Qwen3 14B", "bf16", (80,)),
    ("Qwen3 14B", "NF4", (24, 80)),
    ("Llama 3.1 70B", "NF4", (80,)),
)


class Plans(NamedTuple):
    """With the model's own norms and rotary embedding, and with Liger-Kernel's."""

    own: MemoryPlan
    liger: MemoryPlan


@cache
def plans_of(name: str, weights: str, card: int) -> Plans:
    plan = partial(memory_plan, SHAPES[name].config(), gpu_gib=card, weights=weights.lower())
    own = plan()
    with patched(step_memory.liger_patches(SHAPES[name], FUSED)):
        return Plans(own, plan())


def plan_table() -> str:
    """The most tokens of ``memory_plan``."""
    cells = []
    for name, weights, cards in PLANS:
        for card in cards:
            plans = plans_of(name, weights, card)
            pairs = zip(plans.own.steps, plans.liger.steps, strict=True)
            tokens = [f"{own.tokens:,}→{liger.tokens:,}" for own, liger in pairs]
            cells.append([name, weights, str(card), *tokens])
    heads = [_plan_head(step) for step in plans.own.steps]
    return markdown([["most tokens", "weights", "GiB", *heads], *cells], 3)


def _plan_head(step: PlannedStep) -> str:
    words = [f"`{name}`" for name in step.fusions]
    words += ["checkpoints"] * (step.checkpoints > 0) + ["offloaded"] * step.offload
    return ", ".join(words) or "no option"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.lab.memory")
    parser.parse_args(argv)
    tables = (mlp_table(), layer_table(layer_counts()), fit_table(), plan_table())
    print(*tables, sep="\n\n")


if __name__ == "__main__":
    main()
