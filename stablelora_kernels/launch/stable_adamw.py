"""The optimizer's launches."""

from __future__ import annotations

import torch

from stablelora_kernels.kernels.stable_adamw.norms import _square_sums_kernel
from stablelora_kernels.kernels.stable_adamw.step import _stable_adamw_kernel
from stablelora_kernels.kernels.stable_adamw.tables import FLAG_MASTER, FLAG_SHARDED, MAX_GRAD_SUMS, NUM_WARPS
from stablelora_kernels.launch.base import launch


def stable_adamw(
    steps: torch.Tensor,
    turns: torch.Tensor,
    latched: torch.Tensor,
    squares: torch.Tensor,
    grad_squares: torch.Tensor,
    skipped: torch.Tensor,
    tensors: torch.Tensor,
    addresses: torch.Tensor,
    chunks: torch.Tensor,
    hyper: torch.Tensor,
    words: torch.Tensor,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    max_grad_norm: float | None,
    measure: bool,
    flags: int,
    variants: int,
    chunk: int,
) -> None:
    """One step: one launch, or two where gradients are clipped or the parameters' norms must be measured before.

    Sharded parameters' sums, those of their gradients too, are in place before.
    """
    if (measure or max_grad_norm is not None) and not flags & FLAG_SHARDED:
        sums = squares[0] if measure else None, None if max_grad_norm is None else grad_squares
        square_sums(tensors, addresses, chunks, *sums, flags, variants, chunk)
    launch(
        _stable_adamw_kernel,
        (chunks.shape[0],),
        steps.device,
        tensors,
        addresses,
        chunks,
        hyper,
        words,
        steps,
        turns,
        latched,
        squares,
        skipped,
        steps if grad_scale is None else grad_scale,
        steps if found_inf is None else found_inf,
        grad_squares,
        chunks.shape[0],
        grad_squares.numel(),
        1.0 if max_grad_norm is None else max_grad_norm,
        HAS_SCALE=grad_scale is not None,
        HAS_INF=found_inf is not None,
        CLIP=max_grad_norm is not None,
        FLAGS=flags,
        VARIANTS=variants,
        CHUNK=chunk,
        GRAD_SUMS=MAX_GRAD_SUMS,
        num_warps=NUM_WARPS,
    )


def square_sums(
    tensors: torch.Tensor,
    addresses: torch.Tensor,
    chunks: torch.Tensor,
    squares: torch.Tensor | None,
    grad_squares: torch.Tensor | None,
    flags: int,
    variants: int,
    chunk: int,
) -> None:
    """Fill ``squares``, one for each chunk of the parameters, and ``grad_squares``, any number that share the gradients."""
    n_squares = 0 if squares is None else squares.numel()
    anything = squares if grad_squares is None else grad_squares
    assert anything is not None
    launch(
        _square_sums_kernel,
        (n_squares + (0 if grad_squares is None else grad_squares.numel()),),
        tensors.device,
        tensors,
        addresses,
        chunks,
        anything if squares is None else squares,
        anything,
        chunks.shape[0],
        n_squares,
        FLAGS=flags & FLAG_MASTER,
        # Masters are float32.
        VARIANTS=variants | (variants >> 2 | variants >> 4) & 3 if flags & FLAG_MASTER else variants,
        CHUNK=chunk,
        num_warps=NUM_WARPS,
    )
