"""The calls that ``benchmarks.lab.gpu`` times on the device's clock: this library's arms and
rivals', eager and in CUDA graphs.

A graph holds many calls, by copies of the layer whose weights are larger than L2 together: the
device alone, with weights from memory. An eager call starts on an idle device and includes the
host's launches. Backward's time is that of forward and backward less forward's, round by round.
pytest runs each shape as a test of its own.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import stablelora_kernels as slk
from benchmarks.common import optimizers
from benchmarks.common.arms import OURS, PEFT
from benchmarks.common.records import record
from benchmarks.lab.gpu import parts
from benchmarks.lab.gpu.device import MOST_CALLS, Arm, Device, Run, Samples
from benchmarks.lab.gpu.parts import Shape, UnavailableError
from benchmarks.lab.gpu.report import EAGER, FEW, GRAPH, MANY, MANY_LAUNCHES, ONE_LAUNCH
from benchmarks.lab.gpu.rows import FAILED, NOTE_LENGTH, SKIPPED, Row
from benchmarks.suite.layers import EAGER as BY_HAND
from benchmarks.suite.layers import FROZEN, PEFT_COMPILED, LayerCase, MLPCase, ProjectionsCase
from stablelora_kernels.dispatch.problem import Call, device_of
from stablelora_kernels.dispatch.rules import possible_strategies
from stablelora_kernels.dispatch.settings import STRATEGIES

# One whole call of each phase; and how to build it for each arm, which may fail.
Phases = dict[str, Run]
Arms = dict[str, Callable[[], Phases]]
# A mode, a phase and an arm.
Name = tuple[str, str, str]
DRY = os.environ.get("SLK_GPU_DRY_RUN") == "1"
BF16 = torch.bfloat16
# Our op for a gated MLP with gate, up and the activation forced into one kernel, or into separate
# products.
FORCED = {"one op, in one kernel": "one_launch", "one op, vendor's products": "branch_first"}
# The vendor's product, written and added to what is there, by beta; and all of our launches that
# come before it if it is added.
PRODUCTS = {"addmm_, beta 0": 0.0, "addmm_, beta 1": 1.0}
BRANCH_ALONE = "branch alone"
# Arms that are timed in one mode alone. These optimizers wait for the host.
ONLY_GRAPH = (*STRATEGIES[1:], *FORCED, *PRODUCTS, BRANCH_ALONE)
ROLES = dict.fromkeys((BY_HAND, PEFT, PEFT_COMPILED, *optimizers.ARMS), "rival") | dict.fromkeys(
    ONLY_GRAPH, ""
)
ROLES[optimizers.OURS] = "ours"
ONLY_EAGER = (optimizers.NAIVE_FOREACH, optimizers.ADAMW_FOREACH)
# (out, in) of the seven linear layers in one of an 8B model's 32 blocks: 448 tensors, 41.9M
# parameters at r 16.
BLOCK = (
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
)
# All arms are timed for so many seconds an arm and phase, in turns, and for five rounds at least.
SECONDS, HEADLINE_SECONDS = 0.03, 0.2


def arms_of(
    case: LayerCase, arms: Iterable[str], forced: Mapping[str, tuple[str, str]], ours: str
) -> Arms:
    """Return ``arms`` of a case of the suite, and ``ours`` by the strategies in ``forced``, of
    forward and backward.
    """
    case.open()

    def build(arm: str, strategies: tuple[str, str]) -> Phases:
        parts = case.build(arm)

        def call(*names: str) -> None:
            for name in names:
                strategy = strategies[name == "backward"]
                with slk.settings(backend="triton", strategy=strategy):
                    parts[name]()
            # It drops the outputs and gradients.
            parts["prepare"]()

        phases = {"forward": partial(call, "forward")}
        # A strategy of the forward alone has no backward.
        if strategies[0] == strategies[1]:
            phases["both"] = partial(call, "forward", "backward")
        return phases

    found = {arm: partial(build, arm, ("auto", "auto")) for arm in arms}
    return found | {name: partial(build, ours, strategies) for name, strategies in forced.items()}


def layer_arms(
    device: Device, m: int, n_out: int, k: int, r: int, dropout: float, rivals: Iterable[str]
) -> Arms:
    """Return the frozen layer, ``rivals``, ours, and ours by each strategy that can do it."""
    more = r, BF16, BF16, dropout > 0
    forward, backward = (
        possible_strategies(call)
        for call in (Call("forward", m, n_out, k, *more), Call("backward", m, k, n_out, *more))
    )
    forced = {
        strategy: (strategy, strategy if strategy in backward else "auto") for strategy in forward
    }
    case = LayerCase(m, k, n_out, r, "bf16", device.device, dropout)
    return arms_of(case, (FROZEN, *rivals, OURS), forced, OURS)


def layer(device: Device, m: int, n_out: int, k: int, r: int, dropout: float) -> Arms:
    """Return the suite's arms, and ours by each strategy that can do it."""
    # A compilation takes about 12 seconds.
    compiled = (PEFT_COMPILED,) if m in (2048, 8192) and n_out == k == 4096 and r == 16 else ()
    return layer_arms(device, m, n_out, k, r, dropout, (BY_HAND, PEFT, *compiled))


