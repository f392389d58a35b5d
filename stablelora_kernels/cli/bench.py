"""``bench``: time the fused layer and the optimizer step on this machine against their alternatives."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stablelora_kernels.cli.arguments import device_of, dropout, positive
from stablelora_kernels.cli.output import CommandError, print_json, print_table, wrapped
from stablelora_kernels.dispatch import backend
from stablelora_kernels.dispatch.settings import BACKENDS, get_backend, use_backend
from stablelora_kernels.optim.stable_adamw import StableLoRAAdamW
from stablelora_kernels.pairs import LoRAPair
from stablelora_kernels.testing import DTYPES, forward_backward, layer_arms, make_pairs
from stablelora_kernels.utils.timing import interleave, machine, summarize

HELP = "time the fused layer and the optimizer's step on this machine"
DESCRIPTION = """\
Times one layer, forward and backward: the frozen nn.Linear, LoRA written with PyTorch's operators, and this library's layer.
Then times one optimizer step over float32 pairs of A [r, K] and B [N, r]: torch.optim.AdamW(fused=True), and StableLoRAAdamW
while every pair shrinks and after every pair has latched.

Arms alternate call by call in one process, in shuffled order. The figures are medians with quartiles; ratios are taken round
by round. The last lines say where this library is slower.

Exit status: 0 timed; 1 a run failed, for example out of memory; 2 a bad argument, or a backend that can't run here."""

FROZEN, EAGER, FUSED_LAYER = "frozen nn.Linear", "eager LoRA", "this library"
ADAMW, SHRINKING, LATCHED = "AdamW fused, no Algorithm 1", "StableLoRAAdamW, shrinking", "StableLoRAAdamW, latched"
WARMUP = 10
LR, SHRINK_RATIO = 1e-6, 5e-4
Summary = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("--M", 512, "rows of the layer's input"),
        ("--N", 1024, "output features"),
        ("--K", 1024, "input features"),
        ("--r", 16, "rank"),
        ("--pairs", 32, "pairs in the optimizer's step"),
        ("--iters", 50, "timed rounds"),
    ):
        parser.add_argument(name, type=positive, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the layer (default: fp32)")
    parser.add_argument("--dropout", type=dropout, default=0.0, metavar="P", help="of the LoRA branch (default: 0)")
    current = get_backend()
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=current,
        metavar="NAME",
        help=f"{', '.join(BACKENDS)} (default: {current})",
    )
    parser.add_argument("--device", help="a torch device (default: the GPU if there is one, else the CPU)")


def run(args: argparse.Namespace) -> int:
    device = device_of(args.device)
    with use_backend(args.backend):
        try:
            name = backend.resolve_backend(device)
        except RuntimeError as error:
            raise CommandError(str(error)) from None
        if name == "triton" and backend.INTERPRETING:
            raise CommandError("TRITON_INTERPRET is set, and times in Triton's interpreter tell nothing of the kernels")
        try:
            layer = summarize_arms(_layer_samples(args, device), FROZEN)
            step = summarize_arms(_step_samples(args, device), ADAMW)
        except RuntimeError as error:
            raise CommandError(f"the run failed: {error}", status=1) from None
    settings = {key: getattr(args, key) for key in ("M", "N", "K", "r", "pairs", "iters", "dtype", "dropout")}
    report = {"machine": machine(), "settings": settings | {"device": str(device), "backend": name}}
    report |= {"layer": layer, "optimizer": step}
    print_json(report) if args.json else _print(report)
    return 0


