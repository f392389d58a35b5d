"""What arguments of several commands may be."""

from __future__ import annotations

import argparse

import torch

from stablelora_kernels.cli.output import CommandError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def positive(text: str) -> int:
    """An argument's value as an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def dropout(text: str) -> float:
    """An argument's value as a probability in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return value


def device_of(given: str | None) -> torch.device:
    """What ``--device`` names, or the GPU, or the CPU where there is none."""
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CommandError(f"--device must be a torch device, got {given!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be of type cpu or cuda, got {given!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise CommandError(f"--device must be there, got {given!r} where PyTorch sees {count} GPUs")
    return device
