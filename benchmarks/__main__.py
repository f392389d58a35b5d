"""``python -m benchmarks``: fine-tune a real model with PEFT and with this library, side by side."""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import argparse  # noqa: E402  (the clock starts before the slow imports)
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

DATASETS = ("sarcasm", "reuters-52")
_NEEDED = ("gguf", "matplotlib", "numpy", "peft", "safetensors", "tokenizers", "tqdm", "transformers")


@dataclass(frozen=True)
class Preset:
    """A preset's values; the command line can change each."""

    steps: int
    batch_size: int
    lrs: tuple[float, ...]
    shrink_ratios: tuple[float, ...]
    seeds: int
    held_out: int
    time_limit_s: float | None


PRESETS = {
    # 0.005 is the paper's largest ratio: a smaller one would show little in such a short run. So would a smaller learning rate,
    # at which pairs latch later. Batches of 8 and few texts held out: two cores without AVX-512 then take some 30 steps in the
    # time.
    "quick": Preset(120, 8, (3e-3,), (5e-3,), 1, 200, 335.0),
    # Ratio 0 is our layer and optimizer without shrinking: it separates the method's effect from the kernels'.
    "full": Preset(400, 16, (3e-4, 1e-3, 3e-3), (0.0, 5e-4, 1e-3, 2e-3, 5e-3), 5, 2000, None),
}


@dataclass(frozen=True)
class LoRARecipe:
    """Which layers get adapters, and of what kind; the command line can change each value."""

    targets: str
    r: int
    lora_alpha: float
    lora_dropout: float


