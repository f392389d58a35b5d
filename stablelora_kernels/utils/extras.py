"""Optional packages, imported when a feature needs them."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str, feature: str) -> Any:
    """The optional ``module``, given by its full name.

    Args:
        module: for example "safetensors.torch".
        extra: the extra of stablelora-kernels that installs it.
        feature: what needs it, for the error.

    Raises:
        ImportError: it is not installed, or importing it fails. The message names the pip line and the cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{feature} needs {package}: pip install 'stablelora-kernels[{extra}]' ({error})") from error
