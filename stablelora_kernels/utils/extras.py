"""What lies outside: optional packages, what the Hugging Face hub's client downloads, and a lock between processes."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The errors of a file system that has no locks, as some network file systems have none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def import_extra(module: str, extra: str, feature: str) -> Any:
    """The optional ``module``, such as "safetensors.torch". An ImportError says that ``feature`` needs it, and names the pip line
    with ``extra``, which installs it, and the cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{feature} needs {package}: pip install 'stablelora-kernels[{extra}]' ({error})") from error


def release(version: str, length: int = 2) -> tuple[int, ...]:
    """The first ``length`` numbers of a version; missing ones are 0."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    return tuple([*numbers, *[0] * length][:length])


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form "owner/name"."""
    return _HUB_ID.fullmatch(text) is not None


def from_hub(argument: str, repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download the files of ``repository`` that match ``patterns``, and return their directory. Errors name ``argument``.

    It raises ImportError without huggingface_hub, and ValueError with the hub's reason for not giving the files.
    """
    try:
        hub = import_extra("huggingface_hub", "cli", "a hub id")
    except ImportError as error:
        raise ImportError(f"{argument} {repository!r} is no path on this machine, and {error}") from None
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # The hub's client raises dozens of classes without a common base.
        message = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{argument} {repository!r} is no path on this machine, and the hub did not give it: {message}"
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path`` during the body, and wait while another process or thread holds it.

    The operating system releases the lock of a process that ends, however it ends, so no lock is ever stale. Yields False if
    the file system has no locks; then it did not wait.
    """
    while True:
        with open(path, "a") as file:
            held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    continue  # Another one is in its place.
            except FileNotFoundError:
                continue  # Its last holder has removed it.
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                held = False
            try:
                yield held
            finally:
                # Still locked, so that a waiting process notices that the file is gone.
                path.unlink(missing_ok=True)
            return
