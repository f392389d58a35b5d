"""The launch that turns a chunk of a head's logits into losses and their gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.kernels.lora.cross_entropy import _cross_entropy_kernel
from stablelora_kernels.launch.base import Arguments, Launch, flag_words, planned


class Loss(Protocol):
    """What the kernel takes of a call."""

    @property
    def ignore_index(self) -> int: ...

    @property
    def softcap(self) -> float: ...

    @property
    def logit_scale(self) -> float: ...

    @property
    def unit(self) -> float: ...

    @property
    def needs_gradient(self) -> bool: ...


def cross_entropy(
    loss: Loss,
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    losses: Tensor,
) -> Launch:
    """``losses`` [M] of ``logits`` [M, V], which dZ replaces if gradients are needed.

    ``logits`` are columns of a wider matrix, whose other columns are overwritten.
    """
    rule = tiles.CROSS_ENTROPY_TILES[0]
    tile: Tile = rule.choice
    rows, vocabulary = logits.shape
    width = logits.stride(0)
    whole = logits.as_strided((rows, width), (width, 1))
    # The kernel reads these columns too, and nobody has written them. Most models have none.
    whole[:, vocabulary:].zero_()
    plan = Plan(tile, rule.reason, block_r=0, tiles=rows)
    arguments: Arguments = {
        "z_ptr": whole,
        "labels_ptr": labels,
        "row_scale_ptr": row_scale,
        "losses_ptr": losses,
        "V": vocabulary,
        "ignore_index": loss.ignore_index,
        "stride_z": width,
        "softcap": loss.softcap,
        "logit_scale": loss.logit_scale,
        "unit": loss.unit,
    }
    constants: Arguments = {
        "SOFTCAP": loss.softcap != 0.0,
        "GRADIENT": loss.needs_gradient,
        "BLOCK_N": tile.BLOCK_N,
    }
    flags = flag_words(
        gradient=loss.needs_gradient, softcap=loss.softcap != 0.0, scaled=row_scale is not None
    )
    words = f"1x{tile.BLOCK_N}{flags}"
    return planned(_cross_entropy_kernel, words, plan, plan.programs, arguments, constants)
