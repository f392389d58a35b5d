"""Worker processes for long benchmarks with independent units of work."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(processes: int) -> ProcessPoolExecutor:
    """``processes`` workers of one thread each, so that they do not compete for cores. They end
    with this process and on Ctrl-C.
    """
    # Spawn: a fork of a process that has used several threads may hang.
    return ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start
    )


def _start() -> None:
    # Otherwise Python raises KeyboardInterrupt in the unit of work, marks it failed and continues
    # with the queue.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    # What libraries warn of when they are imported, the first process has said.
    logging.disable(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with a killed parent; otherwise the worker would finish its unit and then wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
