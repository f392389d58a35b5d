"""What a training step of a mixture of experts takes on one GPU. Attention is counted on tensors
without memory, experts by formula.

    python -m benchmarks.lab.mixtures

prints *Will it fit?*'s second table. For T tokens of width H that choose k experts of inner width I
each, a layer's experts keep for backward, in elements:

    frozen    k T H + 3 k T I
    PEFT      2 k T H + 4 k T I, and the stacks' own size once: its W + s B A
    ours      2 k T H + 4 k T I + 2 k T r; with ``fuse_mlp`` T H + 2 k T I + k T r

``tests/benchmarks/lab/test_mixtures.py`` holds all four against hooks.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from benchmarks.common.arms import ACCELERATED, FROZEN, PEFT, adapt
from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.tables import markdown
from benchmarks.lab.memory import CARDS, FUSED, TOKENS
from benchmarks.lab.step_memory import LOGITS
from stablelora_kernels.integrations.step_memory import (
    ADAPTER,
    BF16,
    COUNTED_ATTENTION,
    GIB,
    NF4,
    USABLE,
    register_attention,
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 16
# MXFP4: half a byte, and a byte for 32 elements.
MXFP4 = 0.5 + 1 / 32


class Mixture(NamedTuple):
    """A model whose every layer is a mixture."""

    config: PreTrainedConfig
    decoder_layer: type[nn.Module]
    # The experts' inner width, and how many experts a token chooses.
    inner: int
    chosen: int
    experts: int
    # What its experts are packed in, and bytes for each of their elements.
    packed: tuple[str, float]
    # The width of the rotary position embeddings that a layer takes.
    rotary: int

    @property
    def hidden(self) -> int:
        return self.config.hidden_size  # type: ignore[no-any-return]

    @property
    def stack(self) -> int:
        """The elements of a layer's experts."""
        return 3 * self.experts * self.hidden * self.inner

    @property
    def stack_adapters(self) -> int:
        """The elements of A and B on a layer's experts."""
        up = self.hidden + 2 * self.inner
        down = self.inner + self.hidden
        return self.experts * RANK * (up + down)


# From the models' published config.json.
MIXTURES = {
    "Qwen3 30B-A3B": Mixture(
        Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            attn_implementation=COUNTED_ATTENTION,
        ),
        Qwen3MoeDecoderLayer,
        inner=768,
        chosen=8,
        experts=128,
        packed=("NF4", NF4),
        rotary=128,
    ),
    "gpt-oss 20B": Mixture(
        GptOssConfig(
            hidden_size=2880,
            num_hidden_layers=24,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=201088,
            attn_implementation=COUNTED_ATTENTION,
        ),
        GptOssDecoderLayer,
        inner=2880,
        chosen=4,
        experts=32,
        packed=("MXFP4", MXFP4),
        # The angles of one half of a head serve both.
        rotary=32,
    ),
}


class _NoExperts(nn.Module):
    """In place of a layer's experts: the hidden states, and what gpt-oss's router returns."""

    def __init__(self, returns_scores: bool) -> None:
        super().__init__()
        self.returns_scores = returns_scores

    def forward(self, x: torch.Tensor) -> Any:
        return (x, None) if self.returns_scores else x


class Rest(NamedTuple):
    """A decoder layer without its experts."""

    frozen: int
    adapters: int
    # Bytes kept for backward for each token.
    kept: float


def rest_of(mixture: Mixture, arm: str) -> Rest:
    """A decoder layer without its experts, its attention adapted by ``arm``."""
    register_attention()
    kept = []
    # The difference leaves out what does not grow with tokens.
    for tokens in (1024, 2048):
        with torch.device("meta"):
            layer: Any = mixture.decoder_layer(mixture.config, 0).to(torch.bfloat16)
            layer.mlp = _NoExperts(mixture.decoder_layer is GptOssDecoderLayer)
            x = torch.empty(1, tokens, mixture.hidden, dtype=torch.bfloat16, requires_grad=True)
            angles = torch.empty(1, tokens, mixture.rotary, dtype=torch.bfloat16)
        layer.requires_grad_(False)
        frozen = sum(p.numel() for p in layer.parameters())
        # There is no MLP left to fuse.
        of_attention = PEFT if arm == PEFT else ACCELERATED
        model = adapt(layer, of_attention, ATTENTION, r=RANK).train()
        owned = [*model.parameters(), *model.buffers(), angles]
        forward = partial(layer, x, position_embeddings=(angles, angles))
        kept.append(saved_for_backward(forward, owned))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Rest(frozen, adapters, (kept[1] - kept[0]) / 1024)


