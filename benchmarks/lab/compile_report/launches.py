"""Every launch that dispatch can pick, made on the meta device: nothing is allocated and nothing
runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import torch

from stablelora_kernels.activations import ACTIVATIONS
from stablelora_kernels.dispatch.problem import MAX_CHAINED_R, SMALL_M, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.kernels.stable_adamw import tables
from stablelora_kernels.launch import stable_shrink
from stablelora_kernels.launch.lora_linear_cross_entropy import cross_entropy
from stablelora_kernels.launch.stable_adamw import Memory, plan_square_sums, plan_stable_adamw
from stablelora_kernels.ops.lora_linear.call import (
    LinearForwardCall,
    LinearForwardSettings,
)
from stablelora_kernels.ops.lora_linear.triton import (
    lora_linear_fwd,
)
from stablelora_kernels.ops.lora_linear_cross_entropy.call import (
    Chunk,
    CrossEntropyCall,
    CrossEntropySettings,
)
from stablelora_kernels.ops.lora_mlp.call import (
    MLPBackwardCall,
    MLPBackwardSettings,
    MLPForwardCall,
    MLPForwardSettings,
    each_mask,
)
from stablelora_kernels.ops.lora_mlp.triton import lora_mlp_bwd, lora_mlp_fwd
from stablelora_kernels.ops.meta_calls import DTypes, Ways, linear_launches, projection_of, seed_of
from stablelora_kernels.optim.shrink import TritonShrink
from stablelora_kernels.optim.triton_step import TritonStep
from stablelora_kernels.projection import layouts_of, operands_of, scales_of
from stablelora_kernels.quantized import WEIGHTS
from stablelora_kernels.testing.inputs import can_hold

# One of each kind that the tables tell apart, in M and (N, K).
ROWS = (8, 64, 128, 512, 32768)
SIZES = ((4096, 4096), (512, 4096))
GROUPS = ((4096, 1024, 1024), (14336, 14336))
DROPOUT = (0.0, 0.1)
# M, K and r. The 4113: bytes and blocks that lie across rows.
QUANTIZED = {
    "bf16/fp32": [*product((8, 64, 128, 4096), (4096,), (16, 64)), (64, 4113, 16)],
    "fp32": [(8, 4096, 16)],
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of this GPU the report has everything. Of the others it has one of each form and tile: the default
# dtypes and float32, a low and a high rank, a wide layer. What they compile to differs by form and
# tile; the dtype changes little.
FULL = "sm_90"
# X's dtype, A's, float32's precision; the ranks on FULL and on the others: the default dtypes at
# every rank.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str, tuple[int, ...], tuple[int, ...]]] = {
    "bf16/fp32": (BF16, FP32, "highest", (16, 32, 64, 128, 256), (16, 128)),
    "bf16": (BF16, BF16, "highest", (16, 128), ()),
    "fp16": (FP16, FP16, "highest", (16,), ()),
    "fp32": (FP32, FP32, "highest", (16,), (16,)),
    "tf32": (FP32, FP32, "high", (16,), ()),
}


def every_launch(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for every kernel and config, some of them more than once."""
    before = torch.get_float32_matmul_precision()
    try:
        for name, (*_, precision, _, _) in DTYPES.items():
            torch.set_float32_matmul_precision(precision)
            for takes, made in _calls(device, name):
                for launch in chain(*made):
                    if hasattr(launch, "kernel") and takes(named := launch.named):
                        # Some products stay exact where TensorFloat-32 is allowed.
                        exact = name == "tf32" and _precision(named) == "ieee"
                        yield "fp32" if exact else name, launch
    finally:
        torch.set_float32_matmul_precision(before)
    yield from stable_adamw_launches()
    yield from stable_shrink_launches()
    yield from cross_entropy_launches()


def _precision(named: dict[str, Any]) -> str:
    """Of the product, or of S, dA or dB alone."""
    jobs = ("TILE", "S", "DA", "DB")
    return next((named[f"{job}.PRECISION"] for job in jobs if f"{job}.PRECISION" in named), "ieee")


