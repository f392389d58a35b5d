"""A lock file that processes and threads hold in turn."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

# The errors of a file system that has no locks, as some network file systems have none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# To open a lock file in a directory that others make and remove.
_ATTEMPTS = 100


class _LockFile(NamedTuple):
    """An open lock file, which is not locked yet."""

    file: TextIO
    # Whether its directory was missing and had to be made.
    made_directory: bool


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
        lock = _open_lock(path)
        is_new = is_new or lock.made_directory
        with lock.file as file:
            is_held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                    continue  # Another one is in its place.
            except FileNotFoundError:
                continue  # Its last holder has removed it.
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                is_held = False
            try:
                yield is_held
                # The body has succeeded: the directory stays.
                is_new = False
            finally:
                # Still locked, so that a waiting process notices that the file is gone.
                path.unlink(missing_ok=True)
                if is_new:
                    _remove_if_empty(path.parent)
            return


def _open_lock(path: Path) -> _LockFile:
    """Open the lock file, and make its directory if that is missing."""
    made_directory = False
    attempts = _ATTEMPTS
    try:
        while True:
            attempts -= 1
            try:
                if _make_directory(path.parent):
                    made_directory = True
                return _LockFile(open(path, "a", opener=_open_without_links), made_directory)
            except (FileExistsError, FileNotFoundError):
                # A process that failed may have removed the directory that it had made.
                if not attempts:
                    raise
    except BaseException:
        if made_directory:
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
