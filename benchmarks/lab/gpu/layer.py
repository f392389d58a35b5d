"""The layer's times against its rivals': forward, backward alone and both, eager and in CUDA graphs, shape by shape.

Rivals: the frozen layer (``nn.functional.linear``), LoRA written by hand, PEFT's layer, and that compiled. All hold the same
frozen weight and equal A and B in bfloat16, and dropout where it is asked for. Backward is taken alone on a graph that is kept,
with gradients of x, A and B (of x for the frozen layer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common.measure import summarize
from benchmarks.lab.cost_model import predict
from benchmarks.lab.cost_model.predict import Shape
from benchmarks.lab.gpu.device import Arms, Device
from benchmarks.lab.gpu.section import FAILED, SKIPPED, Clock, Row, Unit, note_of

COLUMNS = (
    "m", "n", "k", "r", "dropout", "mode", "direction", "arm", "status", "us", "q1_us", "q3_us", "samples", "over_frozen",
    "eager_over", "gb_s", "tflop_s", "predicted_us", "error_pct", "note", "dry",
)  # fmt: skip
DIRECTIONS = ("forward", "backward", "both")
# Eager: from an idle device, the host's launches included. Graph: the device alone.
MODES = ("graph", "eager")
P = 0.1
# Timed for this long, arms together, and at least five rounds.
SECONDS = 0.12
# The targets' own, for which PEFT's layer is compiled too.
TARGET_SIZE, TARGET_R = (4096, 4096), 16
COMPILED_M = (8192, 64, 2048, 4096)
# Of a section's time, what compiling may take; and what a first compilation is expected to.
COMPILE_SHARE, COMPILE_GUESS = 0.25, 12.0


def shapes(dry: bool) -> list[Shape]:
    """All shapes, those that the targets are about first."""
    if dry:
        return [Shape(16, 32, 32, 8, True), Shape(70, 32, 32, 8, False)]
    every = [
        Shape(m, n, k, r, p) for (n, k), m, r, p in product(predict.SIZES, predict.ROWS, predict.RANKS, (True, False))
    ]
    return sorted(every, key=_rank)


def _rank(s: Shape) -> tuple[int, ...]:
    """Smaller comes first: the targets' shapes, then their other M and ranks, then other sizes from 8B down to 1B."""
    size = 0 if (s.n, s.k) == TARGET_SIZE else 1 if max(s.n, s.k) > 8192 else 2
    if size == 0 and s.r == TARGET_R:
        asked = 2048 <= s.m <= 8192 if s.dropout else s.m <= 64
        return (0 if asked else 1, 0, 0, -s.m)
    rows = 0 if s.m in (64, 2048, 8192) else 1
    tier = 2 + rows + (0 if size == 0 else 2 * size) + (0 if s.r == TARGET_R else 1)
    return (tier, size, predict.RANKS.index(s.r), -s.m)


class Arm(NamedTuple):
    """A layer, and the tensors that its backward pass has gradients for."""

    layer: Callable[[Tensor], Tensor]
    wanted: tuple[Tensor, ...]


def build(s: Shape, device: Device) -> tuple[Tensor, Tensor, dict[str, Arm], dict[str, str]]:
    """x, the incoming gradient, the arms, and why an arm is not there."""
    make: dict[str, Any] = {"device": device.device, "dtype": torch.bfloat16}
    p = P if s.dropout else 0.0
    x = torch.randn(s.m, s.k, **make).requires_grad_()
    grad = torch.randn(s.m, s.n, **make)
    weight = nn.Parameter(torch.randn(s.n, s.k, **make) * s.k**-0.5, requires_grad=False)
    a0, b0 = torch.randn(s.r, s.k, **make) * s.k**-0.5, torch.randn(s.n, s.r, **make) * s.r**-0.5
    scaling, missing = 2.0, {}

    frozen = nn.Linear(s.k, s.n, bias=False, device="meta", dtype=torch.bfloat16)
    frozen.weight = weight
    a, b = (t.clone().requires_grad_() for t in (a0, b0))

    def by_hand(x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, p, True) if p else x
        return nn.functional.linear(x, weight) + dropped @ a.t() @ b.t() * scaling

    ours = slk.LoRALinear.from_linear(
        frozen, r=s.r, lora_alpha=scaling * s.r, lora_dropout=p, lora_dtype=torch.bfloat16
    )
    with torch.no_grad():
        ours.lora_A.copy_(a0)
        ours.lora_B.copy_(b0)
    arms = {
        "frozen": Arm(lambda x: nn.functional.linear(x, weight), (x,)),
        "eager": Arm(by_hand, (x, a, b)),
        "ours": Arm(ours, (x, ours.lora_A, ours.lora_B)),
    }
    try:
        layer = peft_layer(weight, a0, b0, p)
        arms["peft"] = Arm(layer, (x, *(q for q in layer.parameters() if q.requires_grad)))
    except Exception as error:
        missing["peft"] = note_of(error)
    return x, grad, arms, missing


