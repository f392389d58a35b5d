"""Times one layer, forward and backward: the frozen nn.Linear, LoRA written with PyTorch's
operators, and this library's layer. Then times one optimizer step over float32 pairs of A [r, K]
and B [N, r]: torch.optim.AdamW(fused=True), and StableLoRAAdamW while every pair shrinks and after
every pair has latched.

Arms alternate call by call in one process, in shuffled order. The figures are medians with
quartiles; ratios are taken round by round. The last lines say where this library is slower.

Exit status: 0 timed; 1 a run failed, for example out of memory; 2 a bad argument, or a backend that
can't run here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stablelora_kernels.cli.common import (
    CommandError,
    Report,
    device_of,
    dropout,
    failing,
    positive,
)
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import BACKENDS, settings
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import DTYPES, forward_backward, layer_arms, make_pairs
from stablelora_kernels.utils.timing import interleave, machine, summarize

HELP = "time the fused layer and the optimizer's step on this machine"
FROZEN, EAGER, FUSED_LAYER = "frozen nn.Linear", "eager LoRA", "this library"
ADAMW = "AdamW fused, no Algorithm 1"
SHRINKING = "StableLoRAAdamW, shrinking"
LATCHED = "StableLoRAAdamW, latched"
# Options that are whole numbers: the default and the help.
SIZES = {
    "M": (512, "rows of the layer's input"),
    "N": (1024, "output features"),
    "K": (1024, "input features"),
    "r": (16, "rank"),
    "pairs": (32, "pairs in the optimizer's step"),
    "iters": (50, "timed rounds"),
}
WARMUP = 10
LR, SHRINK_RATIO = 1e-6, 5e-4
Summary = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, (default, text) in SIZES.items():
        parser.add_argument(
            f"--{name}", type=positive, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the layer (default: fp32)"
    )
    parser.add_argument(
        "--dropout", type=dropout, default=0.0, metavar="P", help="of the LoRA branch (default: 0)"
    )
    backends = f"{', '.join(BACKENDS)} (default: {settings.backend})"
    parser.add_argument(
        "--backend", choices=BACKENDS, default=settings.backend, metavar="NAME", help=backends
    )
    parser.add_argument(
        "--device", help="a torch device (default: the GPU if there is one, else the CPU)"
    )


def run(args: argparse.Namespace, report: Report) -> int:
    """Time the layer and the optimizer against their baselines, and print verdicts."""
    device = device_of(args)
    with settings(backend=args.backend):
        with failing(RuntimeError):
            name = backend.resolve_backend(device)
        if name == "triton" and backend.INTERPRETING:
            raise CommandError(
                "TRITON_INTERPRET is set, and times in Triton's interpreter tell nothing of the kernels"
            )
        with failing(RuntimeError, status=1, before="the run failed: "):
            layer = summarize_arms(_layer_samples(args, device), FROZEN)
            step = summarize_arms(_step_samples(args, device), ADAMW)
    m = machine()
    s = {key: getattr(args, key) for key in (*SIZES, "dtype", "dropout")} | {
        "device": str(device),
        "backend": name,
    }
    report.data = {"machine": m, "settings": s, "layer": layer, "optimizer": step}

    gpu = device.type == "cuda"
    on = m["gpu"] if gpu else f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} threads"
    report.text(f"{on}, torch {m['torch']}, load {m['load_average']}")
    if not gpu and (m["load_average"] or 0) > m["cores"]:
        report.text(
            "The machine is BUSY with more than its cores can do: times are longer than on an idle machine."
        )
    shape = f"{args.M} x {args.K} -> {args.N}, r {args.r}, {args.dtype}, dropout {args.dropout:g}, backend {name}"
    pairs = f"{args.pairs} float32 pairs of A [{args.r}, {args.K}], B [{args.N}, {args.r}]"
    keys = ("median", "q1", "q3")
    for title, arms, over in (
        (f"Layer, forward and backward, ms: {shape}", layer, "/ frozen"),
        (f"Optimizer step, ms: {pairs}", step, "/ AdamW"),
    ):
        rows = [
            [
                name,
                *(f"{arm['ms'][key]:.3f}" for key in keys),
                *(f"{arm['over_base'][key]:.2f}" for key in keys),
            ]
            for name, arm in arms.items()
        ]
        report.text("", title)
        report.table(("", *keys, over, "q1", "q3"), rows)
    report.text("", verdict("The layer", layer[FUSED_LAYER]["over_eager"], "eager LoRA"))
    for arm in (SHRINKING, LATCHED):
        report.text(
            verdict(
                f"The step with pairs {arm.rpartition(' ')[2]}",
                step[arm]["over_base"],
                "fused AdamW",
            )
        )
    return 0


def _layer_samples(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of forward and backward of each arm, round by round."""
    dtype = DTYPES[args.dtype]
    arms = layer_arms(args.K, args.N, args.r, args.dropout, dtype, device)
    x = torch.randn(args.M, args.K, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(args.M, args.N, device=device, dtype=dtype)
    named = zip((FROZEN, EAGER, FUSED_LAYER), arms, strict=True)
    return interleave(
        {name: forward_backward(arm, x, grad) for name, arm in named},
        warmup=WARMUP,
        iters=args.iters,
    )


def _step_samples(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of an optimizer step of each arm, round by round."""

    def new_pairs(latched: bool) -> list[LoRAPair]:
        return make_pairs(args.pairs, args.r, args.K, device, latched, m=args.N)

    plain = torch.optim.AdamW(
        [p for pair in new_pairs(False) for p in (pair.A, pair.B)], lr=LR, fused=True
    )
    # Small enough that no pair latches during the measurement: A loses at most half, and B, which
    # grows by lr a step from zero, stays below a tenth of what would latch.
    rounds = WARMUP + args.iters
    lr = min(LR, 0.1 * args.N**0.5 / (args.K * rounds))
    shrink_ratio = min(SHRINK_RATIO, 0.5 / rounds)
    ours = {
        name: StableLoRAAdamW(new_pairs(name == LATCHED), lr=lr, shrink_ratio=shrink_ratio)
        for name in (SHRINKING, LATCHED)
    }
    arms: dict[str, Callable[[], Any]] = {ADAMW: plain.step} | {
        name: arm.step for name, arm in ours.items()
    }
    samples = interleave(arms, warmup=WARMUP, iters=args.iters)
    for name, optimizer in ours.items():
        if {pair.latched for pair in optimizer.stability()} != {name == LATCHED}:
            raise RuntimeError(
                f"all pairs of {name!r} must keep their state during the measurement"
            )
    return samples


def summarize_arms(
    samples: Mapping[str, Sequence[float]], base: str
) -> dict[str, dict[str, Summary]]:
    """Each arm's milliseconds and its ratios to other arms, taken round by round."""

    def over(name: str, baseline: str) -> Summary:
        return summarize(
            [one / two for one, two in zip(samples[name], samples[baseline], strict=True)]
        )

    summaries = {
        name: {"ms": summarize([1e3 * s for s in seconds]), "over_base": over(name, base)}
        for name, seconds in samples.items()
    }
    if EAGER in samples:
        summaries[FUSED_LAYER]["over_eager"] = over(FUSED_LAYER, EAGER)
    return summaries


def verdict(subject: str, ratio: Summary, baseline: str) -> str:
    """A sentence on the ratio. It says faster or slower only if three of four rounds do."""
    spread = f"{ratio['median']:.2f} of its time (quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f})"
    if ratio["q3"] < 1:
        return f"{subject} is FASTER than {baseline} here: {spread}."
    if ratio["q1"] > 1:
        return f"{subject} is SLOWER than {baseline} here: {spread}."
    return f"{subject} and {baseline} can't be told apart in this run: {spread}."
