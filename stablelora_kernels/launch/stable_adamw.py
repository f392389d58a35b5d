"""The optimizer's launches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.kernels.stable_adamw.step import _square_sums_kernel, _stable_adamw_kernel
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.prepared import Repeated


class Memory(NamedTuple):
    """What the launches of a step read and write on the device.

    The tensors are those of
    :func:`~stablelora_kernels.kernels.stable_adamw.step._stable_adamw_kernel`. None until a step
    uploads it.
    """

    steps: Tensor
    turns: Tensor
    latched: Tensor
    squares: Tensor
    grad_squares: Tensor
    skipped: Tensor
    tensors: Tensor
    chunks: Tensor
    addresses: Tensor | None = None
    hyper: Tensor | None = None
    words: Tensor | None = None


def plan_stable_adamw(
    memory: Memory,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
    measure: bool,
    flags: int,
    variants: int,
    chunk: int,
) -> tuple[Repeated, ...]:
    """The launches of one step: one, or two if gradients are clipped or ``measure`` asks for the
    parameters' sums of squares.

    With FLAG_SHARDED the caller has filled the totals and ``grad_squares`` already.
    """
    clip, launches = max_grad_norm is not None, []
    if (measure or clip) and not flags & tables.FLAG_SHARDED:
        launches.append(plan_square_sums(memory, measure, clip, flags, variants, chunk))
    programs, steps = memory.chunks.shape[0], memory.steps
    args = (
        memory.tensors,
        memory.addresses,
        memory.chunks,
        memory.hyper,
        memory.words,
        steps,
        memory.turns,
        memory.latched,
        memory.squares,
        memory.skipped,
        # The kernel does not read the tensor that stands for None.
        steps if grad_scale is None else grad_scale,
        steps if found_inf is None else found_inf,
        memory.grad_squares,
        programs,
        memory.grad_squares.numel(),
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
    launches.append(_launch(_stable_adamw_kernel, programs, args, constants))
    return tuple(map(Repeated, launches))


def plan_square_sums(
    memory: Memory, measure: bool, clip: bool, flags: int, variants: int, chunk: int
) -> Launch:
    """The launch that fills the first half of ``squares``, one sum a chunk of the parameters, if
    ``measure``; and ``grad_squares``, any number of sums that share the gradients, if ``clip``. One
    of them at least.
    """
    n_chunks = memory.chunks.shape[0]
    n_squares = n_chunks if measure else 0
    # The kernel does not write to the tensor that stands for another.
    args = (
        memory.tensors,
        memory.addresses,
        memory.chunks,
        memory.squares if measure else memory.grad_squares,
        memory.grad_squares if clip else memory.squares,
        n_chunks,
        n_squares,
    )
    constants = {
        "FLAGS": flags & tables.FLAG_MASTER,
        # A master is float32, so its chunks need float32's variants.
        "VARIANTS": variants | (variants >> 2 | variants >> 4) & 3
        if flags & tables.FLAG_MASTER
        else variants,
        "CHUNK": chunk,
    }
    return _launch(
        _square_sums_kernel,
        n_squares + (memory.grad_squares.numel() if clip else 0),
        args,
        constants,
    )


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
