"""The long benchmarks' worker processes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The worker's sleep holds the output open: it ends once the worker does.
PARENT = """
import time, torch
from benchmarks.common.workers import pool
with pool(1) as processes:
    print(processes.submit(torch.get_num_threads).result(), flush=True)
    [processes.submit(time.sleep, 600) for _ in range(3)][0].result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_workers_have_one_thread_and_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"1\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.communicate(timeout=60)[0] == b""
