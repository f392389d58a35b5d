"""Processes that are killed at one of their file operations, or that lack rights or room."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.helpers.processes import answer_of

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="runs on systems whose processes can be forked and killed"
)
NOBODY = 65534
# What actions import, once for all of them; what is not installed is left out.
PRELOAD = [
    "stablelora_kernels",
    "safetensors.torch",
    "tests.helpers.small_models",
    "examples.replace_linear",
]


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action``, which can be pickled, in another process. Return the signal that killed it,
    or 0; raise what it raised.

    The process is forked from one that has imported much and run nothing: in a fork of this one,
    torch's threads would be missing, and their locks held.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    return answer_of(action, "forkserver")[1]


def kills(
    action: Callable[[], Any], prepare: Callable[[], Any], first: int = 1, every: int = 1
) -> Iterator[None]:
    """Prepare, run ``action`` in a process that is killed before its file operation ``first``, and
    yield; then ``every`` later.

    And so on: the last one lives. Deterministic: Python's audit events are counted.
    """
    for limit in range(first, 1000, every):
        prepare()
        killed = in_child(partial(_killed_at, limit, action))
        assert killed in (0, signal.SIGKILL)
        yield
        if not killed:
            return
    raise AssertionError("the action never ends")


def _killed_at(limit: int, action: Callable[[], Any]) -> None:
    count = 0

    def hook(event: str, _: Any) -> None:
        nonlocal count
        count += event == "open" or event.startswith(("os.", "shutil.", "fcntl."))
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    action()


def with_room(room: int, action: Callable[[], Any], dies: bool) -> None:
    """Run ``action`` where files may grow to ``room`` bytes only; beyond, the process dies, or
    ``action`` gets an OSError.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    action()


def as_nobody(action: Callable[[], Any]) -> None:
    """Run ``action`` without root's right to read everything; in a child."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    action()
