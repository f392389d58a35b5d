"""Find the files of adapters and models that a user names by path or by hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stablelora_kernels.cli.output import CommandError
from stablelora_kernels.model.adapter_files import CONFIG_NAME, PICKLES, WEIGHTS_NAME, Adapter, read_adapter, read_pair
from stablelora_kernels.utils.extras import import_extra

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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
    if not _HUB_ID.fullmatch(given):
        raise CommandError(f"{argument} must be a path or a hub id like 'owner/name', got {given!r} (nothing there)")
    try:
        hub = import_extra("huggingface_hub", "cli", "a hub id")
    except ImportError as error:
        raise CommandError(f"{argument} {given!r} is no path on this machine, and {error}") from None
    try:
        return Path(hub.snapshot_download(given, allow_patterns=list(patterns)))
    except Exception as error:  # The hub's client raises dozens of classes without a common base.
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(
            f"{argument} {given!r} is no path on this machine, and the hub did not give it: {message}"
        ) from None
