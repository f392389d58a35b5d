"""What PEFT and this library save for backward, and what fits a GPU. Counted on tensors without
memory, and by formula.

    python -m benchmarks.lab.memory [--draw]

prints four tables in seconds; ``--draw`` draws the first two into docs/_static:

- a gated MLP of an 8B Llama on a GPU, tensor by tensor, by formula; tests compare the formula with
hooks
- one decoder layer of that model, counted by hooks
- *Will it fit?*: a training step's memory, and the most tokens that fit 24 and 80 GiB
- the same with ``fuse_loss``, for models of large vocabularies

The MLP's rows that cannot be counted here follow from source code: Liger's ``LigerSiLUMulFunction``
saves G and U (src/liger_kernel/ops/swiglu.py), and Unsloth's ``LoRA_MLP`` saves x, G and U
(unsloth/kernels/fast_lora.py). Frozen weights, adapters and logits come from
``benchmarks.lab.cluster_plan``.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, PEFT, adapt
from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.plot_style import BLUE, GREEN, GREY, RED, STYLE, plt, save
from benchmarks.common.tables import RESULTS, markdown
from benchmarks.lab.cluster_plan import ADAPTER, BF16, LOGITS, MODELS, NF4, Model, count
from stablelora_kernels.ops.lora_linear_cross_entropy import GPU_LOGIT_BYTES

STATIC = RESULTS.parents[1] / "docs" / "_static"
GIB = 1 << 30

# A gated MLP of M tokens, width K, inner width F and rank r: bfloat16 weights and activations,
# float32 adapters on all three projections, on a GPU. Parameters do not count. What is kept, in the
# order of the plot:
GROUPS = X, G, U, ACT, H, COPIES, MASKS, SMALL = (
    "X", "G", "U", "act(G)", "H = act(G) ∘ U", "float32 copies of X and H", "masks", "S, A and B",
)  # fmt: skip
# Llama 3's 8B, and the tokens of one step.
LLAMA_8B, LAYERS = {"M": 8192, "K": 4096, "F": 14336, "r": 16}, 32
# Bytes by unit: of "MK", "MF" and "Mr".
Terms = dict[str, dict[str, float]]
_GATED: Terms = {G: {"MF": 2}, U: {"MF": 2}}
# PyTorch's SiLU keeps its input, and the product both factors.
_SILU = _GATED | {ACT: {"MF": 2}}
# PEFT casts each layer's input to the adapter's dtype; A's product keeps the cast, or what dropout
# made of it. Gate and up draw a mask of bool each.
_PEFT, _PEFT_DROPOUT = {COPIES: {"MK": 8, "MF": 4}, SMALL: {"Mr": 12}}, {MASKS: {"MK": 2, "MF": 1}}
# Ours keep S in bfloat16, and masks of a bit an element.
_OURS, _BITS = {X: {"MK": 2}, SMALL: {"Mr": 6}}, {MASKS: {"MK": 2 / 8, "MF": 1 / 8}}
# By row of the table: what is kept, and what dropout adds, or None if there is no dropout.
MLP_ROWS: dict[str, tuple[Terms, Terms | None]] = {
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
    cells = [
        [
            "kept by an MLP",
            "bytes, no dropout",
            "MiB",
            "32 layers, GiB",
            "MiB, dropout",
            "32 layers, GiB",
        ]
    ]
    totals = [kept(dropout, **LLAMA_8B).sum(axis=1, min_count=1) / MIB for dropout in (False, True)]
    for row, (terms, _) in MLP_ROWS.items():
        counts = sum(map(Counter, terms.values()), Counter())
        words = " + ".join(f"{counts[unit]} {unit}" for unit in ("MK", "MF", "Mr") if counts[unit])
        cells.append([row, words])
        for mib in (total[row] for total in totals):
            cells[-1] += (
                ["", ""] if math.isnan(mib) else [f"{mib:,.0f}", f"{LAYERS * mib / 1024:.1f}"]
            )
    return markdown(cells, 2)


def draw(
    frames: dict[str, pd.DataFrame], colors: Sequence[str], size: tuple[float, float], file: str
) -> Path:
    """A panel of bars for each title: of each row's MiB, stacked by column, and their sum."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(frames), figsize=size, layout="constrained", sharex=True, sharey=True
        )
        for axis, (title, mib) in zip(panels, frames.items(), strict=True):
            labels = [textwrap.fill(row.replace("`", ""), 26) for row in mib.index]
            mib.set_axis(labels).plot.barh(
                ax=axis, stacked=True, width=0.64, color=colors, legend=False
            )
            for place, total in enumerate(mib.sum(axis=1)):
                axis.text(
                    total,
                    place,
                    f" {total:,.0f}" if total else " its function has no dropout",
                    va="center",
                )
            axis.set(title=title, xlabel="MiB kept for backward")
            axis.grid(axis="y", visible=False)
        panels[0].set_xlim(0, 1.25 * max(mib.sum(axis=1).max() for mib in frames.values()))
        panels[0].invert_yaxis()
        if frames[title].columns.equals(pd.Index(GROUPS)):
            # S is too thin to be seen.
            figure.legend(
                axis.containers[:-1], GROUPS[:-1], loc="outside lower center", ncols=7, fontsize=9
            )
    return save(figure, STATIC / file)


