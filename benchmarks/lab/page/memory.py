"""What one decoder layer keeps for backward, with PEFT and with accelerate_peft.

    python -m benchmarks.lab.page.memory

counts the bytes on tensors without memory, so it runs anywhere in seconds. It prints a table and draws docs/_static/memory.png.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.common.memory import MIB, saved_for_backward
from benchmarks.common.tables import RESULTS, markdown

PLOT = RESULTS.parents[1] / "docs" / "_static" / "memory.png"
# Llama 3's 8B: one of its 32 decoder layers, on one sequence.
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TOKENS = 4096
FROZEN, PEFT, ACCELERATED, FUSED = "frozen", "PEFT", "`accelerate_peft`", "`accelerate_peft`, `fuse_mlp`"
ARMS = (FROZEN, PEFT, ACCELERATED, FUSED)
# Dropout, and whether PEFT makes bfloat16 adapters float32 (its default).
COLUMNS = {"no dropout": (0.0, True), "dropout 0.05": (0.05, True), "bfloat16 adapters, no dropout": (0.0, False)}


class _FlashAttention(torch.autograd.Function):
    """What a flash attention kernel keeps: q, k, v, its output and a float32 number for each row. It computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise NotImplementedError("counts a forward pass alone")


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    return _FlashAttention.apply(query, key, value).transpose(1, 2), None


def saved_mib(
    arm: str, dropout: float, float32: bool = True, sizes: dict[str, int] = SIZES, tokens: int = TOKENS
) -> float:
    """MiB that the layer's graph keeps: bfloat16 weights, float32 or bfloat16 adapters of rank 16 on all linear layers."""
    import peft
    from transformers import AttentionInterface, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    import stablelora_kernels as slk

    AttentionInterface.register("counted", _attend)
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1}, attn_implementation="counted")
    width = config.hidden_size
    with torch.device("meta"):
        layer: Any = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
        x = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(1, tokens, width // config.num_attention_heads, dtype=torch.bfloat16)
    model = layer
    if arm != FROZEN:
        lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
        model = peft.get_peft_model(layer, lora, autocast_adapter_dtype=float32)
    if arm in (ACCELERATED, FUSED):
        slk.accelerate_peft(model, strict=True, fuse_mlp=arm == FUSED)
    model.train()
    owned = [*model.parameters(), *model.buffers(), angles]
    return saved_for_backward(lambda: layer(x, position_embeddings=(angles, angles)), owned) / MIB


def count() -> dict[tuple[str, str], float]:
    return {(arm, name): saved_mib(arm, *column) for arm in ARMS for name, column in COLUMNS.items()}


def table(counts: dict[tuple[str, str], float]) -> str:
    cells = [["kept for backward, MiB", *COLUMNS]]
    return markdown([*cells, *([arm, *(f"{counts[arm, name]:,.0f}" for name in COLUMNS)] for arm in ARMS)])


def draw(counts: dict[tuple[str, str], float]) -> Any:
    from benchmarks.common.plot_style import BLUE, GREEN, GREY, STYLE, plt

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(COLUMNS), figsize=(9.5, 2.4), layout="constrained", sharex=True, sharey=True
        )
        for axis, name in zip(panels, COLUMNS, strict=True):
            values = [counts[arm, name] for arm in ARMS]
            labels = [arm.replace("`", "") for arm in ARMS]
            axis.barh(labels, values, color=(GREY, BLUE, GREEN, GREEN), height=0.6)
            for row, value in enumerate(values):
                axis.text(value, row, f" {value:,.0f}", va="center")
            axis.set(title=name, xlabel="MiB kept for backward")
            axis.grid(axis="y", visible=False)
        panels[0].set_xlim(0, 1.25 * max(counts.values()))
        panels[0].invert_yaxis()
    return figure


def main() -> int:
    from benchmarks.common.plot_style import save

    counts = count()
    print(table(counts))
    print(f"wrote {save(draw(counts), PLOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