def _layer_samples(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    dtype = DTYPES[args.dtype]
    arms = layer_arms(args.K, args.N, args.r, args.dropout, dtype, device)
    x = torch.randn(args.M, args.K, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(args.M, args.N, device=device, dtype=dtype)
    named = zip((FROZEN, EAGER, FUSED_LAYER), arms, strict=True)
    return interleave({name: forward_backward(arm, x, grad) for name, arm in named}, warmup=WARMUP, iters=args.iters)


def _step_samples(args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    def new_pairs(latched: bool) -> list[LoRAPair]:
        return make_pairs(args.pairs, args.r, args.K, device, latched, m=args.N)

    plain = torch.optim.AdamW([p for pair in new_pairs(False) for p in (pair.A, pair.B)], lr=LR, fused=True)
    # Small enough that no pair latches during the measurement: A loses at most half, and B, which grows by lr a step from
    # zero, stays below a tenth of what would latch.
    rounds = WARMUP + args.iters
    lr = min(LR, 0.1 * args.N**0.5 / (args.K * rounds))
    shrink_ratio = min(SHRINK_RATIO, 0.5 / rounds)
    ours = {
        name: StableLoRAAdamW(new_pairs(name == LATCHED), lr=lr, shrink_ratio=shrink_ratio)
        for name in (SHRINKING, LATCHED)
    }
    arms: dict[str, Callable[[], Any]] = {ADAMW: plain.step} | {
        name: optimizer.step for name, optimizer in ours.items()
    }
    samples = interleave(arms, warmup=WARMUP, iters=args.iters)
    for name, optimizer in ours.items():
        if {pair.latched for pair in optimizer.stability()} != {name == LATCHED}:
            raise RuntimeError(f"all pairs of {name!r} must keep their state during the measurement")
    return samples


def summarize_arms(samples: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Summary]]:
    """Each arm's milliseconds and its ratios to other arms, taken round by round."""
    summaries = {}
    for name, seconds in samples.items():
        summaries[name] = {"ms": summarize([1e3 * s for s in seconds]), "over_base": _ratio(seconds, samples[base])}
    if EAGER in samples:
        summaries[FUSED_LAYER]["over_eager"] = _ratio(samples[FUSED_LAYER], samples[EAGER])
    return summaries


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> Summary:
    return summarize([one / other for one, other in zip(seconds, others, strict=True)])


def _print(report: Mapping[str, Any]) -> None:
    m, s = report["machine"], report["settings"]
    gpu = s["device"].startswith("cuda")
    on = m["gpu"] if gpu else f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} threads"
    print(wrapped(f"{on}, torch {m['torch']}, load {m['load_average']}"))
    if not gpu and (m["load_average"] or 0) > m["cores"]:
        print(wrapped("The machine is BUSY with more than its cores can do: times are longer than on an idle machine."))
    settings = (
        f"{s['M']} x {s['K']} -> {s['N']}, r {s['r']}, {s['dtype']}, dropout {s['dropout']:g}, backend {s['backend']}"
    )
    print()
    print(wrapped(f"Layer, forward and backward, ms: {settings}"))
    _print_arms(report["layer"], "/ frozen")
    print()
    print(wrapped(f"Optimizer step, ms: {s['pairs']} float32 pairs of A [{s['r']}, {s['K']}], B [{s['N']}, {s['r']}]"))
    _print_arms(report["optimizer"], "/ AdamW")
    print()
    layer, step = report["layer"], report["optimizer"]
    print(wrapped(verdict("The layer", layer[FUSED_LAYER]["over_eager"], "eager LoRA")))
    for name in (SHRINKING, LATCHED):
        print(
            wrapped(verdict(f"The step with pairs {name.rpartition(' ')[2]}", step[name]["over_base"], "fused AdamW"))
        )


def _print_arms(arms: Mapping[str, Mapping[str, Summary]], over: str) -> None:
    rows = []
    for name, arm in arms.items():
        ms, ratio = arm["ms"], arm["over_base"]
        figures = [f"{ms[key]:.3f}" for key in ("median", "q1", "q3")]
        rows.append([name, *figures, *(f"{ratio[key]:.2f}" for key in ("median", "q1", "q3"))])
    print_table(("", "median", "q1", "q3", over, "q1", "q3"), rows)


def verdict(subject: str, ratio: Summary, other: str) -> str:
    """A sentence on the ratio. It says faster or slower only if three of four rounds do."""
    spread = f"{ratio['median']:.2f} of its time (quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f})"
    if ratio["q3"] < 1:
        return f"{subject} is FASTER than {other} here: {spread}."
    if ratio["q1"] > 1:
        return f"{subject} is SLOWER than {other} here: {spread}."
    return f"{subject} and {other} can't be told apart in this run: {spread}."
