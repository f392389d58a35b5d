"""Several adapters in one step (``adapters_of_rows``) against PEFT, which trains one after another.

    python -m benchmarks.lab.adapters_of_rows [--rounds 7] [--only TEXT] [--processor-time] [--records FILE]

Each adapter takes one step on a sequence of its own: forward, backward and ``torch.optim.AdamW(fused=True)``,
the same in all arms. The model is a Llama of width 576 with a vocabulary of 4,096; r 16 on all linear
layers. Adapters are float32, PEFT's default, or bfloat16. Arms take turns, step by step in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import stablelora_kernels as slk
from benchmarks.common.arms import ACCELERATED, PEFT
from benchmarks.common.measure import environment
from benchmarks.common.records import record, write_records
from benchmarks.common.tables import markdown, with_quartiles
from stablelora_kernels.utils.timing import interleave

TOGETHER = "adapters_of_rows"
ARMS = (PEFT, ACCELERATED, TOGETHER)
ROLES = {PEFT: "rival", ACCELERATED: "", TOGETHER: "ours"}
R, LR = 16, 1e-4
# Of the model, and whether its adapters are float32.
DTYPES = {
    "fp32": (torch.float32, True),
    "bf16": (torch.bfloat16, True),
    "bf16, adapters too": (torch.bfloat16, False),
}


class Case(NamedTuple):
    """How many adapters, and of how many tokens each one's sequence is."""

    adapters: int
    tokens: int
    dtype: torch.dtype
    float32_adapters: bool
    layers: int = 6
    width: int = 576
    vocabulary: int = 4096

    @property
    def names(self) -> list[str]:
        return [f"adapter{number}" for number in range(self.adapters)]


CASES = {
    f"{adapters} adapters x {tokens} tokens, {name}": Case(adapters, tokens, *dtypes)
    for name, dtypes in DTYPES.items()
    for adapters, tokens in ((8, 16), (8, 64), (8, 256))
}


def model_of(case: Case) -> nn.Module:
    """A PEFT model with all adapters of a case, in its dtype."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.width * 8 // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=case.width // 192,
        tie_word_embeddings=True,
    )
    base = LlamaForCausalLM(config).to(case.dtype)
    lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear")
    first, *others = case.names
    options = {"autocast_adapter_dtype": case.float32_adapters}
    model: Any = get_peft_model(base, lora, adapter_name=first, **options)
    for name in others:
        model.add_adapter(name, lora, **options)
    return model.train()  # type: ignore[no-any-return]


def batch_of(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(case.vocabulary, (case.adapters, case.tokens), generator=generator)


def one_after_another(case: Case, model: Any) -> Callable[[], None]:
    """A step of each adapter, with an optimizer of its own."""
    batch = batch_of(case)
    optimizers = {}
    for name in case.names:
        model.set_adapter(name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=LR, fused=True)

    def step() -> None:
        for name, row in zip(case.names, batch.split(1), strict=True):
            model.set_adapter(name)
            logits = model(row).logits
            slk.losses_of_rows(logits, row, [name])[name].backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    return step


def together(case: Case, model: nn.Module) -> Callable[[], None]:
    """A step of all adapters at once."""
    batch = batch_of(case)
    pairs = slk.lora_pairs(model)
    parameters = [half.requires_grad_() for pair in pairs for half in (pair.A, pair.B)]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

    def step() -> None:
        with slk.adapters_of_rows(model, case.names):
            losses = slk.losses_of_rows(model(batch).logits, batch, case.names)
            torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(case: Case, arm: str) -> Callable[[], None]:
    model = model_of(case)
    if arm != PEFT:
        slk.accelerate_peft(model, strict=True)
    return together(case, model) if arm == TOGETHER else one_after_another(case, model)


def measure(name: str, case: Case, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The records of a case: milliseconds of a step of all adapters, and times over PEFT's."""
    steps = {arm: step_of(case, arm) for arm in ARMS}
    samples = interleave(steps, warmup=2, iters=rounds, clock=clock)
    rows = []
    for arm, seconds in samples.items():
        over = [a / b for a, b in zip(seconds, samples[PEFT], strict=True)]
        milliseconds = [1e3 * s for s in seconds]
        rows.append(record(name, "step", arm, "ms", milliseconds, ROLES[arm]))
        rows.append(record(name, "step", arm, "over_rival", over, ROLES[arm]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells = [["case", "arm", "ms", "over PEFT's (quartiles)"]]
    for milliseconds, over in zip(rows[::2], rows[1::2], strict=True):
        ratio = with_quartiles(over)
        cells.append([over["case"], over["arm"], f"{milliseconds['median']:.0f}", ratio])
    return markdown(cells, 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.adapters_of_rows", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="timed rounds of each case (default: 7)")
    add("--only", default="", metavar="TEXT", help="only cases whose names contain this")
    add("--records", type=Path, metavar="FILE", help="also write the figures to a CSV file")
    add(
        "--processor-time",
        action="store_true",
        help="take the processor's time, of one thread, on a machine that others use, too",
    )
    args = parser.parse_args(argv)
    clock = time.process_time if args.processor_time else time.perf_counter
    if args.processor_time:
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        if args.only in name:
            of_case = measure(name, case, args.rounds, clock)
            print(table(of_case), flush=True)
            rows += of_case
    if args.records:
        write_records(args.records, rows, environment())


if __name__ == "__main__":
    main()