def _calls(device: Device, name: str) -> Iterator[tuple[Callable[[dict[str, Any]], Any], Any]]:
    """The launches of calls, forward and backward, and by its arguments whether one is taken: those
    that no other call has.
    """

    def every(named: dict[str, Any]) -> bool:
        return True

    def of_group(named: dict[str, Any]) -> bool:
        added = named.get("TILE.ADD") or ("w.ptr" in named and named.get("base") is named["y.ptr"])
        return added or max(named.get("S.MEMBERS", 1), named.get("DA.MEMBERS", 1)) > 1

    def gated(named: dict[str, Any]) -> bool:
        return bool(named.get("GATE") or named.get("TILE.GATE") or named.get("DA.GATE"))

    dtype, lora, _, many, few = DTYPES[name]
    dtypes = dtype, lora
    ranks, last, default = many if device.arch == FULL else few, ROWS[-1], name == "bf16/fp32"
    for m, (n, k), r, p in product(
        ROWS, SIZES if device.arch == FULL else SIZES[:1], ranks, DROPOUT
    ):
        # The table's choice, and those that first use may prefer to it.
        choices: list[tuple[Choice | None, Choice | None]] = [(None, None)]
        if m == last:
            choices.append((Choice("branch_first", ""), Choice("branch_first", "")))
        if m <= SMALL_M and r <= MAX_CHAINED_R:
            choices.append((Choice("one_launch", ""), Choice("one_launch", "")))
        # 128 are few rows with many processors; the other dtypes stand beside the default ones in
        # all other rows.
        for pair in choices if m != 128 or default else ():
            yield every, linear_launches(device, m, n, k, r, dtypes, p, choices=pair)
    for m, r, p in product((64, last), ranks, DROPOUT):
        yield every, linear_launches(device, m, 4096, 4096, r, dtypes, p, "none")
    for m, ns, r, p in product((64, 512, last), GROUPS, ranks, DROPOUT):
        made = linear_launches(device, m, ns, 4096, r, dtypes, p)
        yield of_group, made
    silu, *others = ACTIVATIONS
    activations = [*product((silu,), ranks), *(product(others, (16, 64)) if default else ())]
    for m, (activation, r), p in product((64, 2048, last), activations if ranks else (), DROPOUT):
        made = mlp_launches(device, m, (4096, 14336, 4096), r, dtypes, p, activation)
        yield gated, made
    for (m, k, r), kind, p in product(QUANTIZED.get(name, ()), WEIGHTS, DROPOUT):
        if (r == 16 or device.arch == FULL) and can_hold(kind, k):
            yield (
                (lambda named: "PACKED.FORMAT" in named),
                linear_launches(device, m, 4096, k, r, dtypes, p, kind),
            )
    for r in (16, 64) if device.tma and dtype != FP32 and ranks else ():
        yield every, [[_broadcast(device, dtype, lora, r)]]


def _broadcast(device: Device, dtype: torch.dtype, lora: torch.dtype, r: int) -> Any:
    """A forward of one row repeated by expand(), which no descriptor can hold: what the pointers'
    kernel is for on Hopper.
    """
    with torch.device("meta"):
        x = torch.empty(1, 4096, dtype=dtype).expand(4096, 4096)
        w = torch.empty(4096, 4096, dtype=dtype)
        a, b = torch.empty(r, 4096, dtype=lora), torch.empty(4096, r, dtype=lora)
    call = LinearForwardCall(
        x=x,
        base=None,
        operands=[w, None, a, b],
        scales=(),
        seeds=[None],
        settings=LinearForwardSettings((), (1.0,), 0.0, save_s=False, save_mask=False),
    )
    launch = lora_linear_fwd.plan(device, call, Choice("one_launch", ""))[1][-1]
    return launch._replace(variant=f"{launch.variant} broadcast")


def stable_adamw_launches() -> Iterator[tuple[str, Any]]:
    """(dtype, launch) for parameters of one dtype, as :class:`TritonStep` makes them: plain,
    sharded, with AMP.
    """
    dtypes = torch.int8, torch.int32, torch.int64, FP32
    int8, int32, int64, floats = (torch.empty(64, dtype=dtype, device="meta") for dtype in dtypes)
    memory = Memory(floats, int8, int32, floats, floats, int32, int64, int32, int64, floats, int64)
    for (kind, dtype), wide in product(enumerate(("fp32", "bf16", "fp16")), (True, False)):
        words, code = "aligned" if wide else "unaligned", (1 << (2 * kind + wide), TritonStep.CHUNK)
        yield dtype, plan_square_sums(memory, True, True, 0, *code)._replace(variant=words)
        for variant, scale, clip, flags in (
            (words, None, None, 0),
            (f"{words} amp clip", floats, 1.0, 0),
            (f"{words} sharded", None, None, tables.FLAG_SHARDED | tables.FLAG_CUT),
        ):
            if wide or not flags:
                *_, step = plan_stable_adamw(memory, scale, scale, clip, False, flags, *code)
                yield dtype, step._launch._replace(variant=variant)


