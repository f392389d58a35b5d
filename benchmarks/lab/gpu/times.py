"""The calls that ``benchmarks.lab.gpu`` times on the device's clock: this library's arms and rivals', eager and in CUDA graphs.

A graph holds many calls, by copies of the layer whose weights are larger than L2 together: the device alone, with weights from
memory. An eager call starts on an idle device and includes the host's launches. Backward's time is that of forward and backward
less forward's, round by round. pytest runs each shape as a test of its own.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.records import record
from benchmarks.lab.gpu.device import MOST_CALLS, WARMUP, Arm, Device, Run, Samples
from benchmarks.lab.gpu.report import EAGER, GRAPH, PARTS, PRODUCT, S_ALONE
from benchmarks.lab.gpu.rows import FAILED, NOTE_LENGTH, SKIPPED, Row
from benchmarks.lab.predict.layer_time import RANKS, ROWS, SIZES
from benchmarks.suite.layers import build_arms
from benchmarks.suite.mlp import MLPCase
from benchmarks.suite.projections import ProjectionsCase
from benchmarks.suite.rivals import Case
from stablelora_kernels.dispatch.problem import Call, device_of
from stablelora_kernels.dispatch.rules import Choice, possible_kernels
from stablelora_kernels.dispatch.settings import KERNELS
from stablelora_kernels.launch.lora_common import forward_product, shrink
from stablelora_kernels.launch.lora_linear import product_launches

# One whole call of each phase; and how to build it for each arm, which may fail.
Phases = dict[str, Run]
Arms = dict[str, Callable[[], Phases]]
# A mode, a phase and an arm.
Name = tuple[str, str, str]
DRY = os.environ.get("SLK_GPU_DRY_RUN") == "1"
BF16 = torch.bfloat16
COMPILED, EAGER_STEP, GRAPHED_STEP = "compiled", "eager step", "GraphedStep"
RIVALS = ("eager", "peft", COMPILED, MLPCase.rival, EAGER_STEP, *{*optimizers.ARMS} - {optimizers.OURS})
# Our op for a gated MLP with gate, up and the activation forced into one kernel, or into separate products.
FORCED = {"one op, in one kernel": "split", "one op, vendor's products": "vendor"}
# Arms that are timed in one mode alone. These optimizers wait for the host.
ONLY_GRAPH = (*KERNELS[1:], *PARTS, *FORCED)
ONLY_EAGER = (EAGER_STEP, GRAPHED_STEP, optimizers.NAIVE_FOREACH, optimizers.ADAMW_FOREACH)
# (out, in) of the seven linear layers in one of an 8B model's 32 blocks: 448 tensors, 41.9M parameters at r 16.
BLOCK = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
# All arms are timed for so many seconds an arm and phase, in turns, and for five rounds at least.
SECONDS = 0.03


def phases_of(call: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], x: Tensor, grad: Tensor) -> Phases:
    wanted = (x, *(p for p in parameters if p.requires_grad))
    return {"forward": lambda: call(x), "both": lambda: torch.autograd.grad(call(x), wanted, grad)}


def inputs(device: Device, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Return x [m, k], which requires a gradient, and an incoming gradient [m, n]."""
    x, grad = (torch.randn(m, size, device=device.device, dtype=BF16) for size in (k, n))
    return x.requires_grad_(), grad


def forced(kernel: str, run: Run) -> None:
    with slk.use_kernel(kernel):
        run()


def arms_of(case: Case) -> Arms:
    """Return the arms of a case of the suite. Each phase ends with what drops a round's outputs and gradients."""
    case.open()

    def build(arm: str) -> Phases:
        parts = case.build(arm)

        def call(names: tuple[str, ...]) -> None:
            for name in (*names, "prepare"):
                parts[name]()

        return {phase: partial(call, names) for phase, names in case.phases.items()}

    return {arm: partial(build, arm) for arm in case.arms}


