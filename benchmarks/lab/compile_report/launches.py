"""Every launch that dispatch can pick, made on the meta device: nothing is allocated and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, product
from typing import Any

import torch

from stablelora_kernels.dispatch.problem import MAX_CHAINED_R, MAX_FUSED_R, Device
from stablelora_kernels.dispatch.rules import Choice
from stablelora_kernels.launch.base import Launch
from stablelora_kernels.launch.dry_run import (
    branch_launches,
    call_launches,
    group_launches,
    mlp_launches,
    quantized_launches,
)
from stablelora_kernels.launch.lora_linear import forward_launches
from stablelora_kernels.optim.triton_engine import TritonStep

# One of each kind that the tables tell apart, in M, (N, K) and r.
ROWS = (8, 64, 128, 512, 16384)
SIZES = ((4096, 4096), (512, 4096))
RANKS = (16, 32, 64, 128, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORDS = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
# Of this GPU the report has everything. Of the others it has one of each form and tile: the default dtypes and float32, a low and
# a high rank, a wide layer. What they compile to differs by form and tile; the dtype changes little.
FULL = "sm_90"
SOME_RANKS = (16, 128)
# The default dtypes at every rank, others at the one that is most used.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype, str, tuple[int, ...]]] = {
    "bf16/fp32": (BF16, FP32, "highest", RANKS),
    "bf16": (BF16, BF16, "highest", (16, 128)),
    "fp16": (FP16, FP16, "highest", (16,)),
    "fp32": (FP32, FP32, "highest", (16,)),
    "tf32": (FP32, FP32, "high", (16,)),
}


def every_launch(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) of all kernels."""
    yield from lora_linear_launches(device)
    yield from lora_linear_group_launches(device)
    yield from lora_mlp_launches(device)
    yield from quantized_lora_linear_launches(device)
    yield from stable_adamw_launches()


def lora_linear_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for every kernel and config, some of them more than once."""
    for name, (dtype, lora, _, ranks) in _each_dtype(device):
        for m, (n, k), r, p in product(ROWS, SIZES if device.arch == FULL else SIZES[:1], ranks, (0.0, 0.1)):
            if m == 128 and name != "bf16/fp32":
                # A form of few rows and many processors; the other dtypes stand beside the default ones in all other rows.
                continue
            # The table's choice; for many rows also the kernels that only force or autotuning selects.
            pairs: list[tuple[Choice | None, Choice | None]] = [(None, None)]
            if m == ROWS[-1]:
                pairs.append((Choice("vendor", ""), Choice("vendor", "")))
                if r <= MAX_FUSED_R and dtype != FP32:
                    pairs.append((None if p else Choice("fused", ""), Choice("fused", "")))
                if r <= MAX_CHAINED_R and dtype != FP32:
                    pairs.append((Choice("chained", ""), Choice("chained", "")))
            for forward, backward in pairs:
                for launch in chain(*call_launches(device, m, n, k, r, dtype, lora, p, forward, backward)):
                    if hasattr(launch, "kernel"):
                        yield _precise(name, launch), launch
        for m, r, p in product((64, ROWS[-1]), ranks, (0.0, 0.1)):
            for launch in chain(*branch_launches(device, m, 4096, 4096, r, dtype, lora, p)):
                yield name, launch
        if dtype != FP32:
            yield from ((name, launch) for launch in _broadcast(device, dtype, lora))


def _each_dtype(device: Device) -> Iterator[tuple[str, tuple[torch.dtype, torch.dtype, str, tuple[int, ...]]]]:
    """DTYPES, each under its precision."""
    before = torch.get_float32_matmul_precision()
    try:
        for name, (dtype, lora, precision, ranks) in DTYPES.items():
            if device.arch == FULL or name in ("bf16/fp32", "fp32"):
                torch.set_float32_matmul_precision(precision)
                yield name, (dtype, lora, precision, tuple(r for r in ranks if device.arch == FULL or r in SOME_RANKS))
    finally:
        torch.set_float32_matmul_precision(before)


def _precise(name: str, launch: Any) -> str:
    """The dtypes in words: some products stay exact where TensorFloat-32 is allowed."""
    return "fp32" if name == "tf32" and launch.constants.get("INPUT_PRECISION", "ieee") == "ieee" else name


def quantized_lora_linear_launches(device: Device, ranks: Sequence[int] = ()) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for the kernels that read a quantized weight; the others of such a call are above."""
    ranks = ranks or ((16, 64) if device.arch == FULL else (16,))
    calls = [("bf16/fp32", m, 4096, r, kind) for m, r, kind in product((8, 64, 256, 4096), ranks, ("nf4", "fp8"))]
    calls += [("fp32", 8, 4096, 16, kind) for kind in ("nf4", "fp8")]
    # Bytes and blocks that lie across rows.
    calls += [("bf16/fp32", 64, 4113, 16, kind) for kind in ("nf4", "fp8")]
    for (name, m, k, r, kind), p in product(calls, (0.0, 0.1)):
        dtype, lora = DTYPES[name][:2]
        for launch in chain(*quantized_launches(device, m, 4096, k, r, dtype, lora, p, kind)):
            if hasattr(launch, "kernel") and "NF4" in launch.constants:
                yield name, launch