def stable_shrink_launches() -> Iterator[tuple[str, Any]]:
    """(dtype, launch) for pairs of one dtype, as :class:`TritonShrink` makes them: plain with AMP,
    and sharded.
    """
    int32, int64, floats = (
        torch.empty(64, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int64, FP32)
    )
    memory = stable_shrink.Memory(int64, int32, floats, int32, int32, int32, floats)
    for (kind, dtype), wide in product(enumerate(("fp32", "bf16", "fp16")), (True, False)):
        words, variants = "aligned" if wide else "unaligned", 1 << (2 * kind + wide)
        for variant, found_inf, sharded in (
            (f"{words} amp", floats, False),
            (f"{words} sharded", None, True),
        ):
            launch = stable_shrink.plan_stable_shrink(
                memory,
                found_inf,
                summed=sharded,
                cut=sharded,
                variants=variants,
                chunk=TritonShrink.CHUNK,
            )
            yield dtype, launch._replace(variant=variant)


def cross_entropy_launches() -> Iterator[tuple[str, Any]]:
    """(dtype, launch) of a head's logits: the loss alone, with its gradient, and with a gradient for
    each token; with entropies, and with their gradient; with a soft cap and without one.
    """
    vocabulary = 128_256
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    floats = torch.empty(64, dtype=FP32, device="meta")
    for name, dtype in (("bf16", BF16), ("fp16", FP16), ("fp32", FP32)):
        logits = torch.empty(64, vocabulary, dtype=dtype, device="meta")
        # The gradient by token; whether gradients are needed; entropies, or their gradient.
        forms = [
            (None, False, False),
            (None, True, False),
            (floats, True, False),
            (None, False, True),
            (floats, True, True),
        ]
        for softcap, (row_scale, gradient, entropy) in product((0.0, 30.0), forms):
            entropy_scale = row_scale if entropy else None
            entropies = floats[: 64 if entropy and not gradient else 0]
            call = CrossEntropyCall(
                hidden=logits,
                weight=logits,
                bias=None,
                s=None,
                lora_B=None,
                labels=labels,
                row_scale=row_scale,
                entropy_scale=entropy_scale,
                settings=CrossEntropySettings(
                    -100, 1.0, softcap, 1.0, "triton", need_hidden=gradient
                ),
            )
            chunk = Chunk(logits, labels, row_scale, entropy_scale)
            yield name, cross_entropy(call, chunk, floats, entropies)


# A gated MLP's, as meta_calls.py has those of a single layer.


class MLPCalls(NamedTuple):
    """The calls of a forward and of its backward, on tensors without values."""

    forward: MLPForwardCall
    backward: MLPBackwardCall


def mlp_calls(
    m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float, activation: str = "silu",
    where: str = "meta",
) -> MLPCalls:  # fmt: skip
    """The calls on [m, k] rows, without biases. ``sizes``: output, inner and input features.

    ``r``: the rank, or those of gate, up and down, 0 for one without a branch.
    """
    n, f, k = sizes
    ranks = (r,) * 3 if isinstance(r, int) else tuple(r)
    projections = []
    for size, rank in zip(((f, k), (f, k), (n, f)), ranks, strict=True):
        p = projection_of(*size, rank, dtypes, where)._replace(bias=None)
        projections.append(p if rank else p._replace(lora_A=None, lora_B=None))
    layouts = layouts_of(projections)
    scalings = tuple([p.scaling for p in projections])
    operands = operands_of(projections)
    scales = scales_of(projections, layouts)
    x = torch.zeros(m, k, dtype=dtypes[0], device=where)
    seeds = [seed_of(where, dropout_p if rank else 0.0) for rank in ranks]
    stores_gate, stores_up, stores_down = [seed is not None for seed in seeds]
    stores_mask = (stores_gate, stores_up, stores_down)
    settings = MLPForwardSettings(
        layouts,
        scalings,
        dropout_p,
        activation,
        output=True,
        save=True,
        stores_mask=stores_mask,
        shared_mask=False,
    )
    forward = MLPForwardCall(x, operands, scales, seeds, settings)
    results = lora_mlp_fwd.allocate(forward)
    every = (True, True, True)
    backward = MLPBackwardCall(
        grad=torch.zeros_like(results.y),
        x=x,
        g=results.g,
        u=results.u,
        s=results.s,
        s_down=results.s_down,
        operands=operands,
        scales=scales,
        masks=each_mask(results.masks, stores_mask),
        settings=MLPBackwardSettings(
            layouts,
            scalings,
            dropout_p,
            activation,
            need_x=True,
            need_a=every,
            need_b=every,
            shared_mask=False,
        ),
    )
    return MLPCalls(forward, backward)


def mlp_launches(
    device: Device, m: int, sizes: Sequence[int], r: int | Sequence[int], dtypes: DTypes, dropout_p: float,
    activation: str = "silu",
) -> Ways:  # fmt: skip
    """The forward's and the backward's launches of :func:`mlp_calls`."""
    calls = mlp_calls(m, sizes, r, dtypes, dropout_p, activation)
    forward = lora_mlp_fwd.plan(device, calls.forward)[1]
    return forward, lora_mlp_bwd.plan(device, calls.backward)[1]