def peft_layer(weight: nn.Parameter, a: Tensor, b: Tensor, p: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype))
    holder[0].weight = weight
    r = a.shape[0]
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=p, target_modules=["0"])
    wrapped = get_peft_model(holder, config, autocast_adapter_dtype=False).train()
    with torch.no_grad():
        for name, q in wrapped.named_parameters():
            if "lora_" in name:
                q.copy_(a if "lora_A" in name else b)
    layer: Any = wrapped.base_model.model
    layer = layer[0]
    assert sum(q.requires_grad for q in layer.parameters()) == 2, "PEFT's layer should have two trainable parameters"
    return layer


class Compiler:
    """Compiles PEFT's layer while its share of the time lasts."""

    def __init__(self, device: Device, seconds: float) -> None:
        self.dry, self.left, self.guess = device.dry, seconds, COMPILE_GUESS

    def arm(self, s: Shape, peft: Arm, x: Tensor, grad: Tensor) -> Arm:
        """
        Raises:
            RuntimeError: it is not to be compiled, with the reason. Any error of the compiler.
        """
        if not self.dry and ((s.n, s.k), s.r) != (TARGET_SIZE, TARGET_R):
            raise RuntimeError("compiled for the targets' shapes only")
        if not self.dry and s.m not in COMPILED_M:
            raise RuntimeError(f"compiled for M in {COMPILED_M} only")
        if not self.dry and self.left < self.guess:
            raise RuntimeError(f"compiling takes about {self.guess:.0f} s, {self.left:.0f} s are left for it")
        from torch._functorch import config

        if hasattr(config, "donated_buffer"):
            # Otherwise the compiled backward pass can't run twice on one graph.
            config.donated_buffer = False
        torch.compiler.reset()
        begun = time.perf_counter()
        # A dry run goes as far as the tracer; there may be no C++ compiler.
        layer = torch.compile(peft.layer, dynamic=False, backend="aot_eager" if self.dry else "inductor")
        torch.autograd.grad(layer(x), peft.wanted, grad)
        self.guess = time.perf_counter() - begun
        self.left -= self.guess
        return Arm(layer, peft.wanted)


def least(s: Shape, direction: str, lora: bool) -> tuple[float, float]:
    """The fewest bytes and operations: each operand read and each result written once, in 16 bits."""
    if direction == "both":
        (bytes1, flops1), (bytes2, flops2) = (least(s, one, lora) for one in ("forward", "backward"))
        return bytes1 + bytes2, flops1 + flops2
    m, n, k, r = s.m, s.n, s.k, s.r
    moved, flops = 2.0 * (m * k + n * k + m * n), 2.0 * m * n * k
    if lora:
        branch, factors = 2.0 * m * r * (n + k), 2.0 * r * (n + k)
        if direction == "forward":
            return moved + factors, flops + branch
        # X is read too, for dA; A and B are read, dA and dB written.
        return moved + 2.0 * m * k + 2 * factors, flops + 2 * branch
    return moved, flops


def known_gpu(device: Device) -> predict.Gpu | None:
    """The file in benchmarks/lab/cost_model/gpus for this device, by its name and architecture."""
    for path in sorted(predict.GPUS.glob("*.json")):
        gpu = predict.load_gpu(path.stem)
        if path.stem in device.name.lower() and gpu.arch == device.arch:
            return gpu
    return None


