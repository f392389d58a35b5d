"""What lies outside: optional packages, what the Hugging Face hub's client downloads, and a lock
between processes.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# The errors of a file system that has no locks, as some network file systems have none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# To open a lock file in a directory that others make and remove.
_ATTEMPTS = 100
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def import_extra(module: str, extra: str, feature: str) -> Any:
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
    return tuple([*numbers, *[0] * length][:length])


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
    """Hold the lock file ``path`` during the body, and wait while another process or thread holds
    it.

    The operating system releases the lock of a process that ends, however it ends, so no lock is
    ever stale. Yields False if the file system has no locks; then it did not wait. If the directory
    of ``path`` is missing, it is made, and removed again if the body fails and leaves it empty.
    """
    is_new = False
    while True:
        file, made = _open_lock(path)
        is_new = is_new or made
        with file:
            held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                    continue  # Another one is in its place.
            except FileNotFoundError:
                continue  # Its last holder has removed it.
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                held = False
            try:
                yield held
                # The body has succeeded: the directory stays.
                is_new = False
            finally:
                # Still locked, so that a waiting process notices that the file is gone.
                path.unlink(missing_ok=True)
                if is_new:
                    _remove_if_empty(path.parent)
            return


def _open_lock(path: Path) -> tuple[TextIO, bool]:
    """The lock file, opened, and whether its directory was missing and had to be made."""
    made, attempts = False, _ATTEMPTS
    try:
        while True:
            attempts -= 1
            try:
                made = _make_directory(path.parent) or made
                return open(path, "a", opener=_open_without_links), made
            except (FileExistsError, FileNotFoundError):
                # A process that failed may have removed the directory that it had made.
                if not attempts:
                    raise
    except BaseException:
        if made:
            _remove_if_empty(path.parent)
        raise


def _make_directory(path: Path) -> bool:
    """Make a directory and its parents, and return whether it was missing."""
    try:
        path.mkdir(parents=True)
    except OSError:
        # Of a directory that is there, the system may say first that it is on a read-only file
        # system.
        if not path.is_dir():
            raise
        return False
    return True


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()


def _open_without_links(path: str, flags: int) -> int:
    """Open a file for writing. A link in its place, which could name a file elsewhere, is removed;
    a pipe is not waited for.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    _remove_link(Path(path))
    return os.open(path, flags, 0o666)


def _remove_link(path: Path) -> None:
    """Remove ``path`` if it is a link.

    Two processes may find the link. The lock on the directory keeps the second one from removing
    the file that the first one has put in the link's place.
    """
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        if path.is_symlink():
            path.unlink(missing_ok=True)
    finally:
        os.close(directory)
