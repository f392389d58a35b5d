"""A lock between processes that write to the same place."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The errors of a file system that has no locks, as some network file systems have none.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path`` during the body, and wait while another process or thread holds it.

    The operating system releases the lock of a process that ends, however it ends, so no lock is ever stale. Yields False if
    the file system has no locks; then it did not wait.
    """
    descriptor, held = _acquire(path)
    try:
        yield held
    finally:
        # Still locked, so that a waiting process notices that the file is gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, True
        except FileNotFoundError:
            pass  # Its last holder has removed it.
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