def layer(device: Device, m: int, n_out: int, k: int, r: int, dropout: float) -> Arms:
    """Return the suite's layers; ours by each kernel, backward behind dispatch's forward; and the parts of a forward."""
    modules, (x, grad) = build_arms(k, n_out, r, dropout, BF16, device.device), inputs(device, m, k, n_out)
    peft, ours = modules["peft"], modules["ours"]
    weight, a, b = (tensor.detach() for tensor in (ours.weight, ours.lora_A, ours.lora_B))
    y, s = (torch.empty(m, size, device=device.device, dtype=BF16) for size in (n_out, r))
    own, seed = device_of(device.device), torch.zeros(1, dtype=torch.int64, device=device.device)

    def compiled() -> Phases:
        torch.compiler.reset()
        # A dry run stops at the tracer: there may be no C++ compiler.
        call = torch.compile(peft, dynamic=False, backend="aot_eager" if device.dry else "inductor")
        return phases_of(call, peft.parameters(), x, grad)

    def by(kernel: str) -> Phases:
        def both() -> None:
            out = ours(x)
            forced(kernel, lambda: torch.autograd.grad(out, (x, ours.lora_A, ours.lora_B), grad))

        phases = {"forward": partial(forced, kernel, lambda: ours(x)), "both": both}
        calls = (
            Call("forward", m, n_out, k, r, BF16, BF16, dropout > 0),
            Call("backward", m, k, n_out, r, BF16, BF16, dropout > 0),
        )
        able = [kernel in possible_kernels(call) for call in calls]
        return {phase: run for (phase, run), can in zip(phases.items(), able, strict=True) if can}

    def alone(part: str) -> Phases:
        if part == S_ALONE:
            launch = shrink(own, forward_product(x.detach(), weight, None, a, b, s, y, seed, 1.0, dropout))
        else:
            bare = forward_product(x.detach(), weight, None, a[:0], b[:, :0], None, y, None, 1.0, 0.0)
            (launch,) = product_launches(own, bare, Choice("split" if part == PRODUCT else "vendor", ""))
        return {"forward": partial(launch.run, device.device)}

    arms: Arms = {name: partial(phases_of, arm, [*arm.parameters()], x, grad) for name, arm in modules.items()}
    # A compilation takes about 12 seconds.
    if device.dry or (m in (2048, 8192) and n_out == k == 4096 and r == 16):
        arms[COMPILED] = compiled
    return (
        arms | {kernel: partial(by, kernel) for kernel in KERNELS[1:]} | {part: partial(alone, part) for part in PARTS}
    )


def mlp(device: Device, m: int, k: int, f: int, r: int, dropout: float) -> Arms:
    """Return the suite's arms, the one op by forced kernels, and a rival on PyTorch's operators without casts."""
    arms = arms_of(MLPCase(m, k, f, r, "bf16", device.device, dropout))

    def one_op(kernel: str) -> Phases:
        return {phase: partial(forced, kernel, run) for phase, run in arms[MLPCase.ours[0]]().items()}

    def eager() -> Phases:
        sizes = ((k, f), (k, f), (f, k))
        layers = nn.ModuleList(build_arms(*size, r, dropout, BF16, device.device)["eager"] for size in sizes)
        gate, up, down = layers
        x, grad = inputs(device, m, k, k)
        return phases_of(lambda x: down(nn.functional.silu(gate(x)) * up(x)), layers.parameters(), x, grad)

    return arms | {arm: partial(one_op, kernel) for arm, kernel in FORCED.items()} | {"eager": eager}


def projections(device: Device, m: int, k: int, n_out: str, r: int, dropout: float) -> Arms:
    sizes = tuple(map(int, n_out.split("+")))
    return arms_of(ProjectionsCase(m, k, sizes, r, "bf16", device.device, dropout))


