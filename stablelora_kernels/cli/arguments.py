"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse

import torch

from stablelora_kernels.cli.output import CommandError
from stablelora_kernels.testing import torch_device


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
