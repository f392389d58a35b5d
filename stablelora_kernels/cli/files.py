"""Find the files of adapters and models that a user names by path or by hub id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stablelora_kernels.cli.output import CommandError
from stablelora_kernels.model.adapter_files import CONFIG_NAME, PICKLES, WEIGHTS_NAME, Adapter, read_adapter, read_pair
from stablelora_kernels.utils import hub


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
    if not hub.is_hub_id(given):
        raise CommandError(f"{argument} must be a path or a hub id like 'owner/name', got {given!r} (nothing there)")
    try:
        return hub.from_hub(argument, given, patterns)
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from None
