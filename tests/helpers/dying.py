"""Processes that are killed at one of their file operations, or that lack rights, room or the disk."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
NOBODY = 65534


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action`` in a forked process. Return the signal that killed it, or 0; raise what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            action()
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60_000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert not said, said
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kills(action: Callable[[], Any], prepare: Callable[[], Any]) -> Iterator[int]:
    """Prepare, run ``action`` in a process that is killed before its first file operation, and yield; then before its second ...

    The last one lives. Deterministic: Python's audit events are counted.
    """
    for limit in range(1, 1000):
        prepare()

        def doomed(limit: int = limit) -> None:
            sys.addaudithook(_killer(limit))
            action()

        killed = in_child(doomed)
        assert killed in (0, signal.SIGKILL)
        yield limit
        if not killed:
            return
    raise AssertionError("the action never ends")


def _killer(limit: int) -> Callable[[str, Any], None]:
    count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def as_nobody(action: Callable[[], Any]) -> None:
    """Run ``action`` in a process without root's right to read everything."""

    def humble() -> None:
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        action()

    assert in_child(humble) == 0
