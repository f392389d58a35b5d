"""Liger-Kernel and ``accelerate_peft`` together in the Trainer: losses, and what each arm keeps.

    TRITON_INTERPRET=1 python -m benchmarks.lab.liger

Arms train the same small Llama and Qwen3 for two steps, in float32. Liger's RoPE and fused linear
cross-entropy run, on a CPU in Triton's interpreter. Its RMSNorm and SwiGLU do not run there, so
RMSNorm is off; SwiGLU is on where ``fuse_mlp`` computes the MLP in its place. It needs
liger-kernel.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import nn

import stablelora_kernels as slk
from benchmarks.common.memory import saved_for_backward
from benchmarks.common.tables import markdown

# A vocabulary that is large beside the width, as in real models.
SIZES = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
# At least 64 rows, from which on PyTorch's operators compute a gated MLP in one op.
ROWS, TOKENS = 4, 16
KIB = 1024


class Arm(NamedTuple):
    """Which of the two libraries an arm has."""

    liger: bool
    accelerated: bool


# Liger patches functions of whole modules of transformers, so arms without it come first.
ARMS = {
    "PEFT": Arm(liger=False, accelerated=False),
    "PEFT + one line": Arm(liger=False, accelerated=True),
    "PEFT + Liger": Arm(liger=True, accelerated=False),
    "PEFT + Liger + one line": Arm(liger=True, accelerated=True),
}


class Outcome(NamedTuple):
    """The losses of two steps, and the bytes that the next forward keeps for backward."""

    losses: list[float]
    saved: int


def measure(family: str, arm: Arm) -> Outcome:
    """Train an arm's model for two steps, and count what it keeps for backward."""
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    base = kind(config(**SIZES))
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora)
    # With the line, the callback puts the op in the place of Liger's SwiGLU.
    kernels = {"rms_norm": False, "swiglu": arm.accelerated}
    with tempfile.TemporaryDirectory() as directory:
        args = transformers.TrainingArguments(
            directory, max_steps=2, per_device_train_batch_size=ROWS, logging_steps=1, seed=3, report_to="none",
            use_cpu=not torch.cuda.is_available(), disable_tqdm=True, save_strategy="no", use_liger_kernel=arm.liger,
            liger_kernel_config=kernels if arm.liger else None,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=_rows(2 * ROWS),
            callbacks=[slk.AccelerateCallback(fuse_mlp=True)] if arm.accelerated else [],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(losses, _saved(model))


def _rows(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, SIZES["vocab_size"], (count, TOKENS), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _saved(model: nn.Module) -> int:
    """Bytes that a forward keeps for backward, without parameters, buffers and the batch."""
    ids = torch.tensor([row["input_ids"] for row in _rows(ROWS)])
    ids = ids.to(next(model.parameters()).device)
    present = [*model.parameters(), *model.buffers(), ids]
    return saved_for_backward(lambda: model(input_ids=ids, labels=ids).loss, present)


def table(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Kept bytes by arm and family."""
    cells = [["kept for backward, KiB", *outcomes]]
    for name in ARMS:
        sizes = [of_family[name].saved / KIB for of_family in outcomes.values()]
        cells.append([name, *(f"{size:,.0f}" for size in sizes)])
    return markdown(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print losses and bytes as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    outcomes: dict[str, dict[str, Outcome]] = {
        family: {name: measure(family, arm) for name, arm in ARMS.items()} for family in FAMILIES
    }
    if args.json:
        as_lists: dict[str, Any] = {
            family: {name: outcome._asdict() for name, outcome in of_family.items()}
            for family, of_family in outcomes.items()
        }
        print(json.dumps(as_lists))
        return
    print(table(outcomes))


if __name__ == "__main__":
    main()
