"""The memory of a training step of a Llama or Qwen3 with LoRA at its peak, by what is alive and who computes:
PEFT, 72 lines of PyTorch or this library, with or without Liger-Kernel.

``stablelora_kernels.integrations.step_memory`` counts a layer and a head; here they are built, and
what is alive gets names. What is not PyTorch's operators is counted by what its source allocates:
beside this library's kernels and flash attention

- Liger-Kernel's norms, rotary embedding and SwiGLU (``LIGER``)
- Liger-Kernel's loss without logits (``liger_loss``)

``tests/benchmarks/lab/test_step_memory.py`` holds the count against the measured peaks of whole
models on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.common.arms import FROZEN, MLP_FUSED, MLP_TILED, PEFT, adapt
from benchmarks.lab.stand_ins import LigerRMSNorm, liger_loss, liger_mlp, liger_rotate
from stablelora_kernels import functional
from stablelora_kernels.integrations.step_memory import (
    BF16,
    COUNTED_ATTENTION,
    CPU,
    FP32,
    Block,
    Counted,
    count,
    device_of,
    patched,
    positions_bytes,
    register_attention,
)

# The logits in bfloat16 and float32, and the gradient of each.
LOGITS = 2 * (BF16 + FP32)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# How the loss is computed: from logits, by this library's op, or by Liger-Kernel's.
FROM_LOGITS, WITHOUT_LOGITS, LIGER_LOSS = "from logits", "fuse_loss", "Liger's loss"
LOSS, LAST_LAYER = "the loss", "the last layer"
INPUTS = "inputs of checkpointed layers"


class Shape(NamedTuple):
    """A decoder's sizes, by transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    # Of ``FAMILIES``.
    model_type: str = "llama"

    def config(self, **options: object) -> PreTrainedConfig:
        return AutoConfig.for_model(**self._asdict(), **options)

    def part(self, name: str) -> Any:
        """The class of the family in transformers that ends with ``name``."""
        return getattr(self.modeling, FAMILIES[self.model_type] + name)

    @property
    def modeling(self) -> Any:
        """transformers' file of the family."""
        return import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")


# By transformers' name: what the names of its classes begin with.
FAMILIES = {"llama": "Llama", "qwen3": "Qwen3"}
# From the models' published config.json.
MODELS = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-14b": Shape(5120, 17408, 40, 40, 8, 128, 151936, "qwen3"),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
}


class Step(NamedTuple):
    """A training step of one sequence."""

    shape: Shape
    # Of ``benchmarks.common.arms``.
    arm: str
    loss: str = FROM_LOGITS
    checkpointing: bool = False
    dropout: float = 0.0
    # Whether adapters are float32 or of the weights' dtype.
    float32: bool = True
    # Whether frozen weights of the layers are in NF4.
    nf4: bool = False
    # Whether Liger-Kernel's norms, rotary embedding and SwiGLU take the place of the model's.
    liger: bool = False
    dtype: torch.dtype = torch.bfloat16
    # A GPU of ``dispatch.problem.DEVICES``, or "cpu".
    where: str = "sm_90"
    r: int = 16


# Bytes by term.
Terms = dict[str, float]


def moments(step: Step, tokens: int) -> dict[str, Terms]:
    """By moment, the bytes of the terms that are alive then."""
    # What a count does not depend on is left out, so that it is found again.
    other_layer = step.nf4 and step.arm == PEFT
    layer = count_layer(step._replace(loss=FROM_LOGITS, nf4=other_layer), tokens)
    head = count_head(
        Step(step.shape, FROZEN, step.loss, liger=step.liger, dtype=step.dtype, where=step.where),
        tokens,
    )
    graph = INPUTS if step.checkpointing else "graphs of other layers"
    positions = {"positions": positions_bytes(tokens, step.shape.head_dim, step.dtype)}
    return {
        LOSS: positions
        | {graph: step.shape.num_hidden_layers * layer.kept}
        | {"the last norm, the head and the loss": head.peak},
        LAST_LAYER: positions
        | {graph: (step.shape.num_hidden_layers - 1) * layer.kept}
        | terms_of(step, layer.at_peak)
        | {"a dequantized weight": dequantized_bytes(step)},
    }


def peak(step: Step, tokens: int) -> float:
    """The bytes of the larger moment."""
    return max(sum(terms.values()) for terms in moments(step, tokens).values())


