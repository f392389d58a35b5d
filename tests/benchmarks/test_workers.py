"""The long benchmarks' worker processes."""

from __future__ import annotations

import subprocess
import sys

# The worker's sleep holds the output open: it ends once the worker does.
PARENT = """
import time, torch
from benchmarks.common.workers import pool
with pool(1) as processes:
    print(processes.submit(torch.get_num_threads).result(), flush=True)
    processes.submit(time.sleep, 600).result()
"""


def test_a_worker_has_one_thread_and_ends_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline().strip() == b"1"
        parent.kill()
        assert parent.communicate(timeout=60)[0] == b""
