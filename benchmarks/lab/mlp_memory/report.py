"""Tables: an 8B Llama's MLP by formula, the stored training steps of SmolLM2-135M, and the stored times of MLPs."""

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
# The suite's cases, beside FILE.
TIMES = "suite_mlp.json"
_TIMED = {
    "ours, one by one": "one by one",
    "ours, projections fused": "`fuse_projections`",
    "ours, MLP fused": "`fuse_mlp`",
    "accelerated PEFT, MLP fused": "`accelerate_peft`, `fuse_mlp`",
}
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


def measured_tables(found: dict[str, Any]) -> str:
    """One table for each dtype and dropout, each with a line of conditions."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["dtype"], row["dropout"], row["layers"], row["tokens"], row["r"]), []).append(row)
    return "\n\n".join(_measured(*conditions, rows) for conditions, rows in groups.items())


def _measured(dtype: str, dropout: float, layers: int, tokens: int, r: int, rows: list[dict[str, Any]]) -> str:
    what = f"dropout {dropout:g}" if dropout else "no dropout"
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    cells = [
        ["", "kept for backward, MiB", "by the MLPs, MiB", "peak of a step, MiB", "of it above rest, MiB", "losses"]
    ]
    for row in rows:
        losses = f"{row['loss']:.4f}, {row['loss_after_steps']:.4f}"
        figures = [_mib(row[key]) for key in ("saved_mib", "mlps_saved_mib", "peak_mib", "step_mib")]
        cells.append([NAMES.get(row["arm"], row["arm"]), *figures, losses])
    return f"{name}, {what}, {layers} layers, {tokens} tokens, r {r}:\n\n{markdown(cells)}"


def _mib(value: float | None) -> str:
    # Only Linux tells the peak.
    return "" if value is None else f"{value:,.0f}"


def time_table(suite: dict[str, Any]) -> str:
    """Our times of an MLP over PEFT's; above 1 in bold."""
    cells = [["tokens x width x inner", *_TIMED.values()]]
    for entry in suite["benchmarks"]:
        info, shape = entry["extra_info"], entry["extra_info"]["shape"]
        dropout = f", dropout {shape['dropout']:g}" if shape["dropout"] else ""
        medians = [info["arms"][arm]["over_rival"]["median"] for arm in _TIMED]
        shown = [f"**{median:.2f}**" if median > 1 else f"{median:.2f}" for median in medians]
        cells.append([f"{shape['rows']} x {shape['k']} x {shape['inner']}, {info['dtype']}{dropout}", *shown])
    return markdown(cells)
