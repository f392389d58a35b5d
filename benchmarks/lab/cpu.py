"""A training step, and few rows, on a CPU: dtypes, dropout and instruction sets; arms take turns in
one process.

    python -m benchmarks.lab.cpu [--rounds 15] [--records FILE]

A step is forward and backward of layers of SmolLM2's sizes without a head, r 16 on all linear
layers, 168 rows. Few rows pass through 24 layers one after the other, as in a model. A set of
instructions that the processor has more than is emulated: each library is told to use less, in a
process of its own. PyTorch asks the hardware about bfloat16, so oneDNN is off there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.common.arms import ACCELERATED, FROZEN, MLP_FUSED, OURS, PEFT, adapt, fill
from benchmarks.common.measure import environment, shuffled
from benchmarks.common.records import record, write_records
from benchmarks.common.tables import markdown

NATIVE, AVX2 = "all", "AVX2, emulated"
ENVIRONMENT = {
    NATIVE: {},
    AVX2: {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = (FROZEN, PEFT, ACCELERATED, OURS)
MODELS = (*LAYERS, ACCELERATED + MLP_FUSED, OURS + MLP_FUSED)
WIDTH, R, IN_A_ROW = 576, 16, 24
Run = Callable[[], Any]


def step(arm: str, dtype: torch.dtype, dropout: float, layers: int) -> Run:
    """Forward and backward of an arm's model."""
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    torch.manual_seed(0)
    base = (
        LlamaModel(LlamaConfig(vocab_size=1000, num_hidden_layers=layers, **sizes))
        .to(dtype)
        .requires_grad_(False)
    )
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = adapt(base, arm, names, r=R, dropout=dropout).train()
    fill(model)
    ids = torch.arange(168).view(8, 21)

    def run() -> None:
        model(input_ids=ids).last_hidden_state.float().square().mean().backward()
        model.zero_grad()

    return run


def few(arm: str, dtype: torch.dtype, dropout: float, rows: int, backward: bool) -> Run:
    """An arm's layers on few rows."""
    torch.manual_seed(0)
    base = (
        nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(IN_A_ROW)])
        .to(dtype)
        .requires_grad_(False)
    )
    model = adapt(base, arm, [str(i) for i in range(IN_A_ROW)], r=R, dropout=dropout).train()
    fill(model)
    x, grad = (torch.randn(rows, WIDTH).to(dtype) for _ in range(2))
    x.requires_grad_(backward)
    return lambda: model(x).backward(grad) if backward else model(x)


class Case(NamedTuple):
    """The set of instructions, the arms, what makes one of them, and whether oneDNN is off."""

    instructions: str
    arms: tuple[str, ...]
    make: Callable[[str], Run]
    without_onednn: bool


def _cases() -> dict[str, Case]:
    """By name."""
    found: dict[str, Case] = {}
    for instructions in ENVIRONMENT:
        for name, dtype in DTYPES.items():
            for dropout in (0.0, 0.05):
                end = f"{name}, dropout {dropout}, {instructions}"
                slow = dtype != torch.float32 and instructions != NATIVE
                make = partial(step, dtype=dtype, dropout=dropout, layers=2 if slow else 6)
                found[f"step, {end}"] = Case(instructions, MODELS, make, slow)
                for rows in (1, 8) if instructions == NATIVE else ():
                    for words, backward in (("forward", False), ("forward and backward", True)):
                        make = partial(
                            few, dtype=dtype, dropout=dropout, rows=rows, backward=backward
                        )
                        found[f"{rows} rows, {words}, {end}"] = Case(
                            instructions, LAYERS, make, slow
                        )
    return found


CASES = _cases()


def measure(case: str, rounds: int) -> list[dict[str, Any]]:
    """The records of a case, in a process that has its instructions: wall and CPU time, page
    faults.
    """
    _, arms, make, without_onednn = CASES[case]
    if without_onednn:
        torch._C._set_mkldnn_enabled(False)
    runs = {arm: make(arm) for arm in arms}
    found: dict[str, dict[str, list[float]]] = {
        arm: {"ms": [], "cpu_ms": [], "faults": []} for arm in arms
    }
    for turn in range(-2, rounds):
        for arm in shuffled(list(arms), turn):
            before = _counts()
            runs[arm]()
            if turn >= 0:
                for metric, start, end in zip(found[arm], before, _counts(), strict=True):
                    found[arm][metric].append(end - start)
    rows = []
    for arm, figures in found.items():
        role = {FROZEN: "base", PEFT: "rival"}.get(arm, "ours")
        for metric in ("ms", "cpu_ms"):
            ratios = [a / b for a, b in zip(figures[metric], found[PEFT][metric], strict=True)]
            rows.append(record(case, "cpu", arm, f"{metric}_over_rival", ratios, role))
        rows += [
            record(case, "cpu", arm, metric, values, role) for metric, values in figures.items()
        ]
    return rows


def _counts() -> tuple[float, float, float]:
    return (
        1e3 * time.perf_counter(),
        1e3 * time.process_time(),
        resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Wall time over PEFT's by case and arm, and PEFT's milliseconds."""
    found = {(row["case"], row["arm"], row["metric"]): row["median"] for row in rows}
    cells = [
        [
            "case",
            "PEFT, ms",
            *(arm for arm in MODELS if arm != PEFT),
            "CPU time, best",
            "faults, PEFT / best",
        ]
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        ratios = {
            arm: found[case, arm, "ms_over_rival"] for arm in MODELS if (case, arm, "ms") in found
        }
        best = min(
            (arm for arm in ratios if arm not in (FROZEN, PEFT)), key=lambda arm: ratios[arm]
        )
        shown = [f"{ratios[arm]:.2f}" if arm in ratios else "" for arm in MODELS if arm != PEFT]
        faults = [f"{found[case, arm, 'faults']:.0f}" for arm in (PEFT, best)]
        cpu = f"{found[case, best, 'cpu_ms_over_rival']:.2f}"
        cells.append([case, f"{found[case, PEFT, 'ms']:.1f}", *shown, cpu, " / ".join(faults)])
    return markdown(cells, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.cpu", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed rounds of each case (default: 15)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only cases whose names contain this"
    )
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="also write the figures to a CSV file"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.rounds)))
        return
    rows: list[dict[str, Any]] = []
    for case in (case for case in CASES if args.only in case):
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--case",
            case,
            "--rounds",
            str(args.rounds),
        ]
        done = subprocess.run(
            command,
            env=os.environ | ENVIRONMENT[CASES[case].instructions],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(done.stdout.splitlines()[-1])
        print(table(rows).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if args.records:
        write_records(args.records, rows, environment())


if __name__ == "__main__":
    main()
