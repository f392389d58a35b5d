"""Files of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from stablelora_kernels.utils.extras import import_extra

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form "owner/name"."""
    return _HUB_ID.fullmatch(text) is not None


def from_hub(
    argument: str, repository: str, patterns: Sequence[str], revision: str | None = None
) -> Path:
    """Download the files of ``repository`` that match ``patterns``, and return their directory.
    Errors name ``argument``.

    It raises ImportError without huggingface_hub, and ValueError with the hub's reason for not
    giving the files.
    """
    try:
        hub = import_extra("huggingface_hub", "cli", "a hub id")
    except ImportError as error:
        raise ImportError(
            f"{argument} {repository!r} is no path on this machine, and {error}"
        ) from None
    options = {} if revision is None else {"revision": revision}
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # The hub's client raises dozens of classes without a common base.
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{argument} {repository!r} is no path on this machine, and the hub did not give it: {message}"
        ) from None