def dequantized_bytes(step: Step) -> float:
    """The largest weight of NF4, which its product reads dequantized, in our kernels above 128 rows
    and in bitsandbytes.
    """
    sizes = step.shape.hidden_size * step.shape.intermediate_size
    return step.dtype.itemsize * sizes if step.nf4 else 0.0


INNER, FLOAT32, OTHER = "tensors of the MLP's width", "other float32 tensors", "other tensors"


def terms_of(step: Step, blocks: Sequence[Block]) -> Terms:
    """A layer's memory by what it holds, and by whether forward or backward made it."""
    terms: Terms = defaultdict(float)
    for block in blocks:
        if block.shape[-1:] == (step.shape.intermediate_size,):
            kind = INNER
        elif block.dtype == torch.float32 and step.dtype != torch.float32:
            kind = FLOAT32
        else:
            kind = OTHER
        terms[f"{kind}, made by {block.phase}"] += block.nbytes
    return dict(terms)


@cache
def count_layer(step: Step, tokens: int) -> Counted:
    """One decoder layer, forward and backward."""
    with _parts_of(step):
        attention = "sdpa" if step.where == CPU else COUNTED_ATTENTION
        config = step.shape.config(attn_implementation=attention)
        with torch.device(device_of(step.where)):
            layer: Any = (
                step.shape.part("DecoderLayer")(config, 0).to(step.dtype).requires_grad_(False)
            )
            angles = torch.zeros(1, tokens, step.shape.head_dim, dtype=step.dtype)
        adapt(
            nn.ModuleDict({"layer": layer}), step.arm, LINEAR, r=step.r, dropout=step.dropout,
            float32=step.float32,
        ).train()  # fmt: skip
        run: Callable[[Tensor], Tensor] = partial(layer, position_embeddings=(angles, angles))
        owned = [*layer.parameters(), *layer.buffers(), angles]
        return _count(step, tokens, run, owned, step.checkpointing)


@cache
def count_head(step: Step, tokens: int) -> Counted:
    """The last norm, a frozen head and the loss."""
    vocabulary = step.shape.vocab_size
    with _parts_of(step):
        with torch.device(device_of(step.where)):
            norm: Any = step.shape.part("RMSNorm")(step.shape.hidden_size)
            head = nn.Linear(step.shape.hidden_size, vocabulary, bias=False)
            labels = torch.zeros(1, tokens, dtype=torch.int64)
        for module in (norm, head):
            module.to(step.dtype).requires_grad_(False)

        def run(x: Tensor) -> Tensor:
            hidden = norm(x)
            if step.loss == FROM_LOGITS:
                return ForCausalLMLoss(head(hidden), labels, vocabulary)
            if step.loss == LIGER_LOSS:
                return liger_loss(hidden, head.weight)
            return functional.lora_linear_cross_entropy(
                hidden, head.weight, labels, bias=None, lora_A=None, lora_B=None, scaling=1.0
            )

        return _count(step, tokens, run, [*norm.parameters(), *head.parameters(), labels])


def _count(
    step: Step,
    tokens: int,
    run: Callable[[Tensor], Tensor],
    exclude: Sequence[Tensor],
    checkpointing: bool = False,
) -> Counted:
    shape = (1, tokens, step.shape.hidden_size)
    return count(run, shape, step.dtype, step.where, exclude, checkpointing)


@contextmanager
def _parts_of(step: Step) -> Iterator[None]:
    """In the block, modules are those of the step."""
    register_attention()
    patches: list[tuple[Any, str, Any]] = []
    if step.nf4:
        # PEFT's layers around a bitsandbytes layer have a forward of their own.
        from peft.tuners.lora.bnb import Linear4bit

        patches.append((lora.Linear, "forward", Linear4bit.forward))
    if step.liger:
        patches += liger_patches(step.shape, step.arm)
    with patched(patches):
        yield


def liger_patches(shape: Shape, arm: str) -> list[tuple[Any, str, Any]]:
    """What Liger-Kernel replaces in transformers' file of the family. The op of ``fuse_mlp`` and
    ``tile_mlp`` takes the place of Liger's MLP.
    """
    patches: list[tuple[Any, str, Any]] = [
        (shape.modeling, f"{FAMILIES[shape.model_type]}RMSNorm", LigerRMSNorm),
        (shape.modeling, "apply_rotary_pos_emb", liger_rotate),
    ]
    if not arm.endswith((MLP_FUSED, MLP_TILED)):
        patches.append((shape.part("MLP"), "forward", liger_mlp))
    return patches
