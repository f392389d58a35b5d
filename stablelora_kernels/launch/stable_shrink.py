"""The launch of a shrinkage before another optimizer's step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The engine reads the table's columns here, because only launch/ imports kernels/.
from stablelora_kernels.kernels.stable_adamw import tables as tables
from stablelora_kernels.kernels.stable_adamw.shrink import _stable_shrink_kernel
from stablelora_kernels.launch.base import Arguments, Launch, in_order
from stablelora_kernels.launch.stable_adamw import Repeated as Repeated


class Memory(NamedTuple):
    """What the launch reads and writes on the device: the tensors of
    :func:`~stablelora_kernels.kernels.stable_adamw.shrink._stable_shrink_kernel`.
    """

    pairs: Tensor
    programs: Tensor
    ratios: Tensor
    steps: Tensor
    latched: Tensor
    arrived: Tensor
    squares: Tensor


def plan_stable_shrink(
    memory: Memory, found_inf: Tensor | None, summed: bool, cut: bool, variants: int, chunk: int
) -> Launch:
    """The one launch for all pairs of a device; ``summed`` if the caller has filled ``squares`` with
    the sums over all processes.
    """
    arguments: Arguments = {
        "pairs_ptr": memory.pairs,
        "programs_ptr": memory.programs,
        "ratios_ptr": memory.ratios,
        "steps_ptr": memory.steps,
        "latched_ptr": memory.latched,
        "arrived_ptr": memory.arrived,
        "squares_ptr": memory.squares,
        # The kernel does not read the tensor that stands for None.
        "found_inf_ptr": memory.squares if found_inf is None else found_inf,
        "n_pairs": memory.ratios.shape[0],
    }
    constants: Arguments = {
        "HAS_INF": found_inf is not None,
        "SUMMED": summed,
        "CUT": cut,
        "VARIANTS": variants,
        "CHUNK": chunk,
    }
    return Launch(
        kernel=_stable_shrink_kernel,
        variant="",
        reason="",
        grid=(memory.programs.shape[0],),
        args=in_order(_stable_shrink_kernel, arguments, constants),
        constants=constants,
        options={"num_warps": tables.NUM_WARPS},
    )
