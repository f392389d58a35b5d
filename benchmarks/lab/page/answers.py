"""The opening of the page: what the stored results answer, in one table a machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common.tables import markdown
from benchmarks.finetuning.arms import FROZEN, PEFT, STABLE
from benchmarks.finetuning.result import overhead

# The first word of a case and its phase, and what they are called here.
_QUESTIONS = {
    ("training", "step"): "a whole training step",
    ("layer", "both"): "one layer, forward and backward",
    ("mlp", "both"): "a gated MLP, forward and backward",
    ("optimizer", "step"): "an optimizer step",
    ("adapter", "save"): "saving an adapter",
    ("adapter", "load"): "loading an adapter",
}
# The column of an arm. Of two arms in one column the later one counts: on a GPU ours is Triton.
_COLUMNS = {
    "ours, PyTorch": 0, "ours": 0, "ours, Triton": 0, "StableLoRAAdamW": 0, "accelerated PEFT": 1, "ours compiled": 2,
    "ours, MLP fused": 0, "accelerated PEFT, MLP fused": 1,
}  # fmt: skip
_HEAD = ["our time over the rival's", "the rival", "ours", "`accelerate_peft`", "ours, compiled"]


def answers(directory: Path) -> list[str]:
    """Paragraphs that answer a buyer's questions from a machine's suite and fine-tuning run."""
    parts = [_table(file) for file in sorted(directory.glob("suite*.json"))]
    return parts + [_fine_tuning(json.loads(file.read_text(encoding="utf-8"))) for file in main_jobs(directory)]


def main_jobs(directory: Path) -> list[Path]:
    """The results of ``python -m benchmarks`` that are stored for a machine."""
    return sorted(directory.glob("quick*/result.json"))


def _table(file: Path) -> str:
    """Each question's time over the rival's: the median over its cases, and the range of them."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for entry in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]:
        info = entry["extra_info"]
        words = info["case"].split()
        if (question := _QUESTIONS.get((words[0], info["phase"]))) is None or info.get("axis"):
            continue
        dtype = next((word for word in words if word.startswith(("fp32", "bf16"))), "")
        row = found.setdefault((f"{question}, {dtype}".rstrip(", "), info["rival"]), [[], [], []])
        best = {_COLUMNS[arm]: arm for arm in _COLUMNS if info["arms"].get(arm, {}).get("over_rival")}
        for column, arm in best.items():
            row[column].append(info["arms"][arm]["over_rival"]["median"])
    order = list(_QUESTIONS.values())
    rows = sorted(found.items(), key=lambda item: order.index(item[0][0].rpartition(", ")[0] or item[0][0]))
    return markdown([_HEAD, *([what, rival, *map(_cell, row)] for (what, rival), row in rows)], 2)


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return ""
    text = f"{statistics.median(ratios):.2f}"
    if len(ratios) > 1:
        text += f" ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"**{text}**" if max(ratios) > 1 else text


def _fine_tuning(result: Any) -> str:
    """A fine-tuning run in a few sentences."""
    if headlines := result.get("headlines"):
        settings = result["settings"]
        about = f"{settings['model']}, {settings['targets']}, r {settings['r']}, dropout {settings['lora_dropout']:g}"
        return "\n".join([f"Fine-tuning {about}, {settings['dtype']}:", "", *(f"- {line}" for line in headlines[:-1])])
    if "arms" not in result:
        return ""
    arms, recipe, settings = result["arms"], result["recipe"], result["settings"]
    ours = next((name for name in arms if name.startswith(STABLE)), None)
    if ours is None or PEFT not in arms:
        return ""
    sentences = []
    costs = {name: overhead(arms[name], arms[FROZEN]) for name in (PEFT, ours)} if FROZEN in arms else {}
    if all(costs.values()) and costs:
        sentences.append(
            f"a step takes {costs[ours][0]:+.1f} % over the frozen model's with this library and "
            f"{costs[PEFT][0]:+.1f} % with PEFT"
        )
    saved = {name: (arms[name].get("footprint") or {}).get("saved_mib") for name in (PEFT, ours)}
    if all(saved.values()):
        sentences.append(f"{saved[ours]:.1f} MiB are saved for backward, {saved[PEFT]:.1f} with PEFT")
    scores = {name: arms[name].get("test") for name in (PEFT, ours)}
    if all(scores.values()):
        sentences.append(
            f"held-out accuracy is {100 * scores[ours]['accuracy']:.1f} %, {100 * scores[PEFT]['accuracy']:.1f} % with PEFT"
        )
    layers = ", ".join(recipe["target_modules"])
    about = f"Fine-tuning {settings['model']} ({layers}, r {recipe['r']}, {settings['dtype']})"
    return f"{about}: {'; '.join(sentences)}." if sentences else ""
