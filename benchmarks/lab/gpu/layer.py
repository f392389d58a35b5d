"""The layer's times against its rivals': forward, backward alone, and both, eager and in CUDA graphs, by shape.

A graph holds many calls, by layers whose weights are larger than L2 together, and its time is divided by them. PEFT's layer is
compiled once, so its calls have one set of weights, which stays in L2 if it fits.

The arms are the suite's: the frozen layer, LoRA written by hand, PEFT's layer, and that layer compiled. All share the frozen
weight, have equal A and B in bfloat16, and the same dropout probability. Backward alone repeats on one kept graph,
with gradients of x, A and B (of x only for the frozen layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common.arms import PEFT
from benchmarks.lab.gpu import section
from benchmarks.lab.gpu.device import Arms, Device
from benchmarks.lab.gpu.load import LOAD
from benchmarks.lab.gpu.section import SKIPPED, Clock, Row, Unit, capture_all, note_of, time_arms
from benchmarks.lab.predict import layer_time
from benchmarks.lab.predict.rivals import BF16, Shape
from benchmarks.suite.layers import adapted
from stablelora_kernels.testing import layer_arms

COLUMNS = (
    "m", "n", "k", "r", "dropout", "mode", "direction", "arm", "status", "us", "q1_us", "q3_us", "samples", *LOAD,
    "over_frozen", "eager_over", "note", "dry",
)  # fmt: skip
DIRECTIONS = ("forward", "backward", "both")
RIVALS = ("frozen", "eager", "peft", "compiled")
# "eager" starts on an idle device and includes the host's launches. "graph" is the device alone.
MODES = ("graph", "eager")
# All arms together take this long, and at least five rounds.
SECONDS = 0.12
# The targets name this size and rank. Only for these is PEFT's layer compiled.
TARGET_SIZE, TARGET_R = (4096, 4096), 16
# A compilation takes about 12 seconds.
COMPILED_M = (8192, 2048)


def shapes(dry: bool) -> list[Shape]:
    """Return all shapes, the targets' first."""
    if dry:
        return [Shape(16, 32, 32, 8, True, False), Shape(70, 32, 32, 8, False, False)]
    every = [
        Shape(m, n, k, r, p, False)
        for (n, k), m, r, p in product(layer_time.SIZES, layer_time.ROWS, layer_time.RANKS, (True, False))
    ]
    return sorted(every, key=priority)


def priority(s: Shape) -> tuple[int, ...]:
    """Sort the targets' shapes first, then their other M and ranks, then other sizes from 8B models down to 1B."""
    size = 0 if (s.n, s.k) == TARGET_SIZE else 1 if max(s.n, s.k) > 8192 else 2
    if size == 0 and s.r == TARGET_R:
        in_target = 2048 <= s.m <= 8192 if s.dropout else s.m <= 64
        return (0 if in_target else 1, 0, 0, -s.m)
    rows = 0 if s.m in (64, 2048, 8192) else 1
    tier = 2 + rows + (0 if size == 0 else 2 * size) + (0 if s.r == TARGET_R else 1)
    return (tier, size, layer_time.RANKS.index(s.r), -s.m)


def key_of(s: Shape) -> Row:
    return {"m": s.m, "n": s.n, "k": s.k, "r": s.r, "dropout": s.p}


class Arm(NamedTuple):
    """A layer, and the tensors for which its backward pass computes gradients."""

    layer: Callable[[Tensor], Tensor]
    wanted: tuple[Tensor, ...]