def lora_linear_group_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for projections that share X: the launches that single projections lack."""
    for name, (dtype, lora, _, ranks) in _each_dtype(device):
        for m, ns, r, p in product((64, 512, ROWS[-1]), ((4096, 1024, 1024), (14336, 14336)), ranks, (0.0, 0.1)):
            for launch in chain(*group_launches(device, m, ns, 4096, r, dtype, lora, p)):
                if hasattr(launch, "kernel") and ("MEMBERS" in launch.constants or launch.constants.get("ADD")):
                    yield _precise(name, launch), launch


def lora_mlp_launches(device: Device) -> Iterator[tuple[str, Any]]:
    """(dtypes in words, launch) for a gated MLP: the launches that compute its activation, or read G and U in H's stead."""
    for name, (dtype, lora, _, ranks) in _each_dtype(device):
        calls = [*product(("silu",), ranks, (0.0, 0.1))]
        if name == "bf16/fp32":
            calls += product(("gelu", "gelu_tanh"), (16, 64), (0.0, 0.1))
        for m, (activation, r, p) in product((64, 2048, ROWS[-1]), calls):
            for launch in chain(*mlp_launches(device, m, 4096, 14336, 4096, r, dtype, lora, p, activation)):
                if hasattr(launch, "kernel") and launch.constants.get("GATE"):
                    yield _precise(name, launch), launch


def _broadcast(device: Device, dtype: torch.dtype, lora_dtype: torch.dtype) -> Iterator[Any]:
    """Forwards of one row repeated by expand(), which no descriptor can hold: what the pointers' kernel is for on Hopper."""
    m, n, k = 4096, 4096, 4096

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=of, device="meta")

    for r, kernel in ((16, "fused"), (16, "split"), (64, "split")):
        a, b = empty(r, k, of=lora_dtype), empty(n, r, of=lora_dtype)
        x, w, y = empty(1, k).expand(m, k), empty(n, k), empty(m, n)
        launches = forward_launches(device, x, w, None, a, b, None, y, None, 1.0, 0.0, Choice(kernel, ""))
        if device.tma:
            yield launches[-1]._replace(variant=f"{launches[-1].variant} broadcast")


def stable_adamw_launches() -> Iterator[tuple[str, Any]]:
    """(dtype, launch) for parameters of one dtype, as :class:`TritonStep` makes them: plain, sharded, with AMP."""
    from stablelora_kernels.kernels.stable_adamw import step as kernels
    from stablelora_kernels.kernels.stable_adamw import tables
    from stablelora_kernels.kernels.stable_adamw.norms import _square_sums_kernel

    int8, int32, int64, floats = (
        torch.empty(64, dtype=d, device="meta") for d in (torch.int8, torch.int32, torch.int64, torch.float32)
    )
    # As the launchers pass them.
    step = (int64, int64, int32, floats, int64, floats, int8, int32, floats, int32, *[floats] * 3, 64, 64, 1.0)
    sums = (int64, int64, int32, floats, floats, 64, 64)

    def built(kernel: Any, variant: str, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        options = {"num_warps": tables.NUM_WARPS}
        return Launch(kernel, variant, reason="", grid=(64,), args=args, constants=constants, options=options)

    for kind, dtype in enumerate(tables.KINDS):
        for wide in (True, False):
            words = "aligned" if wide else "unaligned"
            constants = {"VARIANTS": 1 << (2 * kind + wide), "CHUNK": TritonStep.CHUNK}
            yield WORDS[dtype], built(_square_sums_kernel, words, sums, constants | {"FLAGS": 0})
            for amp in (False, True):
                flags = dict.fromkeys(("HAS_SCALE", "HAS_INF", "CLIP"), amp) | {
                    "FLAGS": 0,
                    "GRAD_SUMS": tables.MAX_GRAD_SUMS,
                }
                variant = f"{words} amp clip" if amp else words
                yield WORDS[dtype], built(kernels._stable_adamw_kernel, variant, step, constants | flags)
                if wide and not amp:
                    sharded = constants | flags | {"FLAGS": tables.FLAG_SHARDED | tables.FLAG_CUT}
                    yield WORDS[dtype], built(kernels._stable_adamw_kernel, f"{words} sharded", step, sharded)
