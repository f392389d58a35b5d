"""Optional packages: import one, or say which extra installs it."""

from __future__ import annotations

import importlib
import re
from types import ModuleType


def import_extra(module: str, extra: str, feature: str) -> ModuleType:
    """The optional ``module``, such as "safetensors.torch". An ImportError says that ``feature``
    needs it, and names the pip line with ``extra``, which installs it, and the cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{feature} needs {package}: pip install 'stablelora-kernels[{extra}]' ({error})"
        ) from error


def release(version: str, length: int = 2) -> tuple[int, ...]:
    """The first ``length`` numbers of a version; missing ones are 0."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    numbers += [0] * length
    return tuple(numbers[:length])