# One decoder layer, counted.

FUSED = ACCELERATED + MLP_FUSED
LAYER_ROWS = {
    FROZEN: "frozen",
    PEFT: "PEFT",
    ACCELERATED: "`accelerate_peft`",
    FUSED: "`accelerate_peft`, `fuse_mlp`",
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Dropout, and whether adapters are float32 (PEFT's default) or bfloat16.
COLUMNS = {
    "no dropout": (0.0, True),
    "dropout 0.05": (0.05, True),
    "bfloat16 adapters, no dropout": (0.0, False),
}


class _FlashAttention(torch.autograd.Function):
    """What a flash attention kernel keeps: q, k, v, its output and a float32 number for each row.
    It computes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return out


def counted_attention(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, **_: object
) -> tuple[torch.Tensor, None]:
    """transformers' attention function that keeps what a flash attention kernel keeps."""
    return _FlashAttention.apply(q, k, v).transpose(1, 2), None


def saved_mib(
    arm: str,
    dropout: float,
    float32: bool = True,
    sizes: dict[str, int] = MODELS["llama-8b"],
    tokens: int = 4096,
) -> float:
    """MiB that a decoder layer's graph keeps: bfloat16 weights, float32 or bfloat16 adapters of
    rank 16, one sequence.
    """
    AttentionInterface.register("counted", counted_attention)
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1}, attn_implementation="counted")
    with torch.device("meta"):
        layer: Any = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(1, tokens, config.head_dim, dtype=torch.bfloat16)
    model = adapt(layer, arm, LINEAR, r=16, dropout=dropout, float32=float32).train()
    owned = [*model.parameters(), *model.buffers(), angles]
    return saved_for_backward(lambda: layer(x, position_embeddings=(angles, angles)), owned) / MIB


