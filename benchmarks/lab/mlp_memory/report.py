"""Tables: an 8B Llama's MLP by formula, and the stored training steps of SmolLM2-135M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.common.memory import MIB
from benchmarks.common.tables import RESULTS, markdown
from benchmarks.lab.mlp_memory.formula import (
    ACCELERATED,
    FROZEN,
    FUSED,
    PEFT,
    PEFT_LIGER,
    PROJECTIONS,
    SEPARATE,
    SEPARATE_LIGER,
    UNSLOTH,
    Sizes,
    in_words,
    kept,
    total,
)

# Llama 3's 8B, and the tokens of one step.
LLAMA_8B, LAYERS = Sizes(tokens=8192, width=4096, inner=14336, rank=16), 32
DTYPE = torch.bfloat16
# Rows of the table and bars of the plot; each has the arms that keep the same.
ROWS = {
    "frozen": FROZEN,
    "PEFT": PEFT,
    "PEFT, Liger's SwiGLU": PEFT_LIGER,
    "Unsloth": UNSLOTH,
    "`apply_lora`, also with `fuse_projections`": SEPARATE,
    "`apply_lora`, Liger's SwiGLU": SEPARATE_LIGER,
    "`fuse_mlp`": FUSED,
}
FILE = "mlp_memory.json"
# How the table names the arms of a measured step.
NAMES = {
    SEPARATE: "`apply_lora`",
    PROJECTIONS: "`apply_lora`, `fuse_projections`",
    FUSED: "`apply_lora`, `fuse_mlp`",
    ACCELERATED: "`accelerate_peft`, `fuse_mlp`",
}


def mib(arm: str, dropout: bool) -> float | None:
    """MiB that one MLP of ``LLAMA_8B`` keeps on a GPU, or None if the arm has no dropout."""
    if dropout and arm == UNSLOTH:
        return None
    return LLAMA_8B.bytes(total(kept(arm, DTYPE, dropout, gpu=True))) / MIB


def formula_table() -> str:
    cells = [["kept by an MLP", "bytes, no dropout", "MiB", "32 layers, GiB", "MiB, dropout", "32 layers, GiB"]]
    for name, arm in ROWS.items():
        found = [mib(arm, dropout) for dropout in (False, True)]
        row = [name, in_words(total(kept(arm, DTYPE, False, gpu=True)))]
        for value in found:
            row += ["", ""] if value is None else [f"{value:,.0f}", f"{LAYERS * value / 1024:.1f}"]
        cells.append(row)
    return markdown(cells, 2)


def stored() -> list[Path]:
    return sorted(RESULTS.glob(f"*/{FILE}"))


def measured_table(found: dict[str, Any]) -> str:
    """Peaks of a step, and what is kept for backward; a column for each dtype and dropout."""
    columns: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        name = {"fp32": "float32", "bf16": "bfloat16"}[row["dtype"]]
        dropout = f", dropout {row['dropout']:g}" if row["dropout"] else ""
        cell = f"{_mib(row['peak_mib'])} ({_mib(row['saved_mib'])})".strip()
        columns.setdefault(f"{name}{dropout}, {row['layers']} layers", {})[row["arm"]] = cell
    arms = dict.fromkeys(row["arm"] for row in found["rows"])
    cells = [["peak of a step (kept for backward), MiB", *columns]]
    return markdown([*cells, *([NAMES.get(arm, arm), *(column[arm] for column in columns.values())] for arm in arms)])


def _mib(value: float | None) -> str:
    # Only Linux tells the peak.
    return "" if value is None else f"{value:,.0f}"
