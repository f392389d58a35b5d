"""The loss of a language model's head, with LoRA and without: time and peak memory, with logits and
without them.

    python -m benchmarks.lab.head_loss [--rounds 5] [--tokens 1024 2048] [--records FILE]

The head is that of Qwen3 0.6B: a vocabulary of 151,936, width 1,024, bfloat16, r 16 with bfloat16
adapters. Arms take turns, call by call in one process; a forward and a backward each. Peak memory is
that of a process of its own over what it held before the call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.common.arms import fill
from benchmarks.common.measure import environment
from benchmarks.common.memory import resident_over_start
from benchmarks.common.records import record, write_records
from benchmarks.common.tables import markdown, with_quartiles
from stablelora_kernels.functional import lora_linear_cross_entropy, lora_linear_log_probs
from stablelora_kernels.utils.timing import interleave

VOCABULARY, WIDTH, R = 151_936, 1024, 16
LOGITS = "logits, frozen head"
LOGITS_PEFT = "logits, PEFT on the head"
WITHOUT = "without logits, frozen head"
WITHOUT_LORA = "without logits, LoRA on the head"
BY_TOKEN = "without logits, LoRA on the head, losses by token"
ENTROPIES = "without logits, LoRA on the head, log-probabilities and entropies"
ROLES = {LOGITS: "base", LOGITS_PEFT: "rival", WITHOUT_LORA: "ours"}
Step = Callable[[], Tensor]


class Head(nn.Module):
    """A head as a part of a model: PEFT targets no module that is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
        self.lm_head.requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.lm_head.weight.normal_(std=WIDTH**-0.5, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits


def with_logits(model: nn.Module, hidden: Tensor, labels: Tensor) -> Step:
    """transformers' loss."""
    return lambda: ForCausalLMLoss(model(hidden), labels, VOCABULARY)


def without_logits(model: Any, hidden: Tensor, labels: Tensor, arm: str) -> Step:
    """The op of the arm, on PEFT's adapter if there is one."""
    head = model.base_model.model.lm_head if hasattr(model, "base_model") else model.lm_head
    base = getattr(head, "base_layer", head)
    call: dict[str, Any] = {
        "hidden": hidden,
        "weight": base.weight,
        "labels": nn.functional.pad(labels, (0, 1), value=-100)[:, 1:],
        "bias": None,
        "lora_A": head.lora_A["default"].weight if base is not head else None,
        "lora_B": head.lora_B["default"].weight if base is not head else None,
        "scaling": head.scaling["default"] if base is not head else 1.0,
    }

    def entropies() -> Tensor:
        log_probs, entropy = lora_linear_log_probs(**call)
        return (log_probs + entropy).mean()

    if arm == ENTROPIES:
        return entropies
    reduction = "none" if arm == BY_TOKEN else "mean"
    return lambda: lora_linear_cross_entropy(**call, reduction=reduction).mean()


def make(arm: str, tokens: int) -> tuple[nn.Module, Step]:
    """The model of an arm, and its forward."""
    torch.manual_seed(0)
    model: Any = Head()
    if arm in (LOGITS_PEFT, WITHOUT_LORA, BY_TOKEN, ENTROPIES):
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["lm_head"])
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        fill(model)
    hidden = torch.randn(1, tokens, WIDTH).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1, tokens))
    if arm in (LOGITS, LOGITS_PEFT):
        return model, with_logits(model, hidden, labels)
    return model, without_logits(model, hidden, labels, arm)


ARMS = (LOGITS, LOGITS_PEFT, WITHOUT, WITHOUT_LORA, BY_TOKEN, ENTROPIES)


def backward(model: nn.Module, step: Step) -> None:
    step().backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def peak_mib(arm: str, tokens: int) -> float:
    """Peak memory of a forward and a backward over what the process held before them, in a process
    of its own.
    """
    command = [sys.executable, "-m", __spec__.name, "--peak", arm, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def print_peak(arm: str, tokens: int) -> None:
    model, step = make(arm, tokens)
    backward(model, step)
    print(json.dumps(resident_over_start(lambda: backward(model, step))))


def measure(tokens: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The records of all arms: milliseconds, times over both with logits, and MiB of peak."""
    made = {arm: make(arm, tokens) for arm in ARMS}
    samples = interleave(
        {arm: lambda each=each: backward(*each) for arm, each in made.items()},
        warmup=1,
        iters=rounds,
        clock=clock,
    )
    rows = []
    case = f"{tokens:,} tokens, vocabulary {VOCABULARY:,}"
    for arm, seconds in samples.items():
        figures = {
            "ms": [1e3 * s for s in seconds],
            "over_base": [a / b for a, b in zip(seconds, samples[LOGITS], strict=True)],
            "over_rival": [a / b for a, b in zip(seconds, samples[LOGITS_PEFT], strict=True)],
            "peak_mib": [peak_mib(arm, tokens)],
        }
        rows += [
            record(case, "forward and backward", arm, metric, values, ROLES.get(arm, ""))
            for metric, values in figures.items()
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    by_arm: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        by_arm.setdefault((row["case"], row["arm"]), {})[row["metric"]] = row
    cells = [["case", "arm", "ms", "over frozen's", "over PEFT's", "peak, MiB"]]
    for (case, arm), of_arm in by_arm.items():
        ratios = [with_quartiles(row) for row in (of_arm["over_base"], of_arm["over_rival"])]
        ms = f"{of_arm['ms']['median']:.0f}"
        cells.append([case, arm, ms, *ratios, f"{of_arm['peak_mib']['median']:,.0f}"])
    return markdown(cells, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.head_loss", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds of each case (default: 5)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], metavar="N")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="also write the figures to a CSV file"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="take the processor's time, of one thread, on a machine that others use, too",
    )
    parser.add_argument("--peak", nargs=2, metavar=("ARM", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak[0], int(args.peak[1]))
        return
    clock = time.process_time if args.processor_time else time.perf_counter
    rows: list[dict[str, Any]] = []
    for tokens in args.tokens:
        rows += measure(tokens, args.rounds, clock)
    print(table(rows))
    if args.records:
        write_records(args.records, rows, environment())


if __name__ == "__main__":
    main()