def headline(device: Device, m: int, n_out: int, k: int, r: int, dropout: float) -> Arms:
    """Return the arms of :func:`layer` without the compiled one, and what "branch_first" is
    made of: the branch, and the vendor's product, which writes or adds.
    """
    calls = parts.calls(Shape(m, n_out, k, r, dropout), partial(random, device))
    by_phase = {"forward": calls.forward, "dX": calls.backward}

    def product(beta: float) -> Phases:
        return {
            phase: partial(p.y.addmm_, p.x, p.w.t(), beta=beta) for phase, p in by_phase.items()
        }

    def branch() -> Phases:
        known = device_of(device.device)
        return {
            phase: partial(parts.run_all, parts.branch_first(known, p)[:-1], device.device)
            for phase, p in by_phase.items()
        }

    arms = layer_arms(device, m, n_out, k, r, dropout, (BY_HAND, PEFT))
    arms |= {name: partial(product, beta) for name, beta in PRODUCTS.items()}
    return arms | {BRANCH_ALONE: branch}


def random(device: Device, *size: int, dtype: torch.dtype) -> Tensor:
    """Random values, or zeros of an integer type."""
    draw = torch.randn if dtype.is_floating_point else torch.zeros
    return draw(*size, dtype=dtype, device=device.device)


def apart(device: Device, m: int, n_out: int, k: int, r: int, dropout: float) -> Arms:
    """Return each job of a layer's forward and backward as a launch, and the branch ahead of the
    vendor's product: timed among many and alone.
    """

    def build(make_run: Callable[[], Run]) -> Phases:
        return dict.fromkeys((MANY_LAUNCHES, ONE_LAUNCH), make_run())

    shape = Shape(m, n_out, k, r, dropout)
    runs = parts.runs(device_of(device.device), device.device, shape, partial(random, device))
    return {name: partial(build, make_run) for name, make_run in runs.items()}


class MLP(MLPCase):
    """With adapters in bfloat16: PEFT casts no activation then, so it is the faster rival."""

    float32: ClassVar = False


def modules(device: Device, kind: str, m: int, n_out: Any, k: int, r: int, dropout: float) -> Arms:
    """Return the suite's arms of projections of one x, or of a gated MLP, with the one op by forced
    strategies.
    """
    make: type[LayerCase] = {"mlp": MLP, "projections": ProjectionsCase}[kind]
    case = make(m, k, n_out, r, "bf16", device.device, dropout)
    forced = {arm: (strategy,) * 2 for arm, strategy in FORCED.items()} if kind == "mlp" else {}
    return arms_of(case, case.arms, forced, case.ours[0])


