"""Processes for the long benchmarks, whose units of work do not depend on each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(processes: int) -> ProcessPoolExecutor:
    """``processes`` workers of one thread each, so that they do not fight for the cores; they end when this process does, and
    with Ctrl-C."""
    # Not forked: a fork of a process that has used several threads may hang.
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    # Python would raise KeyboardInterrupt in the work, call it failed and go on to what is queued, of which the pool awaits all.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker that outlives a killed parent would go on for minutes, and then wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
