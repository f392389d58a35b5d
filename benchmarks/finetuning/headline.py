"""The answer of a run in words: what this library saved or cost against PEFT, in time and in memory."""

from __future__ import annotations

from typing import Any

from benchmarks.finetuning.arms import ACCELERATED, PEFT, STABLE

# An arm's figures, as in result.json's "summary".
Row = dict[str, Any]

_MEMORY = (("kept {} memory for backward", "saved_mib"), ("needed {} memory at its peak", "peak_mib"))
# Smaller differences in memory are called none.
_EQUAL_PERCENT = 0.5


def headlines(summary: dict[str, Row]) -> list[str]:
    """A sentence for ``accelerate_peft``, one for ``apply_lora`` at the same shrink ratio, and the figures behind the first.

    ``summary`` has each arm's figures by its name. An arm without timed steps gets no sentence.
    """
    accelerated = [name for name in summary if name.startswith(f"{ACCELERATED}-")]
    calls = dict.fromkeys(accelerated, "accelerate_peft")
    calls |= dict.fromkeys((name.replace(ACCELERATED, STABLE) for name in accelerated), "apply_lora")
    timed = [name for name in calls if name in summary and summary[name]["speedup_over_peft"] is not None]
    lines = [f"{calls[name]}: {compare(summary[name], summary[PEFT])}" for name in timed]
    return [*lines, _figures(calls[timed[0]], summary[timed[0]], summary[PEFT])] if timed else []


def compare(row: Row, peft: Row) -> str:
    """A sentence on an arm's time and memory against PEFT's; gains and losses in the same words.

    Times differ only if the 95 % interval of their ratio leaves out 1.
    """
    ratio, half = row["speedup_over_peft"], row["speedup_over_peft_95"]
    # Of a single step the interval is nan.
    differ = abs(ratio - 1) > half
    time = f"{change(1 / ratio)} time than" if differ else "about as much time as"
    text = f"a training step took {time} PEFT's ({ratio:.2f}x as fast, 95% interval {ratio - half:.2f}x to {ratio + half:.2f}x)"
    memory = []
    for phrase, key in _MEMORY:
        if row[key] and peft[key]:
            ratio = row[key] / peft[key]
            memory.append(phrase.format("the same" if abs(100 * ratio - 100) < _EQUAL_PERCENT else change(ratio)))
    return ", ".join([text, " and ".join(memory)] if memory else [text]) + "."


def change(ratio: float) -> str:
    """A ratio to something as "25% less" or "2.0% more"."""
    percent = 100 * ratio - 100
    size = abs(percent)
    return f"{size:.{0 if size >= 9.95 else 1}f}% {'less' if percent < 0 else 'more'}"


def _figures(call: str, row: Row, peft: Row) -> str:
    parts = [f"a step took {row['step_ms_median']:,.0f} ms, PEFT's {peft['step_ms_median']:,.0f} ms"]
    for phrase, key in _MEMORY:
        if row[key] and peft[key]:
            parts.append(phrase.format(f"{row[key]:,.0f} MiB of") + f", PEFT's {peft[key]:,.0f} MiB")
    return f"In figures, {call}: {'; '.join(parts)}."