def step(device: Device, blocks: int, r: int, scale: int, dtype: str, state: str) -> Arms:
    """Return optimizers over ``blocks`` of an 8B model's blocks, whose sizes are divided by ``scale``."""
    make: dict[str, Any] = {"device": device.device, "dtype": getattr(torch, dtype)}
    latched = state == "latched"

    def build(arm: str) -> Phases:
        pairs = []
        for i, (n, k) in enumerate(BLOCK * blocks):
            # B is zero, or so large that all pairs latch at the first step.
            a, b = torch.randn(r, k // scale, **make) / k**0.5, torch.full((n // scale, r), float(latched), **make)
            for half in (a, b):
                half.requires_grad_().grad = torch.randn_like(half) * 1e-3
            pairs.append(slk.LoRAPair(f"layer{i}", a, b))
        options = {"capturable": not device.dry} if arm == optimizers.ADAMW_FUSED else {}
        optimizer = optimizers.build(arm, pairs, lr=optimizers.LR, **options)
        optimizer.step()
        if arm == optimizers.OURS and {pair.latched for pair in optimizer.stability()} != {latched}:
            raise RuntimeError(f"every pair must be {state} after the first step")
        return {"step": optimizer.step}

    names = (optimizers.NAIVE_FOREACH, optimizers.ADAMW_FOREACH, optimizers.ADAMW_FUSED, optimizers.OURS)
    return {arm: partial(build, arm) for arm in names}


def captured(device: Device, rows: int, width: int, layers: int, dropout: float) -> Arms:
    """Return forward, backward and Stable-LoRA's step of a few layers in bfloat16 with float32 A and B."""
    make: dict[str, Any] = {"device": device.device, "dtype": BF16}

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).float().square().mean()

    def build(graphed: bool) -> Phases:
        layer = partial(slk.LoRALinear, r=16, lora_dropout=dropout, lora_dtype=torch.float32, **make)
        model, x = nn.Sequential(*(layer(width, width) for _ in range(layers))), torch.randn(rows, width, **make)
        optimizer = slk.StableLoRAAdamW.from_model(model, lr=optimizers.LR, capturable=not device.dry)
        take = slk.GraphedStep(model, optimizer, loss_of, num_warmup_iters=WARMUP, enabled=graphed)
        for _ in range(WARMUP + 1):
            take(x)
        return {"step": partial(take, x)}

    return {EAGER_STEP: partial(build, False), GRAPHED_STEP: partial(build, not device.dry)}


def role_of(arm: str) -> str:
    """Return records' role. A forced kernel and a part have none."""
    if arm in RIVALS or arm in ONLY_GRAPH:
        return "rival" if arm in RIVALS else ""
    return "base" if arm.startswith("frozen") else "ours"


def backwards(times: Mapping[Name, Samples]) -> Iterator[tuple[Name, Samples]]:
    """Yield backward's seconds by arm: a forced kernel's behind the forward of ours."""
    for (mode, phase, arm), both in times.items():
        forward = times.get((mode, "forward", "ours" if arm in KERNELS else arm))
        if phase == "both" and forward:
            device, host = ([b - f for b, f in zip(*each, strict=True)] for each in zip(both, forward, strict=True))
            yield (mode, "backward", arm), (device, host)


def measure(device: Device, make: Callable[..., Arms], sizes: Row) -> Iterator[Row]:
    """Build the arms, for each mode anew, and time all of them in turns."""
    count = device.replicas(2 * sizes["n_out"] * sizes["k"]) if make is layer else 1
    copies, runs = [make(device, **sizes) for _ in range(count)], dict[Name, Arm]()
    for mode, arm in product((GRAPH, EAGER), copies[0]):
        if arm in (ONLY_EAGER if mode == GRAPH else ONLY_GRAPH):
            continue
        try:
            built = [arms[arm]() for arms in (copies if mode == GRAPH and arm != COMPILED else copies[:1])]
            for phase, run in built[0].items():
                run()
                # A second step in a graph would upload the optimizer's tables again.
                calls, most = [phases[phase] for phases in built], 1 if phase == "step" else MOST_CALLS
                runs[mode, phase, arm] = device.capture(calls, most) if mode == GRAPH else (run, 0)
        except Exception:
            # Only our own failure fails the check.
            status = SKIPPED if role_of(arm) in ("base", "rival") else FAILED
            yield {"arm": arm, "mode": mode, "status": status, "note": traceback.format_exc()[-NOTE_LENGTH:]}
    times, load = device.time(runs, SECONDS * len(runs))
    case = " ".join(f"{name} {value}" for name, value in sizes.items())
    for (mode, phase, arm), (seconds, host) in [*times.items(), *backwards(times)]:
        named = partial(record, case, phase, arm, role=role_of(arm))
        yield named("us", [1e6 * each for each in seconds]) | {"mode": mode, **load}
        if mode == EAGER:
            yield named("host_us", [1e6 * each for each in host]) | {"mode": mode}
        if (mode, phase) == (EAGER, "both"):
            yield named("peak_bytes", [device.peak_bytes(runs[mode, phase, arm][0])]) | {"mode": mode}