class Layers:
    """x, an incoming gradient, the suite's arms for a shape, and why an arm is missing. An arm has layers of equal sizes."""

    def __init__(self, s: Shape, device: Device, rivals: bool = True) -> None:
        make: dict[str, Any] = {"device": device.device, "dtype": BF16}
        self.x = torch.randn(s.m, s.k, **make).requires_grad_()
        self.grad = torch.randn(s.m, s.n, **make)
        self.missing: dict[str, str] = {}
        self.arms: dict[str, list[Arm]] = {}
        for _ in range(device.rotation(s.n * s.k * BF16.itemsize)):
            frozen, eager, ours = layer_arms(s.k, s.n, s.r, s.p, BF16, device.device)
            self._add("ours", ours)
            if not rivals:
                continue
            self._add("frozen", frozen)
            self._add("eager", eager)
            try:
                self._add("peft", adapted(nn.ModuleDict({"layer": frozen}), PEFT, s.r, s.p)["layer"])
            except Exception as error:
                self.missing["peft"] = note_of(error)

    def _add(self, name: str, layer: nn.Module) -> None:
        arm = Arm(layer, (self.x, *(p for p in layer.parameters() if p.requires_grad)))
        self.arms.setdefault(name, []).append(arm)

    def calls(self, name: str, direction: str) -> list[Callable[[], Any]]:
        """Return the call that is timed, of each of the arm's layers."""
        return [self._call(arm, direction) for arm in self.arms[name]]

    def _call(self, arm: Arm, direction: str) -> Callable[[], Any]:
        layer, wanted = arm
        if direction == "both":
            return lambda: torch.autograd.grad(layer(self.x), wanted, self.grad)
        if direction == "backward":
            # Not yet: a rival's forward may fail.
            forward = cache(partial(layer, self.x))
            return lambda: torch.autograd.grad(forward(), wanted, self.grad, retain_graph=True)
        # As in training, forward saves what backward needs.
        return lambda: layer(self.x).detach()


def compiled(device: Device, s: Shape, layers: Layers) -> Arm:
    """Compile PEFT's layer.

    Raises:
        RuntimeError: it is not to be compiled, with the reason. The compiler may raise other errors.
    """
    if not device.dry and ((s.n, s.k), s.r, s.m in COMPILED_M) != (TARGET_SIZE, TARGET_R, True):
        raise RuntimeError(f"compiled only for M in {COMPILED_M}, size {TARGET_SIZE} and r {TARGET_R}")
    from torch._functorch import config

    if hasattr(config, "donated_buffer"):
        # With donated buffers the compiled backward pass cannot run twice on one graph.
        config.donated_buffer = False
    torch.compiler.reset()
    peft = layers.arms["peft"][0]
    # A dry run stops at the tracer: there may be no C++ compiler.
    layer = torch.compile(peft.layer, dynamic=False, backend="aot_eager" if device.dry else "inductor")
    torch.autograd.grad(layer(layers.x), peft.wanted, layers.grad)
    return Arm(layer, peft.wanted)


def measure(device: Device, s: Shape, modes: tuple[str, ...]) -> Iterator[Row]:
    layers = Layers(s, device)
    if "peft" in layers.arms:
        try:
            layers.arms["compiled"] = [compiled(device, s, layers)]
        except Exception as error:
            # A RuntimeError of ours is a short reason. Keep the traceback of anything else.
            layers.missing["compiled"] = str(error) if type(error) is RuntimeError else note_of(error)
    for name, why in layers.missing.items():
        yield {"mode": "all", "direction": "all", "arm": name, "status": SKIPPED, "note": why}
    for direction, mode in product(DIRECTIONS, modes):
        calls = {name: layers.calls(name, direction) for name in layers.arms}
        arms: Arms = {name: runs[0] for name, runs in calls.items()}
        key: Row = {"mode": mode, "direction": direction}
        if mode == "graph":
            # Only our own failure fails the check.
            arms, failed = capture_all(device, calls, "arm", rivals=RIVALS)
            yield from ({**key, **row} for row in failed)
        columns = time_arms(device, arms, SECONDS, queued=mode == "graph")
        for name, row in columns.items():
            over = {"over_frozen": round(row["us"] / columns["frozen"]["us"], 4)} if "frozen" in columns else {}
            yield {**key, "arm": name, **row, **over}


def units(device: Device, clock: Clock) -> list[Unit]:
    found = []
    for s in shapes(device.dry):
        # Eager times at one rank are enough.
        modes = MODES if device.dry or s.r == TARGET_R else MODES[:1]
        found.append(Unit(key_of(s), partial(measure, device, s, modes), 3.0))
    return found


if __name__ == "__main__":
    section.main(COLUMNS, units)
