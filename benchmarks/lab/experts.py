"""LoRA on a stack of experts, and DoRA: time, peak memory and what is kept for backward, against
PEFT on the same weights.

    python -m benchmarks.lab.experts [--rounds 7] [--only TEXT] [--records FILE]

The experts are those of Qwen3-MoE: 64 of width 1024 and inner width 512, 8 for each token, r 16.
Arms take turns, call by call in one process; a forward and a backward each. Peak memory is that of
a process of its own over what it held before the call.

Experts in NF4 are bitsandbytes', with nested scales. PEFT 0.19 and newer train them wrongly; under
an older one, PEFT is an arm there, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import stablelora_kernels as slk
from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, PEFT, fill
from benchmarks.common.measure import environment
from benchmarks.common.memory import MIB, resident_over_start, saved_for_backward
from benchmarks.common.records import record, write_records
from benchmarks.common.tables import markdown, with_quartiles
from stablelora_kernels.integrations.peft.faults import faults_of_parametrized
from stablelora_kernels.utils.timing import interleave

E, H, I, TOP, R = 64, 1024, 512, 8, 16


class Arm(NamedTuple):
    """Whose adapters an arm's experts have, how transformers computes these, and their format."""

    library: str
    implementation: str = "grouped_mm"
    in_4_bits: bool = False
    fused: bool = False


FUSED = f"{ACCELERATED}{MLP_FUSED}"
# PEFT's eager loop over experts takes a hundred times as long as the frozen one.
ARMS = {
    FROZEN: Arm(FROZEN, "eager"),
    f"{FROZEN}, grouped_mm": Arm(FROZEN),
    PEFT: Arm(PEFT),
    ACCELERATED: Arm(ACCELERATED),
    FUSED: Arm(ACCELERATED, fused=True),
}
IN_4_BITS = ", NF4"
NF4_ARMS = {
    FROZEN: Arm(FROZEN, "eager"),
    f"{FROZEN}{IN_4_BITS}": Arm(FROZEN, in_4_bits=True),
    f"{PEFT}{IN_4_BITS}": Arm(PEFT, in_4_bits=True),
    f"{ACCELERATED}{IN_4_BITS}": Arm(ACCELERATED, in_4_bits=True),
    f"{FUSED}{IN_4_BITS}": Arm(ACCELERATED, in_4_bits=True, fused=True),
}
STACKS = ("gate_up_proj", "down_proj")
if faults_of_parametrized(STACKS, frozenset(STACKS)).trains_wrongly:
    del NF4_ARMS[f"{PEFT}{IN_4_BITS}"]
# Tokens for 16, 32, 128 and 512 rows an expert.
TOKENS = (128, 256, 1024, 4096)
DORA = 2048
Step = Callable[[], torch.Tensor]


class Block(nn.Module):
    """Experts as a part of a model: PEFT targets no parameter of the model itself."""

    def __init__(self, implementation: str, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=H, moe_intermediate_size=I, num_experts=experts, hidden_act="silu"
        )
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.requires_grad_(False).normal_(
                std=parameter.shape[2] ** -0.5, generator=generator
            )

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x, index, weights)  # type: ignore[no-any-return]


def experts_step(
    name: str, tokens: int, skewed: bool, dtype: torch.dtype, experts: int
) -> tuple[nn.Module, Step]:
    """The model of an arm of this ``name``, and its forward. Skewed, some experts get most of the
    rows.
    """
    arm = (ARMS | NF4_ARMS)[name]
    model: Any = Block(arm.implementation, experts, dtype)
    if arm.in_4_bits:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for stack in STACKS:
            replace_parameter_4bit(model.experts, stack, compress_statistics=True)
    if arm.library != FROZEN:
        targets = [f"experts.{stack}" for stack in STACKS]
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=[], target_parameters=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        fill(model)
    if arm.library == ACCELERATED:
        report = slk.accelerate_peft(model, strict=True, fuse_mlp=arm.fused)
        assert all(mlp.reason is None for mlp in report.mlps)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, experts, generator=generator) + skewed * torch.linspace(
        4, -4, experts
    )
    weights, index = torch.softmax(logits, -1).topk(TOP)
    x = torch.randn(tokens, H, generator=generator).to(dtype).requires_grad_()
    # In a model they follow from x, so that they have a gradient under a frozen router, too.
    weights = weights.to(dtype).requires_grad_()
    return model, lambda: model(x, index, weights)