def departures(shape: tuple[Any, ...]) -> int:
    """Return how far a shape is from those that the targets name, which come first."""
    m, n, k, r, _ = shape
    return 2 * ((n, k) != (4096, 4096)) + (r != 16) + (m not in (64, 2048, 8192))


DROPOUT = (0.1, 0.0)
TARGETS = [(m, 4096, 4096, 16, 0.1) for m in (2048, 4096, 8192)] + [(m, 4096, 4096, 16, 0.0) for m in (1, 16, 64)]
# What predictions cannot decide: one launch, two or the vendor's product for many rows; S beside a product of few rows at
# ranks of 32 and 64; split-K from 65 rows up; long sums.
DOUBTS = [
    *((m, n, 4096, r, 0.0) for m, r, n in product((16, 64), (32, 64), (4096, 14336))),
    *((m, 4096, 4096, 16, 0.0) for m in (128, 256, 384)),
    *((m, 4096, 14336, 16, 0.1) for m in (512, 4096)),
]
SHAPES = sorted(((m, *nk, r, p) for m, nk, r, p in product(ROWS, SIZES, RANKS, DROPOUT)), key=departures)
# The sizes of a dry run, and of a GPU in the order in which they are timed.
SECTIONS: dict[Callable[..., Arms], tuple[list[Any], Iterable[Any]]] = {
    layer: ([(16, 32, 32, 8, 0.1), (70, 32, 32, 8, 0.0)], dict.fromkeys(TARGETS + DOUBTS + SHAPES)),
    mlp: ([(70, 48, 72, 4, 0.1)], product((8192, 2048, 16384, 512), (4096,), (14336,), (16, 64), DROPOUT)),
    projections: (
        [(70, 48, "32+16", 4, 0.1)],
        product((2048, 64), (4096,), ("4096+1024+1024", "14336+14336"), (16,), DROPOUT),
    ),
    captured: ([(9, 48, 4, 0.1)], product((512, 64, 4096, 16), (4096,), (4,), DROPOUT)),
    step: (
        [(1, 2, 64, "float32", state) for state in ("shrinking", "latched")],
        product((32,), (16,), (1,), ("float32", "bfloat16"), ("shrinking", "latched")),
    ),
}
CASES = [
    pytest.param(make, values, id=f"{make.__name__} {' '.join(map(str, values))}")
    for make, sizes in SECTIONS.items()
    for values in sizes[not DRY]
]


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    with slk.use_backend("triton"):
        yield Device(DRY)


@pytest.mark.parametrize(("make", "values"), CASES)
def test_times(
    make: Callable[..., Arms], values: Any, device: Device, record_property: Callable[[str, Any], None]
) -> None:
    sizes = dict(zip([*signature(make).parameters][1:], values, strict=True))
    columns = sizes
    if make is layer:
        m, n, k, r, p = values
        explained = slk.explain(m, n, k, r, BF16, p, lora_dtype=BF16, device=device.device)
        columns = sizes | {"chosen_forward": explained.forward_kernel, "chosen_backward": explained.backward_kernel}
    for row in measure(device, make, sizes):
        record_property("row", columns | row)
    # Raises if the GPU is unusable, as after an illegal address.
    device.synchronize()
