"""Find the files of adapters and models that a user names by path or by hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from stablelora_kernels.cli.output import CommandError
from stablelora_kernels.model.peft_format import CONFIG_NAME, WEIGHTS_NAME, find_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def adapter_files(given: str) -> tuple[Path | None, Path]:
    """The config and the weights file of an adapter. The config is None for a weights file without one in its directory."""
    path = Path(given)
    if path.is_file():
        if path.suffix != ".safetensors":
            pickled = (
                ": a pickle can run code, so it is refused" if path.suffix in (".bin", ".pt", ".pth", ".pkl") else ""
            )
            raise CommandError(f"ADAPTER must be a directory or a safetensors file, got {given!r}{pickled}")
        config = path.with_name(CONFIG_NAME)
        return (config if config.is_file() else None), path
    if not path.exists():
        path = from_hub("ADAPTER", given, (CONFIG_NAME, WEIGHTS_NAME))
    try:
        return find_files(path)
    except ValueError as error:
        raise CommandError(str(error).replace("path must", "ADAPTER must", 1)) from None


def from_hub(argument: str, given: str, patterns: Sequence[str]) -> Path:
    """Download the files of a hub repository that match ``patterns``, and return their directory."""
    if not _HUB_ID.fullmatch(given):
        raise CommandError(f"{argument} must be a path or a hub id like 'owner/name', got {given!r} (nothing there)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CommandError(
            f"{argument} {given!r} is no path on this machine; for a hub id: pip install 'stablelora-kernels[cli]'"
        ) from None
    try:
        return Path(snapshot_download(given, allow_patterns=list(patterns)))
    except Exception as error:  # The hub's client raises dozens of classes without a common base.
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CommandError(
            f"{argument} {given!r} is no path on this machine, and the hub did not give it: {message}"
        ) from None