def step(device: Device, blocks: int, r: int, scale: int, dtype: str, state: str) -> Arms:
    """Return optimizers over ``blocks`` of an 8B model's blocks, whose sizes are divided by
    ``scale``.
    """
    make: dict[str, Any] = {"device": device.device, "dtype": getattr(torch, dtype)}
    latched = state == "latched"

    def build(arm: str) -> Phases:
        pairs = []
        for i, (n, k) in enumerate(BLOCK * blocks):
            # B is zero, or so large that all pairs latch at the first step.
            a = torch.randn(r, k // scale, **make) / k**0.5
            b = torch.full((n // scale, r), float(latched), **make)
            for half in (a, b):
                half.requires_grad_().grad = torch.randn_like(half) * 1e-3
            pairs.append(slk.LoRAPair(f"layer{i}", a, b))
        options = {"capturable": not device.dry} if arm == optimizers.ADAMW_FUSED else {}
        optimizer = optimizers.build(arm, pairs, lr=optimizers.LR, **options)
        optimizer.step()
        if arm == optimizers.OURS and {pair.latched for pair in optimizer.stability()} != {latched}:
            raise RuntimeError(f"every pair must be {state} after the first step")
        return {"step": optimizer.step}

    names = (
        optimizers.NAIVE_FOREACH,
        optimizers.ADAMW_FOREACH,
        optimizers.ADAMW_FUSED,
        optimizers.OURS,
    )
    return {arm: partial(build, arm) for arm in names}


def captured(device: Device, rows: int, width: int, layers: int, dropout: float) -> Arms:
    """Return forward, backward and Stable-LoRA's step of a few layers in bfloat16 with float32 A
    and B.
    """
    make: dict[str, Any] = {"device": device.device, "dtype": BF16}

    def build() -> Phases:
        layer = partial(
            slk.LoRALinear, r=16, lora_dropout=dropout, lora_dtype=torch.float32, **make
        )
        model = nn.Sequential(*(layer(width, width) for _ in range(layers)))
        x = torch.randn(rows, width, **make)
        optimizer = slk.StableLoRAAdamW.from_model(
            model, lr=optimizers.LR, capturable=not device.dry
        )

        def take() -> None:
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

        return {"step": take}

    return {OURS: build}


def role_of(arm: str) -> str:
    """Return records' role. A forced strategy has none."""
    return ROLES.get(arm, "base" if arm.startswith("frozen") else "ours")


def backwards(times: Mapping[Name, Samples]) -> Iterator[tuple[Name, Samples]]:
    for (mode, phase, arm), both in times.items():
        if phase == "both":
            forward = times[mode, "forward", arm]
            device, host = (
                [b - f for b, f in zip(*each, strict=True)]
                for each in zip(both, forward, strict=True)
            )
            yield (mode, "backward", arm), (device, host)


def measure(device: Device, make: Callable[..., Arms], sizes: Row) -> Iterator[Row]:
    """Build the arms, for each mode anew, and time all of them in turns."""
    case = " ".join(f"{name} {value}" for name, value in sizes.items())
    taken_apart = make is apart
    by_copies = make in (layer, headline, apart)
    count = device.replicas(2 * sizes["n_out"] * sizes["k"]) if by_copies else 1
    copies, runs = [make(device, **sizes) for _ in range(count)], dict[Name, Arm]()
    for mode, arm in product((GRAPH, EAGER), copies[0]):
        left_out = ONLY_EAGER if mode == GRAPH else ONLY_GRAPH
        if arm in left_out or (taken_apart and mode == EAGER):
            continue
        try:
            built = [
                arms[arm]()
                for arms in (copies if mode == GRAPH and arm != PEFT_COMPILED else copies[:1])
            ]
            for phase, run in built[0].items():
                run()
                # A second step in a graph would upload the optimizer's tables again.
                calls = [phases[phase] for phases in built]
                most = 1 if phase in ("step", ONE_LAUNCH) else MOST_CALLS
                runs[mode, phase, arm] = device.capture(calls, most) if mode == GRAPH else (run, 0)
        except UnavailableError as reason:
            yield {"case": case, "arm": arm, "mode": mode, "status": SKIPPED, "note": str(reason)}
        except Exception:
            # Only our own failure fails the check.
            status = SKIPPED if role_of(arm) in ("base", "rival") else FAILED
            note = traceback.format_exc()[-NOTE_LENGTH:]
            yield {"case": case, "arm": arm, "mode": mode, "status": status, "note": note}
    seconds = HEADLINE_SECONDS if make is headline else SECONDS
    times, load = device.time(runs, seconds * len(runs))
    for (mode, phase, arm), (seconds, host) in [*times.items(), *backwards(times)]:
        named = partial(record, case, phase, arm, role=role_of(arm))
        yield named("us", [1e6 * each for each in seconds]) | {"mode": mode, **load}
        if mode == EAGER:
            yield named("host_us", [1e6 * each for each in host]) | {"mode": mode}
        if (mode, phase) == (EAGER, "both"):
            yield named("peak_bytes", [device.peak_bytes(runs[mode, phase, arm][0])]) | {
                "mode": mode
            }


# (N, K) of q_proj and of down_proj and gate_proj, in a model of 1 and one of 8 billion parameters.
SIZES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 16, 64, 512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64, 128)
DROPOUT, STATES = (0.1, 0.0), ("shrinking", "latched")
# What no limit decides: one launch or the vendor's product for many rows; S beside a product of few
# rows at ranks of 32 and 64; split-K from 65 rows up; long sums.
DOUBTS = [
    *((m, n, 4096, r, 0.0) for m, r, n in product((16, 64), (32, 64), (4096, 14336))),
    *((m, 4096, 4096, 16, 0.0) for m in (128, 256, 384)),
    *((m, 4096, 14336, 16, 0.1) for m in (512, 4096)),
]
# A layer whose bytes docs/results/performance.md counts, also with fewer rows and without dropout.
HEADLINE = [(m, 4096, 4096, 16, p) for p in DROPOUT for m in (8192, 2048)]
SHAPES = [(m, *nk, r, p) for m, nk, r, p in product(ROWS, SIZES, RANKS, DROPOUT)]
# Those that the targets name come first.
SHAPES.sort(key=lambda s: 2 * (s[1:3] != (4096, 4096)) + (s[3] != 16) + (s[0] not in MANY + FEW))
PROJECTED = ((4096, 1024, 1024), (14336, 14336))
# The sizes of a dry run, and of a GPU in the order in which they are timed.
SECTIONS: dict[Callable[..., Arms], tuple[Iterable[Any], Iterable[Any]]] = {
    apart: (
        [(70, 48, 32, 8, 0.1), (70, 48, 32, 8, 0.0)],
        parts.SHAPES,
    ),
    headline: ([(70, 48, 32, 8, 0.1)], HEADLINE),
    layer: (
        [(16, 32, 32, 8, 0.0), (70, 32, 32, 8, 0.1)],
        dict.fromkeys(HEADLINE + SHAPES[:12] + DOUBTS + SHAPES),
    ),
    modules: (
        [("mlp", 70, 72, 48, 4, 0.1), ("projections", 70, (32, 16), 48, 4, 0.1)],
        [
            *product(("mlp",), (8192, 2048, 16384, 512), (14336,), (4096,), (16, 64), DROPOUT),
            *product(("projections",), (2048, 64), PROJECTED, (4096,), (16,), DROPOUT),
        ],
    ),
    captured: ([(9, 48, 4, 0.1)], product((512, 64, 4096, 16), (4096,), (4,), DROPOUT)),
    step: (
        product((1,), (2,), (64,), ("float32",), STATES),
        product((32,), (16,), (1,), ("float32", "bfloat16"), STATES),
    ),
}
CASES = [
    pytest.param(make, values, id=f"{make.__name__} {' '.join(map(str, values))}")
    for make, sizes in SECTIONS.items()
    for values in sizes[not DRY]
]


@pytest.fixture(scope="session")
def device() -> Device:
    return Device(DRY)


@pytest.mark.parametrize(("make", "values"), CASES)
def test_times(
    make: Callable[..., Arms], values: Any, device: Device, record_property: Any
) -> None:
    sizes = dict(zip([*signature(make).parameters][1:], values, strict=True))
    with slk.settings(backend="triton"):
        for row in measure(device, make, sizes):
            record_property("row", sizes | row)
    # Raises if the GPU is unusable, as after an illegal address.
    device.synchronize()
