"""``python -m benchmarks``: fine-tune a real model with PEFT and with this library, side by side."""

from __future__ import annotations

import time

_STARTED = time.perf_counter()

import argparse  # noqa: E402  (the clock starts before the slow imports)
import importlib.util  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

ARMS = ("frozen", "peft", "accelerated", "stable")
DATASETS = ("sarcasm", "reuters-52")
_NEEDED = ("gguf", "matplotlib", "numpy", "peft", "safetensors", "scipy", "tokenizers", "tqdm", "transformers")
# Of a run without --steps. Two cores without AVX-512 then need all of it.
TIME_LIMIT_S = 335.0


@dataclass(frozen=True)
class Defaults:
    """Values that depend on the task; the command line can change each.

    The rate of next tokens is the one with the lowest held-out loss of PEFT's arm, on seeds 100 to 102; that of classes was not
    chosen so.
    """

    steps: int
    batch_size: int
    held_out: int
    lr: float
    seeds: int


NEXT_TOKENS = Defaults(steps=30, batch_size=4, held_out=64, lr=2e-3, seeds=3)
CLASSES = Defaults(steps=60, batch_size=8, held_out=200, lr=5e-4, seeds=1)


def _default(name: str) -> str:
    return f"default: {getattr(NEXT_TOKENS, name)}; for classes {getattr(CLASSES, name)}"


class _List(argparse.Action):
    """Print the table of benchmarks/README.md."""

    def __call__(self, parser: argparse.ArgumentParser, *_args: Any) -> NoReturn:
        readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        for row in re.findall(r"^\| (.+) \| (`.+) \| (.+) \|$", readme, re.MULTILINE):
            what, command, time = (re.sub(r" ?\(\[.*?\)\)|\[(.*?)\]\(.*?\)|`", r"\1", cell) for cell in row)
            print(f"{what}\n    python -m {command}    {time}")
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked arguments. A wrong one ends the program with a message, before any download or heavy import."""
    description = (
        "Fine-tune a real model frozen, with PEFT and with this library, side by side: speed, memory and quality."
    )
    parser = argparse.ArgumentParser("python -m benchmarks", "python -m benchmarks [options]", description=description)
    add = parser.add_argument
    add(
        "--list", action=_List, nargs=0, help="print what else can be measured, by which command, and how long it takes"
    )
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where files go (default: results)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="default: bf16 autocast where the hardware has it",
    )
    add("--model", default="smollm2", help="smollm2, minilm, a local directory or a hub id (default: smollm2, 93 MB)")
    add("--data", default="plays", help="plays or a text file: predict the next token; sarcasm or reuters-52: predict the class "
        "(default: plays, 5 MB)")  # fmt: skip
    add("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)} (default: all)")
    add("--seed", type=int, default=0, help="the first seed, of adapters, batches and dropout (default: 0)")
    add("--seeds", type=int, help=f"how many ({_default('seeds')})")
    add(
        "--steps",
        type=int,
        help=f"exactly so many, however long they take ({_default('steps')}, fewer on a slow machine)",
    )
    add("--batch-size", type=int, help=_default("batch_size"))
    add("--length", type=int, default=32, help="tokens of a piece of text (default: 32)")
    add("--held-out", type=int, help=f"texts to test on ({_default('held_out')})")
    add("--lr", type=float, help=f"peak learning rate ({_default('lr')})")
    add("--head-lr", type=float, default=3e-3, help="that of a classifier's new head (default: 3e-3)")
    add("--shrink-ratio", type=float, default=5e-4, help="Stable-LoRA's lambda (default: 5e-4, of the paper's)")
    add("--target-modules", nargs="+", default=[], help="names of the linear layers to adapt (default: all)")
    add("--rank", type=int, default=16, help="r (default: 16)")
    add("--alpha", type=float, default=32.0, help="the branch is scaled by alpha / r (default: 32)")
    add("--dropout", type=float, default=0.05, help="on the branch's input (default: 0.05)")
    args = parser.parse_args(argv)
    # --steps is exact; the default's steps adapt to the machine.
    args.time_limit_s = TIME_LIMIT_S if args.steps is None else None
    defaults = CLASSES if args.data in DATASETS else NEXT_TOKENS
    for name in vars(defaults):
        if getattr(args, name) is None:
            setattr(args, name, getattr(defaults, name))
    _check_numbers(parser, args)
    _check_paths(parser, args)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"packages are missing: {', '.join(missing)}; install them with: pip install -e '.[bench]'")
    args.device, args.dtype = _hardware(parser, args.device, args.dtype)
    return args


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("seeds", "steps", "batch_size", "length", "held_out", "rank"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be in [0, 2**31), got {args.seed}")
    for name in ("lr", "head_lr", "alpha"):
        if not 0 < (value := getattr(args, name)) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be a positive number, got {value}")
    for name in ("dropout", "shrink_ratio"):
        if not 0 <= (value := getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be in [0, 1), got {value}")


def _check_paths(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    looks_local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    if looks_local and not Path(args.model).expanduser().is_dir():
        parser.error(f"--model {args.model!r} is no directory")
    if args.data not in ("plays", *DATASETS) and not Path(args.data).expanduser().is_file():
        parser.error(f"--data must be plays, {', '.join(DATASETS)} or a text file, got {args.data!r}")
    # The directory is made when there is something to write.
    parent = next(path for path in (args.out.absolute(), *args.out.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        parser.error(f"--out {str(args.out)!r} can't be written to")


def _hardware(parser: argparse.ArgumentParser, device: str, dtype: str) -> tuple[str, str]:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        without = torch.version.cuda is None and torch.version.hip is None
        parser.error(f"--device cuda: {'this PyTorch is built without CUDA' if without else 'no GPU is visible'}")
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
    from benchmarks.finetuning.experiment import Settings, run
    from benchmarks.finetuning.plots import draw
    from benchmarks.finetuning.report import notes, table, verdicts, wrapped, write_result

    same = (
        "model",
        "data",
        "device",
        "dtype",
        "lr",
        "head_lr",
        "shrink_ratio",
        "steps",
        "batch_size",
        "length",
        "held_out",
    )
    settings = Settings(
        **{name: getattr(args, name) for name in (*same, "time_limit_s")},
        arms=tuple(dict.fromkeys(args.arms)),
        targets=tuple(dict.fromkeys(args.target_modules)),
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
    )
    paths: list[Path] = []

    def save(result: Any) -> None:
        paths[:] = write_result(result, args.out)

    try:
        result = run(settings, _STARTED, save)
    except (AssetError, OSError, ValueError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 1
    if paths:
        paths += draw(result, args.out)
        print("", *verdicts(result), "", table(result, short=True), "", *wrapped(notes(result)[:1]), "", sep="\n")
        print(*(f"wrote {path}" for path in paths), sep="\n")
    else:
        print("Nothing was measured.")
    return 0 if result["status"] == "complete" else 130


if __name__ == "__main__":
    sys.exit(main())
