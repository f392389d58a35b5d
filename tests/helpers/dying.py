"""Processes that are killed at one of their file operations, or that lack rights, room or the disk."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked and killed")
NOBODY = 65534
# What actions import, once for all of them; what is not installed is left out.
PRELOAD = ["stablelora_kernels", "safetensors.torch", "tests.helpers.small_models", "examples.finetune",
           "examples.replace_linear"]  # fmt: skip


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action``, which can be pickled, in another process. Return the signal that killed it, or 0; raise what it raised.

    The process is forked from one that has imported much and run nothing: in a fork of this one, torch's threads would be
    missing, and their locks held.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    context = multiprocessing.get_context("forkserver")
    reading, writing = context.Pipe(duplex=False)
    # Bytes: multiprocessing would send tensors through shared memory.
    child = context.Process(target=_run, args=(pickle.dumps(action), writing))
    child.start()
    writing.close()
    try:
        said = reading.recv()
    except EOFError:
        said = ""
    child.join()
    assert not said, said
    return -child.exitcode if child.exitcode < 0 else 0


def _run(pickled: bytes, writing: Any) -> None:
    try:
        torch.set_num_threads(1)
        pickle.loads(pickled)()
        said = ""
    except BaseException:
        said = traceback.format_exc()
    writing.send(said)


def kills(action: Callable[[], Any], prepare: Callable[[], Any], first: int = 1, every: int = 1) -> Iterator[int]:
    """Prepare, run ``action`` in a process that is killed before its file operation ``first``, and yield; then ``every`` later.

    And so on: the last one lives. Deterministic: Python's audit events are counted.
    """
    for limit in range(first, 1000, every):
        prepare()
        killed = in_child(partial(_doomed, limit, action))
        assert killed in (0, signal.SIGKILL)
        yield limit
        if not killed:
            return
    raise AssertionError("the action never ends")


def _doomed(limit: int, action: Callable[[], Any]) -> None:
    sys.addaudithook(_killer(limit))
    action()


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
    assert in_child(partial(_humble, action)) == 0


def _humble(action: Callable[[], Any]) -> None:
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    action()
