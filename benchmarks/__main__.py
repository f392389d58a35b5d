"""``python -m benchmarks``: fine-tune a real model with PEFT and with this library, side by side."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.common.assets import DATASETS, AssetError
from benchmarks.finetuning.recipe import LABELS, OUT, Recipe

_NEEDED = (
    "gguf",
    "matplotlib",
    "pandas",
    "peft",
    "safetensors",
    "scipy",
    "tokenizers",
    "tqdm",
    "transformers",
)
# Of a run without --steps. Two cores without AVX-512 then need all of it.
TIME_LIMIT_S = 335.0


class _List(argparse.Action):
    """Print the table of benchmarks/README.md."""

    def __call__(self, parser: argparse.ArgumentParser, *_args: Any) -> NoReturn:
        readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        for row in re.findall(r"^\| (.+) \| (`.+) \| (.+) \|$", readme, re.MULTILINE):
            what, command, time = (
                re.sub(r" ?\(\[.*?\)\)|\[(.*?)\]\(.*?\)|`", r"\1", cell) for cell in row
            )
            print(f"{what}\n    python -m {command}    {time}")
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> tuple[Recipe, Path]:
    """The recipe, and where files go. A wrong argument ends the program with a message, before any
    download or heavy import.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        "python -m benchmarks [options]",
        description="Fine-tune a real model frozen, with PEFT and with this library: speed, memory and quality.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--list",
        action=_List,
        nargs=0,
        help="print what else can be measured, how, and in what time",
    )
    parser.add_argument("--out", type=OUT, metavar="DIR", help="where files go (default: results)")
    for each in (each for each in fields(Recipe) if each.metadata):
        read, words, flag, classes = each.metadata.values()
        options: dict[str, Any] = {"choices": read} if isinstance(read, tuple) else {"type": read}
        if isinstance(each.default, tuple):
            options |= {"nargs": "+", "metavar": "NAME"}
            words += " (default: all)"
        else:
            words += f" (default: {each.default}{f'; for classes {classes}' if classes else ''})"
        parser.add_argument(
            f"--{flag or each.name.replace('_', '-')}", dest=each.name, help=words, **options
        )
    given = vars(parser.parse_args(argv))
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"packages are missing: {', '.join(missing)}; install them with: pip install -e '.[bench]'"
        )
    out = given.pop("out", Path("results"))
    # --steps is exact; the default's steps adapt to the machine.
    limit = None if "steps" in given else TIME_LIMIT_S
    given |= {
        name: tuple(dict.fromkeys(value))
        for name, value in given.items()
        if isinstance(value, list)
    }
    given |= _hardware(parser, given.get("device", "auto"), given.get("dtype", "auto"))
    if given.get("data") in DATASETS:
        given = {
            each.name: each.metadata["classes"]
            for each in fields(Recipe)
            if each.metadata.get("classes")
        } | given
    return Recipe(**given, time_limit_s=limit), out


def _hardware(parser: argparse.ArgumentParser, device: str, dtype: str) -> dict[str, str]:
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        without = torch.version.cuda is None and torch.version.hip is None
        parser.error(
            f"--device cuda: {'this PyTorch is built without CUDA' if without else 'no GPU is visible'}"
        )
    device = "cuda" if there and device != "cpu" else "cpu"
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    fast_bf16 = (
        torch.cuda.is_bf16_supported()
        if device == "cuda"
        else "avx512_bf16" in flags or "amx_bf16" in flags
    )
    in_bf16 = dtype == "bf16" or (dtype == "auto" and fast_bf16)
    return {"device": device, "dtype": "bfloat16" if in_bf16 else "float32"}


def _announce(recipe: Recipe, out: Path) -> None:
    """Say what runs, before imports and downloads take their time."""
    limit = recipe.time_limit_s
    duration = "" if limit is None else f", for at most {limit / 60:.0f} minutes"
    arms = "; ".join(LABELS[arm] for arm in recipe.arms)
    print(
        f"Fine-tuning {recipe.model} on {recipe.data} in {recipe.dtype} on {recipe.device}{duration}.",
        f"The arms take turns: {arms}.",
        f"Seeds: {recipe.seeds}; steps of each arm and seed: {recipe.steps}; files go to {out}.",
        sep="\n",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    started = time.perf_counter()
    recipe, out = parse(argv)
    _announce(recipe, out)
    # torchao and bitsandbytes would list the GPU code that they cannot load.
    logging.disable(logging.WARNING)
    # transformers would warn once a step, in the processes that measure memory too, and break up
    # the progress bar.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from benchmarks.finetuning.experiment import run
    from benchmarks.finetuning.report import draw

    try:
        result = run(recipe, started, out)
    except (AssetError, OSError, ValueError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1
    if not result.steps:
        print("Nothing was measured.")
        return 130
    draw(result, out / "summary.png")
    print(
        "",
        *result.about["verdicts"],
        "",
        f"wrote summary.png, table.txt, result.csv and steps.csv to {out}",
        sep="\n",
    )
    return 0 if result.about["status"] == "complete" else 130


if __name__ == "__main__":
    sys.exit(main())