def layer_counts() -> pd.DataFrame:
    """By row and column, the MiB that a layer of an 8B Llama saves on 4,096 tokens."""
    found = {
        name: [saved_mib(arm, *column) for arm in LAYER_ROWS] for name, column in COLUMNS.items()
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
TOKENS, CARDS = (2048, 8192), (24, 80)
# The rest of a card is for what is not counted.
USABLE = 0.9


def per_token(arm: str, shape: dict[str, int], model: Model) -> tuple[float, float]:
    """Bytes for each token, without and with checkpointing: saved for backward, logits and their
    gradients.
    """
    # The difference leaves out the casts of A and B that PyTorch's operators keep and the kernels
    # do not.
    one, two = (saved_mib(arm, 0.0, sizes=shape, tokens=tokens) for tokens in (1024, 2048))
    saved, logits = (two - one) * MIB / 1024, LOGITS * model.vocab
    # Checkpointing keeps each layer's input.
    return model.layers * saved + logits, model.layers * BF16 * model.hidden + saved + logits


def fit_table() -> str:
    cells = [["model", "weights", "checkpointing", "before any token, GiB"]]
    cells[0] += [f"{tokens:,} tokens, GiB" for tokens in TOKENS] + [
        f"most tokens, {card} GiB" for card in CARDS
    ]
    for name, shape in SHAPES.items():
        model = count(shape, 16, "all-linear")
        both = [per_token(arm, shape, model) for arm in (PEFT, FUSED)]
        elements = model.layers * model.layer.frozen
        largest = shape["hidden_size"] * shape["intermediate_size"]
        # Beside NF4 weights the largest one is dequantized for its product.
        frozen = {"bf16": BF16 * elements, "NF4": NF4 * elements + BF16 * largest}
        for weights, checkpointing in product(frozen, (False, True)):
            rates = [rate[checkpointing] for rate in both]
            start = frozen[weights] + BF16 * model.rest + ADAPTER * model.adapters
            row = [name, weights, "yes" if checkpointing else "no", f"{start / GIB:.1f}"]
            row += [
                "→".join(f"{(start + tokens * rate) / GIB:.1f}" for rate in rates)
                for tokens in TOKENS
            ]
            rooms = [USABLE * card * GIB - start for card in CARDS]
            row += [
                "→".join(f"{int(room / rate):,}" for rate in rates) if room > 0 else "none"
                for room in rooms
            ]
            cells.append(row)
    return markdown(cells, 3)


# Models of large vocabularies.
VOCABULARIES = {
    "Llama 3.1 8B": ("Llama 3.1 8B", 128_256),
    "Qwen3 14B": ("Qwen3 14B", 151_936),
}


def loss_table() -> str:
    """A step with checkpointing and ``fuse_mlp``: with logits, and without them by ``fuse_loss``."""
    cells = [["model, vocabulary", "weights"]]
    cells[0] += [f"{tokens:,} tokens, GiB" for tokens in TOKENS]
    cells[0] += [f"most tokens, {card} GiB" for card in CARDS]
    for words, (name, vocabulary) in VOCABULARIES.items():
        shape = SHAPES[name]
        model = count(shape, 16, "all-linear")
        assert model.vocab == vocabulary
        elements = model.layers * model.layer.frozen
        largest = shape["hidden_size"] * shape["intermediate_size"]
        with_logits = per_token(FUSED, shape, model)[True]
        # The gradient of the last hidden state, and backward's multiple of it, in place of logits.
        without = with_logits - LOGITS * model.vocab + 2 * BF16 * model.hidden
        for kind, frozen in {
            "bf16": BF16 * elements,
            "NF4": NF4 * elements + BF16 * largest,
        }.items():
            start = frozen + BF16 * model.rest + ADAPTER * model.adapters
            # Beside one chunk's logits.
            both = ((start, with_logits), (start + GPU_LOGIT_BYTES, without))
            row = [f"{words}, {vocabulary:,}", kind]
            row += [
                "→".join(f"{(held + tokens * rate) / GIB:.1f}" for held, rate in both)
                for tokens in TOKENS
            ]
            for card in CARDS:
                rooms = [(USABLE * card * GIB - held, rate) for held, rate in both]
                fits = rooms[0][0] > 0
                row.append(
                    "→".join(f"{int(room / rate):,}" for room, rate in rooms) if fits else "none"
                )
            cells.append(row)
    return markdown(cells, 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.lab.memory")
    parser.add_argument("--draw", action="store_true", help="draw the figures of docs/_static")
    options = parser.parse_args(argv)
    counts = layer_counts()
    print(mlp_table(), layer_table(counts), fit_table(), loss_table(), sep="\n\n")
    if not options.draw:
        return
    mlp = {
        title: kept(dropout, **LLAMA_8B) / MIB
        for title, dropout in (("no dropout", False), ("dropout", True))
    }
    colors = (GREY, BLUE, "#7fb0dc", "#f0a202", "#e07a3f", RED, "#7a1f3d", GREEN)
    draw(mlp, colors, (11.0, 4.3), "fused-mlp-memory.png")
    layer = {title: pd.DataFrame(np.diag(values), counts.index) for title, values in counts.items()}
    draw(layer, (GREY, BLUE, GREEN, GREEN), (11.0, 2.4), "memory.png")


if __name__ == "__main__":
    main()
