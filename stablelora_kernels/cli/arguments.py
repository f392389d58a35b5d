"""What several commands take: numbers, a device, and adapters and models by path or by hub id."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablelora_kernels.cli.output import CommandError
from stablelora_kernels.model.adapter_files import CONFIG_NAME, PICKLES, WEIGHTS_NAME, Adapter, read_adapter, read_pair
from stablelora_kernels.testing import torch_device
from stablelora_kernels.utils import extras


def positive(text: str) -> int:
    """Parse an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def dropout(text: str) -> float:
    """Parse a probability in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), got {text!r}")
    return value


def device_of(given: str | None) -> torch.device:
    """The device that ``--device`` names; without it, the GPU if there is one, else the CPU."""
    try:
        return torch_device(given)
    except ValueError as error:
        raise CommandError(f"--{error}") from None


def adapter_directory(given: str) -> Path:
    """The directory of an adapter."""
    path = Path(given)
    if path.is_file():
        raise CommandError(f"ADAPTER must be a directory, got the file {given!r}")
    return path if path.exists() else from_hub("ADAPTER", given, (CONFIG_NAME, WEIGHTS_NAME))


def load_files(given: str, convert: Callable[[Tensor], Any]) -> Adapter:
    """The adapter that a user names, read. ``convert`` gets one tensor at a time.

    A weights file may be given alone; the config in its directory counts, if there is one. An adapter that cannot be read ends
    every command alike, with status 2.
    """
    path = Path(given)
    try:
        if not path.is_file():
            return read_adapter(adapter_directory(given), convert)
        if path.suffix != ".safetensors":
            pickled = ": a pickle can run code, so it is refused" if path.suffix in PICKLES else ""
            raise CommandError(f"ADAPTER must be a directory or a safetensors file, got {given!r}{pickled}")
        return read_pair(path.with_name(CONFIG_NAME), path, convert)
    except (ValueError, ImportError, OSError) as error:
        raise CommandError(str(error).replace("path must", "ADAPTER must", 1)) from None


def from_hub(argument: str, given: str, patterns: Sequence[str]) -> Path:
    """Download the files of a hub repository that match ``patterns``, and return their directory."""
    if not extras.is_hub_id(given):
        raise CommandError(f"{argument} must be a path or a hub id like 'owner/name', got {given!r} (nothing there)")
    try:
        return extras.from_hub(argument, given, patterns)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from None
