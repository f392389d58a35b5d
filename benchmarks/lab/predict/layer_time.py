"""Predicted times of this library's layers and gated MLPs: the bytes and operations of each launch over a GPU's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from benchmarks.lab.predict.ceilings import SLOWEST, Gpu, band_ends
from benchmarks.lab.predict.formula import Traffic
from benchmarks.lab.predict.launch_time import Facts, VendorFacts, chained_seconds, facts
from benchmarks.lab.predict.rivals import BF16, MLP, PEFT, RIVALS, Shape, Work, join, rival_seconds
from stablelora_kernels.dispatch.problem import Call, Device
from stablelora_kernels.dispatch.rules import Choice, choose, overlaps, possible_kernels
from stablelora_kernels.dispatch.settings import use_kernel
from stablelora_kernels.launch.dry_run import call_launches, mlp_launches

# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
DIRECTIONS = ("forward", "backward")


def layer_launches(device: Device, s: Shape, *choices: Choice) -> tuple[list[Any], list[Any]]:
    return call_launches(device, s.m, s.n, s.k, s.r, BF16, s.lora_dtype, s.p, *choices)


@cache
def _layer_facts(
    device: Device, overlapping: bool, narrow_columns: int, s: Shape, kernel: str
) -> tuple[list[Any], list[Any]]:
    """Of forward and backward by ``kernel``, or by "split" for a direction that has no such kernel.

    ``overlapping`` is a key alone: whether launches overlap depends on the interpreter, too.
    """
    choices = [
        Choice(kernel if kernel in possible_kernels(call_of(s, direction)) else "split", "") for direction in DIRECTIONS
    ]
    first, second = ([facts(launch, narrow_columns) for launch in way] for way in layer_launches(device, s, *choices))
    return first, second


def _facts(gpu: Gpu, s: Shape, kernel: str) -> tuple[list[Any], list[Any]]:
    return _layer_facts(gpu.device, overlaps(gpu.device), gpu.narrow_columns, s, kernel)


def kernel_seconds(gpu: Gpu, s: Shape, direction: str, kernel: str) -> float:
    """Predicted seconds of one direction by ``kernel``. "chained" is priced from the pair of launches that it joins."""
    found = _facts(gpu, s, "split" if kernel == "chained" else kernel)[direction == "backward"]
    return chained_seconds(gpu, *found) if kernel == "chained" else sum(each.seconds(gpu) for each in found)


def launch_seconds(gpu: Gpu, launch: Any) -> float:
    """One of our launches, in bf16, the vendor's product, or a rival's."""
    priced: Work | Facts | VendorFacts = launch if isinstance(launch, Work) else facts(launch, gpu.narrow_columns)
    return priced.seconds(gpu)


def ours(gpu: Gpu, s: Shape, kernels: Sequence[str] = ()) -> tuple[float, float]:
    """Predicted seconds of forward and backward, by the kernels that dispatch chooses unless they are given."""
    kernels = kernels or [choose(gpu.device, call_of(s, direction)).kernel for direction in DIRECTIONS]
    first, second = (kernel_seconds(gpu, s, *pair) for pair in zip(DIRECTIONS, kernels, strict=True))
    return first, second


def without_overlap(gpu: Gpu, s: Shape) -> float:
    """Predicted seconds of forward and backward, both split, if no work overlaps.

    dY comes from memory for dS and again for dB. dA begins after dX. No launch begins before the previous one ended.
    """
    found = [each for way in _facts(gpu, s, "split") for each in way]
    *others, wide = (each._replace(begins_early=False, ends_early=False) for each in found)
    again, x = 2 * s.m * s.n, 2 * s.m * s.k
    bare = wide._replace(grad_moved=Traffic(), grad_operations=0.0)
    return sum(each.seconds(gpu) for each in (*others, bare)) + (again + x) / gpu.bandwidth


def call_of(s: Shape, direction: str) -> Call:
    """What dispatch is asked about one direction."""
    sizes = (s.n, s.k) if direction == "forward" else (s.k, s.n)
    return Call(direction, s.m, *sizes, s.r, BF16, s.lora_dtype, s.dropout)


def best(gpu: Gpu, s: Shape, direction: str) -> dict[str, float]:
    """Predicted seconds of one direction by each kernel that can do it."""
    return {kernel: kernel_seconds(gpu, s, direction, kernel) for kernel in possible_kernels(call_of(s, direction))}


class Regret(NamedTuple):
    """Dispatch's kernel over the band: how much longer it takes than the fastest one, at the end where that is most."""

    kernel: str
    # The fastest kernel at each end, and by how much dispatch's takes longer.
    fastest: tuple[str, ...]
    at_ends: tuple[float, ...]
    # The kernel whose worst regret is the least, and that regret.
    minimax: str
    least: float

    @property
    def worst(self) -> float:
        return max(self.at_ends)


def regret(gpu: Gpu, s: Shape, direction: str, efficiency: float = SLOWEST) -> Regret:
    chosen = choose(gpu.device, call_of(s, direction)).kernel
    times = [best(end, s, direction) for end in band_ends(gpu, efficiency)]
    fastest = tuple(min(found, key=found.__getitem__) for found in times)
    regrets = {
        kernel: tuple(found[kernel] / found[first] - 1 for found, first in zip(times, fastest, strict=True))
        for kernel in times[0]
    }
    minimax = min(regrets, key=lambda kernel: max(regrets[kernel]))
    return Regret(chosen, fastest, regrets[chosen], minimax, max(regrets[minimax]))


def predicted(gpu: Gpu, s: Shape, direction: str, arm: str) -> float | None:
    """Seconds of "forward", "backward" or "both" for an arm of the GPU command, or None if the model does not know the arm."""
    name = {"eager": PEFT, "peft": PEFT}.get(arm, arm)
    if arm != "ours" and name not in RIVALS:
        return None
    times = ours(gpu, s) if arm == "ours" else [rival_seconds(gpu, works) for works in RIVALS[name](s)]
    return sum(times) if direction == "both" else times[direction == "backward"]


# A gated MLP.


def one_op(device: Device, mlp: MLP) -> tuple[list[Any], list[Any]]:
    """The launches of forward and backward of ``fuse_mlp``."""
    gate = mlp.layers()[0]
    return mlp_launches(device, mlp.m, mlp.k, mlp.f, mlp.k, mlp.r, BF16, gate.lora_dtype, gate.p)


def three_layers(device: Device, mlp: MLP) -> tuple[list[Any], list[Any]]:
    """The launches of three layers of this library, with a bias each, and of a fused activation, one each way."""
    return join(mlp, [layer_launches(device, shape) for shape in mlp.layers()], "frozen")


MLP_ARMS = {"three layers": three_layers, "one op": one_op}


def mlp_seconds(gpu: Gpu, mlp: MLP, arm: str) -> tuple[float, float]:
    """Predicted seconds of forward and backward. Launches that are chained are priced as the pairs that they join."""
    # The model has no price for a chained launch; the table takes one up to this many rows.
    with use_kernel("split" if mlp.m <= 4096 else "auto"):
        ways = MLP_ARMS[arm](gpu.device, mlp)
    forward, backward = (sum(launch_seconds(gpu, launch) for launch in way) for way in ways)
    return forward, backward
