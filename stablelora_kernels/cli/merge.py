"""Adds each pair's scaling · B A to its weight in float32, rounds once to the stored dtype, and
writes a model directory (safetensors, config and tokenizer) that transformers loads without an
adapter. Says how much of each layer's change was rounded away.

The directory appears whole or not at all. It replaces one only with --overwrite, and only one that
this command wrote and that holds no other files. Values that are not finite are refused, and so are
quantized models, whose sums would have to be quantized anew. No code of the model's own is run.

Exit status: 0 written; 1 the merge was refused or failed, and nothing is written; 2 the merge could
not start, for example because the adapter can't be read."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stablelora_kernels.cli.common import CommandError, Report, failing, find, load_files, size
from stablelora_kernels.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, read_json
from stablelora_kernels.model.merge import merge_lora, remove_lora, untie_in_config
from stablelora_kernels.model.modules import lora_layers
from stablelora_kernels.model.reports import MergeReport, list_some
from stablelora_kernels.model.save_load import load_adapter
from stablelora_kernels.testing import DTYPES
from stablelora_kernels.utils.extras import import_extra
from stablelora_kernels.utils.lock import locked
from stablelora_kernels.utils.validation import counted

HELP = "fold an adapter into its model, with the rounding error stated"
# Files that transformers may need besides the weights and the config, which save_pretrained writes.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "image_processor*.json",
)  # fmt: skip
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
)
# What the command wrote, and of what. --overwrite removes no file that is not named there.
RECORD = "stablelora_merge.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="an adapter's directory in PEFT's format, or a hub id"
    )
    parser.add_argument(
        "--into",
        required=True,
        metavar="MODEL",
        help="a transformers model's directory, or a hub id",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="where the merged model goes"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype to store (default: the model's); takes float32's memory",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DIR if this command wrote it"
    )


def run(args: argparse.Namespace, report: Report) -> int:
    """Merge an adapter into its base model and write the model to ``--out``."""
    out, shown_path = args.out.resolve(), repr(str(args.out))
    if out.exists() and not out.is_dir():
        raise CommandError(f"--out must be a directory, got the file {shown_path}")
    if out.is_dir() and any(out.iterdir()) and not args.overwrite:
        raise CommandError(
            f"--out must be empty or not there, got {shown_path} with files in it; or --overwrite"
        )
    adapter = find("ADAPTER", args.adapter, (CONFIG_NAME, WEIGHTS_NAME))
    if adapter.is_file():
        raise CommandError(f"ADAPTER must be a directory, got the file {args.adapter!r}")
    # Before the model, which takes longer, and with the status that a damaged file has everywhere.
    load_files(str(adapter), lambda tensor: None)
    source = find("--into", args.into, MODEL_FILES)
    for name, path in (("ADAPTER", adapter / WEIGHTS_NAME), ("--into", source / "config.json")):
        if path.resolve().is_relative_to(out):
            raise CommandError(
                f"--out must not hold {name}, got {shown_path} with {str(path)!r} in it"
            )
    if out.is_dir() and (foreign := _not_ours(out)):
        raise CommandError(
            f"--overwrite replaces only what this command wrote, got {shown_path} with {list_some(foreign)}"
        )

    dtype = DTYPES[args.dtype] if args.dtype else None
    architecture = _architecture(source)
    model = _load(architecture, source, dtype)
    tied = _tied(model)
    with failing(ValueError, TypeError, ImportError, OSError, status=1):
        notes = load_adapter(model, adapter).notes
        merged = _merge(model, dtype)
    untied = tied and not _tied(model)
    untie_in_config(model)
    if dtype is not None:
        # The merged layers already have it.
        model.to(dtype)
    _check_finite(model)
    # Each writer raises its own class, for example when the disk is full.
    with (
        failing(Exception, status=1, before=f"--out {shown_path} could not be written: "),
        _appearing(out) as directory,
    ):
        model.save_pretrained(directory)
        copied = sorted(
            {
                file.name
                for pattern in TOKENIZER_FILES
                for file in source.glob(pattern)
                if file.is_file()
            }
        )
        for name in copied:
            shutil.copyfile(source / name, directory / name)
        names = sorted(file.name for file in directory.iterdir())
        record = {"adapter": args.adapter, "into": args.into, "files": [*names, RECORD]}
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    report.data = {
        "out": str(args.out),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "architecture": architecture.__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "merged": len(merged.errors),
        "worst": merged.worst,
        "errors": {
            name: asdict(error) | {"relative": error.relative}
            for name, error in merged.errors.items()
        },
        "untied": untied,
        "copied": copied,
        "notes": list(notes),
    }

    layers = counted(len(merged.errors), "layer")
    report.text(f"{layers} merged into {architecture.__name__}, {report.data['dtype']}: {args.out}")
    pairs = {"size": size(report.data["bytes"])}
    if merged.worst is not None:
        shares = sorted(error.relative for error in merged.errors.values())
        worst = merged.errors[merged.worst]
        pairs["rounding"] = (
            f"lost {100 * shares[len(shares) // 2]:.2g} % of a layer's largest change (median), "
            f"{100 * worst.relative:.2g} % at most: {worst.largest_error:.3g} of {worst.largest_delta:.3g} in {merged.worst}"
        )
    pairs["copied"] = ", ".join(copied) or "no tokenizer files, since --into has none"
    if untied:
        pairs["untied"] = "input and output embeddings, which the adapter made different"
    report.pairs(pairs)
    report.text(*(f"  note: {note}" for note in notes))
    return 0


def _architecture(source: Path) -> Any:
    """The transformers class that the model's config names."""
    file = source / "config.json"
    if not file.is_file():
        raise CommandError(
            f"--into must be a model's directory with config.json, got {str(source)!r} without it"
        )
    with failing(ValueError):
        config = read_json(file)
    if (quantized := config.get("quantization_config")) is not None:
        method = (
            quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        )
        raise CommandError(
            f"--into must be a model in full precision, got one that is quantized ({method}): the sum would have to be "
            "quantized anew, which loses more than most adapters add; merge into the model it was made from"
        )
    names = config.get("architectures") or [None]
    with failing(ImportError):
        transformers = import_extra("transformers", "cli", "merge")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture = getattr(transformers, str(names[0]), None)
    if not (isinstance(architecture, type) and issubclass(architecture, nn.Module)):
        custom = ", and code of its own (auto_map) is not run" if config.get("auto_map") else ""
        raise CommandError(
            f"architectures in {file} must name a class of transformers, got {names[0]!r}{custom}"
        )
    return architecture