def runs(arm: Arm, x: Tensor, grad: Tensor, direction: str) -> Callable[[], Any]:
    """What is timed."""
    if direction == "both":
        return lambda: torch.autograd.grad(arm.layer(x), arm.wanted, grad)
    if direction == "backward":
        y = arm.layer(x)
        return lambda: torch.autograd.grad(y, arm.wanted, grad, retain_graph=True)

    # With what backward needs kept, as in training.
    return lambda: arm.layer(x).detach()


def measure(
    device: Device, s: Shape, gpu: predict.Gpu | None, compiler: Compiler, modes: tuple[str, ...]
) -> Iterator[Row]:
    x, grad, arms, missing = build(s, device)
    if "peft" in arms:
        try:
            arms["compiled"] = compiler.arm(s, arms["peft"], x, grad)
        except Exception as error:
            # A reason is short, an accident is told whole.
            missing["compiled"] = str(error) if type(error) is RuntimeError else note_of(error)
    for name, why in missing.items():
        yield {"mode": "all", "direction": "all", "arm": name, "status": SKIPPED, "note": why}
    for direction in DIRECTIONS:
        ready: Arms = {}
        for name, arm in arms.items():
            try:
                ready[name] = runs(arm, x, grad, direction)
            except Exception as error:
                yield _lost(direction, "all", name, error)
        for mode in modes:
            timed = dict(ready)
            if mode == "graph":
                for name, run in ready.items():
                    try:
                        timed[name] = device.capture(run).replay
                    except Exception as error:
                        del timed[name]
                        yield _lost(direction, mode, name, error)
            samples = device.time(timed, SECONDS, queued=mode == "graph")
            yield from rows(s, gpu, direction, mode, samples)


def _lost(direction: str, mode: str, arm: str, error: Exception) -> Row:
    """An arm that can't be timed: our own failure, or a rival that is left out."""
    status = FAILED if arm == "ours" else SKIPPED
    return {"direction": direction, "mode": mode, "arm": arm, "status": status, "note": note_of(error)}


def rows(
    s: Shape, gpu: predict.Gpu | None, direction: str, mode: str, samples: dict[str, list[float]]
) -> Iterator[Row]:
    found = {name: summarize(values) for name, values in samples.items()}
    for name, values in samples.items():
        seconds = found[name]["median"]
        moved, flops = least(s, direction, name != "frozen")
        try:
            expected = None if gpu is None else predict.predicted(gpu, s, direction, name)
        except Exception as error:
            # What was measured is kept where the model can't follow.
            print(f"no prediction: {error!r}")
            expected = None
        row: Row = {"mode": mode, "direction": direction, "arm": name, "samples": len(values)}
        row |= {
            "us": round(seconds * 1e6, 3),
            "q1_us": round(found[name]["q1"] * 1e6, 3),
            "q3_us": round(found[name]["q3"] * 1e6, 3),
            "gb_s": round(moved / seconds / 1e9, 1),
            "tflop_s": round(flops / seconds / 1e12, 2),
        }
        if "frozen" in found:
            row["over_frozen"] = round(seconds / found["frozen"]["median"], 4)
        if "eager" in found:
            row["eager_over"] = round(found["eager"]["median"] / seconds, 4)
        if expected is not None:
            row |= {"predicted_us": round(expected * 1e6, 3), "error_pct": round(100 * (expected / seconds - 1), 1)}
        yield row


def units(device: Device, clock: Clock, part: tuple[int, int]) -> list[Unit]:
    gpu, compiler = known_gpu(device), Compiler(device, COMPILE_SHARE * clock.left())
    found = []
    for s in shapes(device.dry):
        key = {"m": s.m, "n": s.n, "k": s.k, "r": s.r, "dropout": P if s.dropout else 0.0}
        # Eager times are told where the targets are, and at one rank elsewhere.
        modes = MODES if device.dry or s.r == TARGET_R else MODES[:1]
        found.append(Unit(key, partial(measure, device, s, gpu, compiler, modes), 3.0))
    return found