RECIPES = {
    "all-linear": LoRARecipe("all-linear", 16, 32.0, 0.05),
    "paper": LoRARecipe("query-value", 8, 16.0, 0.0),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked arguments. A wrong one ends the program with a message, before any download or heavy import."""
    description = "Fine-tune a real model with PEFT and with this library, side by side."
    parser = argparse.ArgumentParser("python -m benchmarks", "python -m benchmarks [options]", description=description)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="all-linear", help="all-linear: all linear layers, r 16, alpha 32, dropout 0.05; "
        "paper: query and value projections, r 8, alpha 16, no dropout (default: all-linear)")  # fmt: skip
    add("--preset", choices=PRESETS, default="quick", help="quick: one run in 6 minutes; full: the paper's shrink ratios, "
        "several learning rates and seeds, hours on a CPU, skipping what is done (default: quick)")  # fmt: skip
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where files go (default: results)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="default: bf16 autocast where the hardware has it",
    )
    add("--model", default="smollm2", help="smollm2, minilm, a local directory or a hub id (default: smollm2)")
    add("--data", choices=DATASETS, default="sarcasm", help="default: sarcasm")
    add(
        "--seed", type=int, default=0, help="of the split, the batches and the start; the first of several (default: 0)"
    )
    add(
        "--steps",
        type=int,
        help="exactly so many, however long it takes (default: the preset's, fewer on a slow machine)",
    )
    add("--batch-size", type=int, help="default: 8, of the full preset 16")
    add("--lr", type=float, nargs="+", help="peak learning rates (default: the preset's)")
    add("--shrink-ratio", type=float, nargs="+", help="lambda, one arm each (default: the preset's)")
    add("--held-out", type=int, help="texts to test on (default: the preset's)")
    add("--target-modules", nargs="+", help="names of the linear layers to adapt (default: the recipe's)")
    add("--rank", type=int, help="r (default: the recipe's)")
    add("--alpha", type=float, help="the branch is scaled by alpha / r (default: the recipe's)")
    add("--dropout", type=float, help="on the branch's input (default: the recipe's)")
    args = parser.parse_args(argv)
    preset, recipe = PRESETS[args.preset], RECIPES[args.recipe]
    # --steps is exact; the preset's steps adapt to the machine.
    args.time_limit_s = preset.time_limit_s if args.steps is None else None
    args.steps = preset.steps if args.steps is None else args.steps
    args.batch_size = preset.batch_size if args.batch_size is None else args.batch_size
    args.lrs = tuple(dict.fromkeys(args.lr or preset.lrs))
    args.shrink_ratios = tuple(dict.fromkeys(preset.shrink_ratios if args.shrink_ratio is None else args.shrink_ratio))
    args.held_out = preset.held_out if args.held_out is None else args.held_out
    args.targets = tuple(dict.fromkeys(args.target_modules)) if args.target_modules else recipe.targets
    args.rank = recipe.r if args.rank is None else args.rank
    args.alpha = recipe.lora_alpha if args.alpha is None else args.alpha
    args.dropout = recipe.lora_dropout if args.dropout is None else args.dropout
    args.seeds = tuple(range(args.seed, args.seed + preset.seeds))
    _check_numbers(parser, args)
    _check_model(parser, args.model)
    _check_packages(parser)
    _check_out(parser, args.out)
    args.device, args.dtype = _hardware(parser, args.device, args.dtype)
    return args


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "held_out", "rank"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be in [0, 2**31), got {args.seed}")
    for lr in args.lrs:
        if not 0 < lr < float("inf"):
            parser.error(f"--lr must be a positive number, got {lr}")
    if not 0 < args.alpha < float("inf"):
        parser.error(f"--alpha must be a positive number, got {args.alpha}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be in [0, 1), got {args.dropout}")
    for ratio in args.shrink_ratios:
        if not 0 <= ratio < 1:
            parser.error(f"--shrink-ratio must be in [0, 1), got {ratio}")


def _check_model(parser: argparse.ArgumentParser, model: str) -> None:
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().is_dir():
        parser.error(f"--model {model!r} is no directory")


def _check_packages(parser: argparse.ArgumentParser) -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"packages are missing: {', '.join(missing)}; install them with: pip install -e '.[bench]'")


def _check_out(parser: argparse.ArgumentParser, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        parser.error(f"--out {str(out)!r} can't be written to: {error}")


def _hardware(parser: argparse.ArgumentParser, device: str, dtype: str) -> tuple[str, str]:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        built = (
            "this PyTorch is built without CUDA"
            if torch.version.cuda is None and torch.version.hip is None
            else "no GPU is visible"
        )
        parser.error(f"--device cuda: {built}")
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_has_bf16()
    if dtype == "bf16" and device == "cuda" and not fast_bf16:
        parser.error(f"--dtype bf16: {torch.cuda.get_device_name()} does not support it")
    if dtype == "auto":
        dtype = "bf16" if fast_bf16 else "fp32"
    return device, {"bf16": "bfloat16", "fp32": "float32"}[dtype]


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    # transformers would warn once a step and break up the progress bar.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from benchmarks.common.assets import AssetError
    from benchmarks.finetuning.experiment import Settings

    runs = [
        Settings(
            model=args.model,
            data=args.data,
            device=args.device,
            dtype=args.dtype,
            lr=lr,
            steps=args.steps,
            batch_size=args.batch_size,
            seed=seed,
            held_out=args.held_out,
            shrink_ratios=args.shrink_ratios,
            targets=args.targets,
            r=args.rank,
            lora_alpha=args.alpha,
            lora_dropout=args.dropout,
            time_limit_s=args.time_limit_s,
            # The same in every run of a sweep.
            footprint=(lr, seed) == (args.lrs[0], args.seeds[0]),
        )
        for seed in args.seeds
        for lr in args.lrs
    ]
    try:
        return _single(runs[0], args.out) if len(runs) == 1 else _sweep(runs, args.out)
    except (AssetError, ValueError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1


def _single(settings: Any, out: Path) -> int:
    result, paths = _run(settings, out, _STARTED)
    _finish(_table(result), paths)
    return 0 if result["status"] == "complete" else 130


def _sweep(runs: list[Any], out: Path) -> int:
    from benchmarks.finetuning.sweep import draw_sweep, sweep_table, write_sweep

    results = []
    for number, settings in enumerate(runs, start=1):
        directory = out / "runs" / f"lr-{settings.lr:g}-seed-{settings.seed}"
        result = _done(settings, directory)
        print(f"Run {number} of {len(runs)}: {directory}{' is done already' if result else ''}", file=sys.stderr)
        if result is None:
            directory.mkdir(parents=True, exist_ok=True)
            result, _ = _run(settings, directory, time.perf_counter())
        if result["status"] != "complete":
            break
        results.append(result)
        if left := len(runs) - number:
            hours = left * sum(done["wall_s"] for done in results) / len(results) / 3600
            print(f"About {hours:.1f} hours for the {left} runs after this one.", file=sys.stderr)
        # After every run: a stopped sweep then has its tables.
        paths = [*write_sweep(results, out), *draw_sweep(results, out)]
    if results:
        _finish(sweep_table(results), [*paths, out / "runs"])
    return 0 if len(results) == len(runs) else 130


def _run(settings: Any, directory: Path, started: float) -> tuple[dict[str, Any], list[Path]]:
    from benchmarks.finetuning.experiment import run
    from benchmarks.finetuning.plots import draw
    from benchmarks.finetuning.result import write_result

    paths: list[Path] = []

    def save(result: dict[str, Any]) -> None:
        paths[:] = write_result(result, directory)

    result = run(settings, started, save)
    return result, [*paths, *(draw(result, directory) if paths else [])]


def _done(settings: Any, directory: Path) -> dict[str, Any] | None:
    """The result of a finished run with the same settings, if there is one."""
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = result.get("settings") == json.loads(json.dumps(asdict(settings)))
    return result if same and result.get("status") == "complete" else None


def _table(result: dict[str, Any]) -> str:
    from benchmarks.finetuning.result import table

    return table(result) if "arms" in result else "Nothing was measured."


def _finish(text: str, paths: list[Path]) -> None:
    print(f"\n{text}\n")
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