def _load(architecture: Any, source: Path, dtype: torch.dtype | None) -> Any:
    """The model in its own dtype, or in float32 if ``dtype`` is given: then the sum is rounded only
    once.
    """
    options = {"output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    # transformers raises dozens of classes for bad files.
    with failing(Exception, status=1, before=f"--into {str(source)!r} can't be loaded: "):
        model, info = architecture.from_pretrained(
            source, dtype=torch.float32 if dtype else "auto", **options
        )
    # transformers initializes missing weights randomly.
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            raise CommandError(
                f"--into must hold all weights of {architecture.__name__}, got {list_some(keys)} {problem[:-5]}",
                1,
            )
    return model


def _merge(model: nn.Module, dtype: torch.dtype | None) -> MergeReport:
    """Merge and remove LoRA. The reported errors are those of the weights in the stored dtype."""
    merge_lora(model)
    if dtype is not None:
        for layer in lora_layers(model).values():
            layer.set_weight(nn.Parameter(layer.weight.to(dtype), requires_grad=False))
    return remove_lora(model)


def _tied(model: Any) -> bool:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(outputs, "weight", None)
    return weight is not None and weight is getattr(inputs, "weight", None)


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(map(torch.isfinite, torch.aminmax(tensor)))
        ):
            raise CommandError(
                f"the merged model must be finite, got {name} in {str(tensor.dtype).removeprefix('torch.')} with values "
                "that are not",
                status=1,
            )


def _not_ours(out: Path) -> list[str]:
    """The files in ``out`` that this command did not write there."""
    try:
        named = read_json(out / RECORD).get("files")
    except (OSError, ValueError):
        named = None
    ours = (
        set(named)
        if isinstance(named, list) and all(isinstance(name, str) for name in named)
        else set()
    )
    return sorted(
        file.name for file in out.iterdir() if file.name not in ours or not file.is_file()
    )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """Yield a new directory that replaces ``out`` when the body is done. If the body fails, ``out``
    stays unchanged.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that moving is a rename.
    lock, new, old = (
        out.with_name(f".{out.name}.{kind}") for kind in ("merge.lock", "merge.tmp", "merge.old")
    )

    def clean_up() -> None:
        # Stopped between the two renames.
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)

    with locked(lock):
        # After a process that died here: a living one would hold the lock.
        clean_up()
        try:
            new.mkdir()
            yield new
            if out.exists():
                os.replace(out, old)
            os.replace(new, out)
        finally:
            clean_up()