def dora_step(arm: str, rows: int, dtype: torch.dtype) -> tuple[nn.Module, Step]:
    """An arm's layer with DoRA, and its forward."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(DORA, DORA, bias=False).to(dtype).requires_grad_(False))
    if arm != FROZEN:
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], use_dora=True)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        fill(model)
    if arm == ACCELERATED:
        slk.accelerate_peft(model, strict=True)
    x = torch.randn(rows, DORA, dtype=dtype).requires_grad_()
    return model, lambda: model(x)


def _cases() -> dict[str, tuple[tuple[str, ...], Callable[[str], tuple[nn.Module, Step]]]]:
    """By name, the arms and how each is made."""
    bf16, fp32 = ("bf16", torch.bfloat16), ("fp32", torch.float32)
    found: dict[str, Any] = {}
    sizes = [(tokens, skewed, bf16, E) for tokens in TOKENS for skewed in (False, True)]
    # Twice the experts at equal rows: what is kept grows by the adapters alone. Half of them: what
    # the plan of fuse_mlp was measured at.
    for tokens, skewed, (name, dtype), experts in [
        *sizes,
        (256, False, fp32, E),
        (256, False, bf16, 2 * E),
        (256, False, bf16, E // 2),
    ]:
        words = (
            f"{experts} experts, {tokens * TOP // experts} rows each{', skewed' * skewed}, {name}"
        )
        found[words] = (
            tuple(ARMS),
            partial(experts_step, tokens=tokens, skewed=skewed, dtype=dtype, experts=experts),
        )
    for tokens in (256, 1024):
        found[f"{E} experts, {tokens * TOP // E} rows each, NF4"] = (
            tuple(NF4_ARMS),
            partial(experts_step, tokens=tokens, skewed=False, dtype=torch.bfloat16, experts=E),
        )
    for rows, (name, dtype) in ((256, bf16), (1024, bf16), (256, fp32)):
        found[f"DoRA, {rows} rows, {name}"] = (
            (FROZEN, PEFT, ACCELERATED),
            partial(dora_step, rows=rows, dtype=dtype),
        )
    return found


CASES = _cases()


def backward(model: nn.Module, step: Step) -> None:
    step().sum().backward()
    model.zero_grad()


def peak_mib(case: str, arm: str) -> float:
    """Peak memory of a forward and a backward over what the process held before them, in a process
    of its own.
    """
    command = [sys.executable, "-m", __spec__.name, "--peak", case, arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def print_peak(case: str, arm: str) -> None:
    model, step = CASES[case][1](arm)
    backward(model, step)
    print(json.dumps(resident_over_start(lambda: backward(model, step))))


def of_model(model: nn.Module) -> list[torch.Tensor]:
    """What a model holds: its parameters, and the scales of those in 4 bits."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state: Any = getattr(module, "quant_state", None)
        if state is not None:
            held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return held


def measure(case: str, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The records of a case: milliseconds, times over PEFT's and over the frozen experts', MiB of
    peak and MiB kept.
    """
    arms, make = CASES[case]
    made = {arm: make(arm) for arm in arms}
    samples = interleave(
        {arm: lambda each=each: backward(*each) for arm, each in made.items()},
        warmup=1,
        iters=rounds,
        clock=clock,
    )
    rows = []
    roles = {FROZEN: "base", PEFT: "rival", ACCELERATED: "ours", FUSED: "ours"}
    of_peft = next((arm for arm in arms if arm.removesuffix(IN_4_BITS) == PEFT), None)
    for arm, seconds in samples.items():
        model, step = made[arm]
        kept = saved_for_backward(step, of_model(model)) / MIB
        role = "" if arm == f"{FROZEN}{IN_4_BITS}" else roles.get(arm.removesuffix(IN_4_BITS), "")
        figures = {
            "ms": [1e3 * s for s in seconds],
            "over_base": [a / b for a, b in zip(seconds, samples[FROZEN], strict=True)],
            "peak_mib": [peak_mib(case, arm)],
            "kept_mib": [kept],
        }
        if of_peft is not None:
            over = [a / b for a, b in zip(seconds, samples[of_peft], strict=True)]
            figures["over_rival"] = over
        rows += [
            record(case, "forward and backward", arm, metric, values, role)
            for metric, values in figures.items()
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    by_arm: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        by_arm.setdefault((row["case"], row["arm"]), {})[row["metric"]] = row
    heads = ["case", "arm", "ms", "over PEFT's", "over frozen's", "peak, MiB", "kept, MiB"]
    cells = [heads]
    for (case, arm), found in by_arm.items():
        figures = [f"{found['ms']['median']:.1f}"]
        for metric in ("over_rival", "over_base"):
            figures.append(with_quartiles(found[metric]) if metric in found else "-")
        cells.append(
            [
                case,
                arm,
                *figures,
                f"{found['peak_mib']['median']:.0f}",
                f"{found['kept_mib']['median']:.1f}",
            ]
        )
    return markdown(cells, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.experts", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed rounds of each case (default: 7)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose names contain this"
    )
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="also write the figures to a CSV file"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="take the processor's time, of one thread, on a machine that others use, too",
    )
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(*args.peak)
        return
    clock = time.process_time if args.processor_time else time.perf_counter
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if args.only in case:
            rows += measure(case, args.rounds, clock)
            print(table([row for row in rows if row["case"] == case]), flush=True)
    if args.records:
        write_records(args.records, rows, environment())


if __name__ == "__main__":
    main()
