"""What each line of the recipe of *Long context* takes off a training step's peak. Counted on tensors
without memory (``benchmarks.lab.step_memory``).

    python -m benchmarks.lab.long_context

prints two tables in a minute, in KiB a token for an 8B and a 70B Llama in bfloat16 with bfloat16
adapters of rank 16, on 65,536 tokens:

- the peak of a step with activation checkpointing, after each further line of the recipe
- what one more layer keeps that is not checkpointed (``every_n_layers``)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.common.arms import ACCELERATED, MLP_FUSED, MLP_TILED, PEFT
from benchmarks.common.tables import markdown
from benchmarks.lab import step_memory
from benchmarks.lab.step_memory import (
    FROM_LOGITS,
    INPUTS,
    LIGER_LOSS,
    MODELS,
    WITHOUT_LOGITS,
    Shape,
    Step,
)

SHAPES = {"8B": MODELS["llama-8b"], "70B": MODELS["llama-70b"]}
TOKENS = 65_536
TILED = ACCELERATED + MLP_TILED


class Line(NamedTuple):
    """A line of the recipe, and how a step trains from it on."""

    words: str
    removes: str
    arm: str
    loss: str
    # Whether Liger-Kernel's norms and rotary embedding are the model's; in PEFT's arm its SwiGLU too.
    liger: bool
    # Whether the inputs of checkpointed layers are on the host.
    offload: bool

    def kib(self, shape: Shape) -> float:
        """KiB a token at the peak, without what does not depend on the tokens."""
        step = self._step(shape, checkpointing=True)
        moments = step_memory.moments(step, TOKENS)
        if self.offload:
            for terms in moments.values():
                del terms[INPUTS]
        return max(sum(terms.values()) for terms in moments.values()) / TOKENS / 1024

    def layer_kib(self, shape: Shape) -> float:
        """KiB a token that a layer keeps which is not checkpointed."""
        step = self._step(shape, checkpointing=False)._replace(loss=FROM_LOGITS)
        return step_memory.count_layer(step, TOKENS).kept / TOKENS / 1024

    def _step(self, shape: Shape, checkpointing: bool) -> Step:
        return Step(shape, self.arm, self.loss, checkpointing, float32=False, liger=self.liger)


START = Line("PEFT, `activation_checkpointing=True`", "", PEFT, FROM_LOGITS, False, False)
LOSS = START._replace(
    words="`accelerate_peft`, `fuse_loss=True`", removes="the logits and their gradients", arm=ACCELERATED,
    loss=WITHOUT_LOGITS,
)  # fmt: skip
NORMS = LOSS._replace(
    words="`use_liger_kernel=True`",
    removes="the norms' float32 copies, copies of q and k",
    liger=True,
)
TILES = NORMS._replace(
    words="`tile_mlp=True`",
    removes="the outputs of gate and up and their gradients, but for one tile",
    arm=TILED,
)
OFFLOAD = TILES._replace(
    words='`"offload": True`',
    removes="the inputs of the layers, which go to the host",
    offload=True,
)
RECIPE = [START, LOSS, NORMS, TILES, OFFLOAD]
# All that needs none of this library's code.
RIVAL = OFFLOAD._replace(
    words="PEFT with Liger-Kernel and `offload`", removes="", arm=PEFT, loss=LIGER_LOSS
)


def recipe_table() -> str:
    """The peak after each line of the recipe, and what the line saves."""
    cells = [
        ["line", "what it removes", *[f"{name}: {w}" for name in SHAPES for w in ("saves", "left")]]
    ]
    before: dict[str, float] = {}
    for line in [*RECIPE, RIVAL]:
        row = [line.words, line.removes]
        for name, shape in SHAPES.items():
            kib = line.kib(shape)
            saves = f"{before[name] - kib:,.0f}" if line.removes else ""
            row += [saves, f"{kib:,.0f}"]
            before[name] = kib
        cells.append(row)
    return markdown(cells, 2)


def layers_table() -> str:
    """What one more layer keeps that is not checkpointed."""
    cells = [["kept by a layer without a checkpoint", *SHAPES]]
    rows = {
        "PEFT, Liger-Kernel": RIVAL,
        "`fuse_mlp`, Liger-Kernel's norms": NORMS._replace(arm=ACCELERATED + MLP_FUSED),
        "`tile_mlp`, Liger-Kernel's norms": TILES,
    }
    for words, line in rows.items():
        cells.append([words, *[f"{line.layer_kib(shape):,.0f}" for shape in SHAPES.values()]])
    return markdown(cells)


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser("benchmarks.lab.long_context").parse_args(argv)
    print(recipe_table(), layers_table(), sep="\n\n")


if __name__ == "__main__":
    main()