class Kept(NamedTuple):
    """Bytes that a layer's experts keep for backward."""

    a_token: float
    # Whatever the number of tokens.
    at_once: float


def kept_by_experts(mixture: Mixture, arm: str) -> Kept:
    """As the module says, in bfloat16."""
    wide = mixture.chosen * mixture.hidden
    inner = mixture.chosen * mixture.inner
    narrow = mixture.chosen * RANK
    elements = {
        FROZEN: wide + 3 * inner,
        PEFT: 2 * wide + 4 * inner,
        ACCELERATED: 2 * wide + 4 * inner + 2 * narrow,
        FUSED: mixture.hidden + 2 * inner + narrow,
    }
    return Kept(BF16 * elements[arm], BF16 * mixture.stack if arm == PEFT else 0.0)


def experts_mib(mixture: Mixture, arm: str, tokens: int) -> float:
    """MiB that a layer's experts keep for backward of so many tokens."""
    kept = kept_by_experts(mixture, arm)
    return (kept.at_once + tokens * kept.a_token) / MIB


class Step(NamedTuple):
    """A training step's bytes: before any token, and for each."""

    start: float
    a_token: float


def step_of(mixture: Mixture, arm: str, is_packed: bool, checkpointing: bool) -> Step:
    rest = rest_of(mixture, arm)
    experts = kept_by_experts(mixture, arm)
    layers = mixture.config.num_hidden_layers
    # The embedding, the head and the last norm.
    ends = 2 * mixture.config.vocab_size * mixture.hidden + mixture.hidden
    bytes_of_experts = mixture.packed[1] if is_packed else BF16
    router = mixture.experts * mixture.hidden
    weights = layers * (bytes_of_experts * mixture.stack + BF16 * (rest.frozen + router))
    adapters = layers * (rest.adapters + mixture.stack_adapters)
    # Checkpointing keeps one layer's graph, and each layer's input.
    graphs = 1 if checkpointing else layers
    inputs = layers * BF16 * mixture.hidden if checkpointing else 0
    a_token = graphs * (rest.kept + experts.a_token) + inputs + LOGITS * mixture.config.vocab_size
    start = weights + BF16 * ends + ADAPTER * adapters + graphs * experts.at_once
    return Step(start, a_token)


def fit_table() -> str:
    """PEFT's and ours, PEFT's in bfloat16 alone: it trains no packed experts right."""
    heads = ["model", "experts", "checkpointing", "before any token, GiB"]
    heads += [f"{TOKENS:,} tokens, GiB", *(f"most tokens, {card} GiB" for card in CARDS)]
    rows = [heads]
    for (name, mixture), is_packed, checkpointing in product(
        MIXTURES.items(), (False, True), (False, True)
    ):
        arms = (FUSED,) if is_packed else (PEFT, FUSED)
        steps = [step_of(mixture, arm, is_packed, checkpointing) for arm in arms]
        kind = mixture.packed[0] if is_packed else "bf16"
        row = [name, kind, "yes" if checkpointing else "no"]
        row.append("→".join(f"{step.start / GIB:.1f}" for step in steps))
        row.append("→".join(f"{(step.start + TOKENS * step.a_token) / GIB:.1f}" for step in steps))
        for card in CARDS:
            row.append("→".join(_most_tokens(step, card) for step in steps))
        rows.append(row)
    return markdown(rows, 3)


def _most_tokens(step: Step, card: int) -> str:
    """How many tokens a card of so many GiB holds."""
    room = USABLE * card * GIB - step.start
    return f"{int(room / step.a_token):,}" if room > 0 else "none"


def main() -> None:
    for name, mixture in MIXTURES.items():
        print(f"{name}: a layer's experts keep for backward")
        for arm in (FROZEN, PEFT, ACCELERATED, FUSED):
            kept = kept_by_experts(mixture, arm)
            print(
                f"    {arm}: {kept.at_once / MIB:,.0f} MiB and {kept.a_token / 1024:.1f} KiB a token; "
                f"{experts_mib(mixture, arm, 4096):,.0f} MiB for 4,096 tokens"
            )
    print(fit_table())


if __name__ == "__main__":
    main()
