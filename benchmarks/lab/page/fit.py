"""Will it fit? Memory of a training step on one GPU, and the most tokens that fit 24 and 80 GiB. Counted, not measured.

    python -m benchmarks.lab.page.fit

Frozen weights, adapters and logits come from ``examples.cluster_plan``, and what a layer keeps for backward from ``memory``.
"""

from __future__ import annotations

from benchmarks.common.tables import markdown
from benchmarks.lab.page.memory import FUSED, PEFT, saved_mib
from examples.cluster_plan import ADAPTER, BF16, LOGITS, MODELS, NF4, Model, count

# From the models' published config.json; Qwen3's norms of queries and keys are left out.
SHAPES = {
    "Llama 3.1 8B": MODELS["llama-8b"],
    "Qwen3 14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "Llama 3.1 70B": MODELS["llama-70b"],
}  # fmt: skip
GIB, MIB = 1 << 30, 1 << 20
TOKENS, CARDS = (2048, 8192), (24, 80)
# The rest of a card is for what is not counted.
USABLE = 0.9
ARMS = (PEFT, FUSED)


def fixed(shape: dict[str, int], model: Model, nf4: bool) -> float:
    """Bytes that do not grow with the tokens; beside NF4 weights also the largest one, dequantized for its product."""
    layers = model.layers * model.layer.frozen
    frozen = NF4 * layers + BF16 * shape["hidden_size"] * shape["intermediate_size"] if nf4 else BF16 * layers
    return frozen + BF16 * model.rest + ADAPTER * model.adapters


def per_token(arm: str, shape: dict[str, int], model: Model, checkpointing: bool) -> float:
    """Bytes for each token: saved for backward, logits and their gradients. Checkpointing keeps each layer's input."""
    # The difference leaves out the casts of A and B that PyTorch's operators keep and the kernels do not.
    one, two = (saved_mib(arm, 0.0, sizes=shape, tokens=tokens) for tokens in (1024, 2048))
    saved = (two - one) * MIB / 1024
    layers = model.layers * BF16 * model.hidden + saved if checkpointing else model.layers * saved
    return layers + LOGITS * model.vocab


def table() -> str:
    used = [f"{tokens:,} tokens, GiB" for tokens in TOKENS]
    most = [f"most tokens, {card} GiB" for card in CARDS]
    cells = [["model", "weights", "checkpointing", "before any token, GiB", *used, *most]]
    for name, shape in SHAPES.items():
        model = count(shape, 16, "all-linear")
        for nf4 in (False, True):
            start = fixed(shape, model, nf4)
            for checkpointing in (False, True):
                rates = [per_token(arm, shape, model, checkpointing) for arm in ARMS]
                row = [name, "NF4" if nf4 else "bf16", "yes" if checkpointing else "no", f"{start / GIB:.1f}"]
                for tokens in TOKENS:
                    row.append("→".join(f"{(start + tokens * rate) / GIB:.1f}" for rate in rates))
                for card in CARDS:
                    room = USABLE * card * GIB - start
                    row.append("→".join(f"{int(room / rate):,}" for rate in rates) if room > 0 else "none")
                cells.append(row)
    return markdown(cells, 3)


if __name__ == "__main__":
    print(table())
