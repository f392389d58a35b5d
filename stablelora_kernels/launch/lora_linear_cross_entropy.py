"""The launch that turns a chunk of a head's logits into losses and their gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stablelora_kernels.dispatch import tiles
from stablelora_kernels.dispatch.tiles import Plan, Tile
from stablelora_kernels.kernels.lora.cross_entropy import _cross_entropy_kernel
from stablelora_kernels.launch.base import Arguments, Launch, flag_words, planned


class Settings(Protocol):
    """What the kernel takes of a call's settings."""

    @property
    def ignore_index(self) -> int: ...

    @property
    def softcap(self) -> float: ...

    @property
    def logit_scale(self) -> float: ...

    @property
    def needs_gradient(self) -> bool: ...


class Loss(Protocol):
    """What the kernel takes of a call."""

    @property
    def settings(self) -> Settings: ...

    @property
    def unit(self) -> float: ...


class Chunk(Protocol):
    """Logits [M, V], which are columns of a wider matrix; labels [M], and each row's gradients of its
    loss and its entropy.
    """

    @property
    def logits(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def row_scale(self) -> Tensor | None: ...

    @property
    def entropy_scale(self) -> Tensor | None: ...


def cross_entropy(loss: Loss, chunk: Chunk, losses: Tensor, entropies: Tensor) -> Launch:
    """``losses`` [M], and ``entropies`` [M] or empty, of a chunk's logits, which dZ replaces if
    gradients are needed. The other columns of their memory are overwritten.
    """
    rule = tiles.CROSS_ENTROPY_TILES[0]
    tile: Tile = rule.choice
    settings = loss.settings
    logits = chunk.logits
    rows, vocabulary = logits.shape
    width = logits.stride(0)
    whole = logits.as_strided((rows, width), (width, 1))
    # The kernel reads these columns too, and nobody has written them. Most models have none.
    whole[:, vocabulary:].zero_()
    plan = Plan(tile, rule.reason, block_r=0, tiles=rows)
    arguments: Arguments = {
        "z_ptr": whole,
        "labels_ptr": chunk.labels,
        "row_scale_ptr": chunk.row_scale,
        "entropy_scale_ptr": chunk.entropy_scale,
        "losses_ptr": losses,
        "entropies_ptr": entropies if entropies.numel() else None,
        "V": vocabulary,
        "ignore_index": settings.ignore_index,
        "stride_z": width,
        "softcap": settings.softcap,
        "logit_scale": settings.logit_scale,
        "unit": loss.unit,
    }
    constants: Arguments = {
        "SOFTCAP": settings.softcap != 0.0,
        "GRADIENT": settings.needs_gradient,
        "BLOCK_N": tile.BLOCK_N,
    }
    flags = flag_words(
        gradient=settings.needs_gradient,
        softcap=settings.softcap != 0.0,
        scaled=chunk.row_scale is not None,
        entropy=bool(entropies.numel()),
        entropy_gradient=chunk.entropy_scale is not None,
    )
    words = f"1x{tile.BLOCK_N}{flags}"
    return planned(_cross_entropy_kernel, words, plan, plan.programs, arguments, constants)
