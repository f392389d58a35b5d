"""The optimizer's launches."""

from __future__ import annotations

from typing import Any

import torch

from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.kernels.stable_adamw.norms import _square_sums_kernel
from stablelora_kernels.kernels.stable_adamw.step import _stable_adamw_kernel
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.prepared import Repeated


def plan_stable_adamw(
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
) -> tuple[Repeated, ...]:
    """The launches of one step: one, or two if gradients are clipped or ``measure`` asks for the parameters' sums of squares.

    With FLAG_SHARDED the caller has filled the totals and ``grad_squares`` already. The tensors are those of
    :func:`~stablelora_kernels.kernels.stable_adamw.step._stable_adamw_kernel`.
    """
    clip, launches = max_grad_norm is not None, []
    if (measure or clip) and not flags & tables.FLAG_SHARDED:
        sums = squares[0] if measure else None, grad_squares if clip else None
        launches.append(plan_square_sums(tensors, addresses, chunks, *sums, flags, variants, chunk))
    args = (
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
        # The kernel does not read the tensor that stands for None.
        steps if grad_scale is None else grad_scale,
        steps if found_inf is None else found_inf,
        grad_squares,
        chunks.shape[0],
        grad_squares.numel(),
        1.0 if max_grad_norm is None else max_grad_norm,
    )
    constants = {
        "HAS_SCALE": grad_scale is not None,
        "HAS_INF": found_inf is not None,
        "CLIP": clip,
        "FLAGS": flags,
        "VARIANTS": variants,
        "CHUNK": chunk,
        "GRAD_SUMS": tables.MAX_GRAD_SUMS,
    }
    launches.append(_launch(_stable_adamw_kernel, chunks.shape[0], args, constants))
    return tuple(map(Repeated, launches))


def plan_square_sums(
    tensors: torch.Tensor,
    addresses: torch.Tensor,
    chunks: torch.Tensor,
    squares: torch.Tensor | None,
    grad_squares: torch.Tensor | None,
    flags: int,
    variants: int,
    chunk: int,
) -> Launch:
    """The launch that fills ``squares``, one sum a chunk of the parameters, and ``grad_squares``, any number of sums that share
    the gradients.

    Either may be None, but not both.
    """
    n_squares = 0 if squares is None else squares.numel()
    # The kernel does not write to the tensor that stands for None.
    either = squares if grad_squares is None else grad_squares
    assert either is not None
    args = (
        tensors,
        addresses,
        chunks,
        either if squares is None else squares,
        either,
        chunks.shape[0],
        n_squares,
    )
    constants = {
        "FLAGS": flags & tables.FLAG_MASTER,
        # A master is float32, so its chunks need float32's variants.
        "VARIANTS": variants | (variants >> 2 | variants >> 4) & 3 if flags & tables.FLAG_MASTER else variants,
        "CHUNK": chunk,
    }
    programs = n_squares + (0 if grad_squares is None else grad_squares.numel())
    return _launch(_square_sums_kernel, programs, args, constants)


def _launch(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    return Launch(
        kernel=kernel,
        variant="",
        reason="",
        grid=(programs,),
        args=args,
        constants=constants,
        options={"num_warps": tables.NUM_WARPS},
    )
