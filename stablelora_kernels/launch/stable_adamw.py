"""The optimizer's launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# The optimizer reads the tables' columns here, because only launch/ imports kernels/.
from stablelora_kernels.kernels.stable_adamw import tables as tables
from stablelora_kernels.kernels.stable_adamw.step import _square_sums_kernel, _stable_adamw_kernel
from stablelora_kernels.launch.base import Arguments, Kernel, Launch, in_order, launch_counts
from stablelora_kernels.launch.prepared import Launcher, launcher_of, needs_triton


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
    clip = max_grad_norm is not None
    launches: list[Launch] = []
    if (measure or clip) and not flags & tables.FLAG_SHARDED:
        launches.append(plan_square_sums(memory, measure, clip, flags, variants, chunk))
    programs = memory.chunks.shape[0]
    arguments: Arguments = {
        "tensors_ptr": memory.tensors,
        "addresses_ptr": memory.addresses,
        "chunks_ptr": memory.chunks,
        "hyper_ptr": memory.hyper,
        "words_ptr": memory.words,
        "steps_ptr": memory.steps,
        "turns_ptr": memory.turns,
        "latched_ptr": memory.latched,
        "squares_ptr": memory.squares,
        "skipped_ptr": memory.skipped,
        # The kernel does not read the tensor that stands for None.
        "grad_scale_ptr": memory.steps if grad_scale is None else grad_scale,
        "found_inf_ptr": memory.steps if found_inf is None else found_inf,
        "grad_squares_ptr": memory.grad_squares,
        "n_chunks": programs,
        "n_grad_squares": memory.grad_squares.numel(),
        "max_grad_norm": 1.0 if max_grad_norm is None else max_grad_norm,
    }
    constants: Arguments = {
        "HAS_SCALE": grad_scale is not None,
        "HAS_INF": found_inf is not None,
        "CLIP": clip,
        "FLAGS": flags,
        "VARIANTS": variants,
        "CHUNK": chunk,
        "GRAD_SUMS": tables.MAX_GRAD_SUMS,
    }
    launches.append(_launch(_stable_adamw_kernel, programs, arguments, constants))
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
    n_grad_squares = memory.grad_squares.numel() if clip else 0
    if flags & tables.FLAG_MASTER:
        # A master is float32, so its chunks need float32's variants.
        variants |= (variants >> 2 | variants >> 4) & 3
    arguments: Arguments = {
        "tensors_ptr": memory.tensors,
        "addresses_ptr": memory.addresses,
        "chunks_ptr": memory.chunks,
        # The kernel does not write to the tensor that stands for another.
        "squares_ptr": memory.squares if measure else memory.grad_squares,
        "grad_squares_ptr": memory.grad_squares if clip else memory.squares,
        "n_chunks": n_chunks,
        "n_squares": n_squares,
    }
    constants: Arguments = {
        "FLAGS": flags & tables.FLAG_MASTER,
        "VARIANTS": variants,
        "CHUNK": chunk,
    }
    return _launch(_square_sums_kernel, n_squares + n_grad_squares, arguments, constants)


def _launch(kernel: Kernel, programs: int, arguments: Arguments, constants: Arguments) -> Launch:
    return Launch(
        kernel=kernel,
        variant="",
        reason="",
        grid=(programs,),
        args=in_order(kernel, arguments, constants),
        constants=constants,
        options={"num_warps": tables.NUM_WARPS},
    )


class Repeated:
    """Runs a :class:`Launch` of the same tensors again and again: prepared, from the second run on."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._seen = False
        self._launcher: Launcher | None = None

    def run(self, device: torch.device) -> None:
        elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
        if (
            not self._seen
            or elsewhere
            or not isinstance(self._launch.kernel, JITFunction)
            or needs_triton()
        ):
            self._launch.run(device)
            self._seen = True
            return
        if self._launcher is None:
            self._launcher = launcher_of(self._launch, device, self._launch.args)
        launch_counts[self._launch.kernel.__name__] += 1
        self._launcher.run((), (), driver.active.get_current_stream(device.index or 0))
